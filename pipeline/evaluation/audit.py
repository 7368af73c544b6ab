"""`sllm audit`: proves that a run trained on every bin once, in order, from its start to its end.

metrics.jsonl has, for every step, the number of batches that all ranks computed and the sum of their digests
(`Batch.digest`, over the model's input). The audit plans the stream again from the saved recipe, reads every
bin, and compares the sums. It trusts nothing that the run records about its order. It reads all text of the
run once.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.common.files import read_json_lines
from data_prep.common.page import render
from data_prep.shards.reader import ShardSet
from pipeline.checkpoints import store
from pipeline.checkpoints.store import DamagedCheckpoint, Meta
from pipeline.common.text import FILTERS
from pipeline.config.schema import Recipe, load_recipe
from pipeline.data.batch import build_batch
from pipeline.data.plan import Bin, BinPlan, Consumed, count
from pipeline.training.run_files import Run
from pipeline.training.run_log import METRICS

SHOWN = 20  # findings in the text; --json has all


@dataclass
class PlannedStep:
    """A step by the plan: its bins, the digest of each, and its counts."""

    bins: list[Bin]
    digests: list[int]
    tokens: int
    targets: int


class PlannedSteps:
    """The plan's steps by number, from 1; ask in ascending order, except for the step before."""

    def __init__(self, plan: BinPlan, recipe: Recipe):
        self._plan, self._recipe = plan, recipe
        self._stream, self._made = plan.bins(), 0
        self._last: deque[PlannedStep] = deque(maxlen=3)

    def __getitem__(self, number: int) -> PlannedStep:
        while self._made < number:
            bins = list(itertools.islice(self._stream, self._recipe.data.bins_per_step))
            digests = [build_batch(self._plan.spans(bin_)).digest() for bin_ in bins]
            self._last.append(PlannedStep(bins, digests, *self._counts(bins)))
            self._made += 1
        return self._last[number - self._made - 1]

    def _counts(self, bins: list[Bin]) -> tuple[int, int]:
        return count(bins, self._recipe.objective, self._recipe.data.sentence_ends)

    def around(self, number: int) -> list[PlannedStep]:
        """A step and its neighbours."""
        return [self[n] for n in range(max(1, number - 1), number + 2)]


def audit(run_dir: str | Path, shards: list[str] | None = None) -> dict[str, Any]:
    """Check every step and every checkpoint of a run.

    Args:
        shards: folders of the recipe's shard sets, if they have moved.
    Returns: `clean`; `findings`, a line each; `steps`, `bins`, `tokens`; `skipped`, steps that the guard did
        not apply (their bins count as consumed); `starts` (of starts.jsonl) and `world_changes`;
        `checkpoints` that were compared; `damaged` ones that were not.
    Raises: UserError when there is no run, or it was trained on other shards.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS).is_file():
        raise UserError(f"{run_dir} holds no {METRICS}: not a run directory, or no step has been computed")
    recipe = load_recipe(run_dir / "recipe.yaml")
    metas, damaged = _checkpoints(run_dir)
    plan = _plan(recipe, shards or recipe.data.shards, metas)
    findings: list[str] = []
    records = _step_records(run_dir / METRICS, findings)
    starts = Run(run_dir).starts
    last = max(records, default=0)

    planned = PlannedSteps(plan, recipe)
    position, consumed, tokens = plan.start(), Consumed(plan.sources), 0
    for number in range(1, last + 1):
        step = planned[number]
        position, tokens = position.after(step.bins), tokens + step.tokens
        consumed.add(step.bins)
        if number in records:
            findings += _compare_step(number, records[number], planned, tokens)
        if number in metas:
            ours = {"tokens": tokens, "position": position.to_json(), "consumed": consumed.to_json()}
            findings += _compare_checkpoint(metas[number], ours, recipe)
    for number in metas:
        if number > last:
            findings.append(f"checkpoint {store.step_name(number)}: {METRICS} ends before it")
    for start in starts:
        if start["step"] > last:
            findings.append(f"a start from step {start['step']}: {METRICS} ends before it")
    worlds = [start["world"] for start in starts]
    return {
        "run_dir": str(run_dir),
        "clean": not findings,
        "findings": findings,
        "steps": len(records),
        "bins": sum(position.taken),
        "tokens": tokens,
        "skipped": [number for number, record in records.items() if record.get("skipped")],
        "starts": [{key: start.get(key) for key in _START} for start in starts],
        "world_changes": sum(a != b for a, b in itertools.pairwise(worlds)),
        "checkpoints": [store.step_name(number) for number in metas],
        "damaged": damaged,
    }


_START = ("time", "step", "world", "zero_stage", "lost_steps")


def format_audit(result: dict[str, Any]) -> str:
    """The verdict, the findings, and where the number of ranks changed."""
    return render(Path(__file__).with_name("audit.txt.jinja"), {**result, "shown": SHOWN}, FILTERS)


def _checkpoints(run_dir: Path) -> tuple[dict[int, Meta], list[str]]:
    """The metas of whole checkpoints by step, up to `latest` (those beyond it will be written again); and
    what is wrong with damaged ones."""
    metas, damaged = {}, []
    for path in reversed(store.listed(run_dir)[0]):
        try:
            meta = store.read_meta(path)
            metas[meta.step] = meta
        except DamagedCheckpoint as error:
            damaged.append(str(error))
    return metas, damaged


def _plan(recipe: Recipe, folders: list[str], metas: dict[int, Meta]) -> BinPlan:
    """The run's plan. Raises UserError when a checkpoint is of other shards."""
    shard_sets = [ShardSet.open(folder) for folder in folders]
    fingerprints = [shard_set.fingerprint for shard_set in shard_sets]
    for number, meta in metas.items():
        if meta.shards != fingerprints:
            raise UserError(
                f"{', '.join(folders)}: not the shards that checkpoint {store.step_name(number)} was "
                "trained on; name those by --data"
            )
    data = recipe.data
    return BinPlan(shard_sets, data.window_tokens, data.bin_tokens, recipe.seed, data.weights)


def _step_records(path: Path, findings: list[str]) -> dict[int, dict[str, Any]]:
    """The records by step. Adds a finding for each line that is no record, and for steps that are missing,
    repeated or out of order."""
    records: dict[int, dict[str, Any]] = {}
    last = 0
    for number, record in read_json_lines(path):
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int):
            findings.append(f"{METRICS}, line {number}: not the record of a step")
            continue
        if step in records:
            findings.append(f"step {step} is twice in {METRICS} (line {number})")
            continue
        if step < last:
            findings.append(f"step {step} comes after step {last} in {METRICS} (line {number})")
        missing = range(last + 1, step)
        if missing:
            which = (
                f"step {missing[0]} is" if len(missing) == 1 else f"steps {missing[0]} to {missing[-1]} are"
            )
            findings.append(f"{which} missing in {METRICS} (line {number})")
        records[step] = record
        last = max(last, step)
    return records


def _compare_step(number: int, record: dict[str, Any], planned: PlannedSteps, tokens: int) -> list[str]:
    """The differences between a step's record and the plan; `tokens` counts those of all steps so far."""
    step = planned[number]
    found = []
    ours = len(step.bins), sum(step.digests)
    theirs = record.get("bins"), record.get("bins_digest")
    if theirs != ours:
        found.append(
            f"step {number} computed other bins than planned: {theirs[0]} with digest {theirs[1]}, "
            f"planned {ours[0]} with digest {ours[1]}, from {step.bins[0]} on"
            + _explain(step, theirs, planned.around(number))
        )
    for name, value in (("targets", step.targets), ("tokens", tokens)):
        if record.get(name) != value:
            found.append(f"step {number}: {name} is {record.get(name)} in {METRICS} and {value} by the plan")
    return found


def _explain(step: PlannedStep, theirs: tuple[Any, Any], around: list[PlannedStep]) -> str:
    """The bin that is missing, or was replaced by one of the steps around, if that gives the run's sum."""
    if None in theirs:
        return " (no count or digest)"
    near = [pair for one in around for pair in zip(one.digests, one.bins, strict=True)]
    for digest, bin_ in zip(step.digests, step.bins, strict=True):
        rest = sum(step.digests) - digest
        if theirs == (len(step.bins) - 1, rest):
            return f": {bin_} is missing"
        for other, instead in near:
            if theirs == (len(step.bins), rest + other):
                return f": {bin_} is missing, {instead} was computed for it"
    return ""


def _compare_checkpoint(meta: Meta, ours: dict[str, Any], recipe: Recipe) -> list[str]:
    """The differences between a checkpoint and the steps up to it."""
    name = f"checkpoint {store.step_name(meta.step)}"
    found = [
        f"{name}: {key} is {getattr(meta, key)} there and {value} by the steps up to it"
        for key, value in ours.items()
        if getattr(meta, key) != value
    ]
    data, theirs = recipe.to_dict()["data"], meta.recipe["data"]
    for key in ("weights", "window_tokens", "bin_tokens", "bins_per_step"):
        if data[key] != theirs[key]:
            found.append(f"{name}: data.{key} is {theirs[key]} there and {data[key]} in recipe.yaml")
    if recipe.seed != meta.recipe["seed"]:
        found.append(f"{name}: seed is {meta.recipe['seed']} there and {recipe.seed} in recipe.yaml")
    return found
