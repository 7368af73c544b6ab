"""`sllm audit`: proof that a run trained on every bin once, in order, over its whole life.

In: a run directory and the shard sets that it was trained on. Out: a dictionary with `clean`, `findings` and
what was looked at. Called by `cli.py`.

What ranks computed stands in metrics.jsonl: of every step the number of batches and the sum of their digests
(`Batch.digest`, over what the model is given), over all ranks. What they should have computed is worked out
again here: the stream is planned from the saved recipe, every bin is read, and the sums are compared. So
nothing that a run says about its own order is believed. The cost is reading, once, all text that the run has
seen.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from pipeline.checkpoints import store
from pipeline.checkpoints.store import DamagedCheckpoint, Meta
from pipeline.config.schema import Recipe, load_recipe
from pipeline.data.batch import build_batch
from pipeline.data.plan import Bin, BinPlan, Consumed, count
from pipeline.training.run_log import METRICS, STARTS, read_records

SHOWN = 20  # findings in the text; --json has all


@dataclass
class PlannedStep:
    """A step as the plan wants it: its bins, the digest of each, and their sums."""

    bins: list[Bin]
    digests: list[int]
    tokens: int
    targets: int


class PlannedSteps:
    """The plan's steps by number, from 1, in ascending order; the one before may be asked for again."""

    def __init__(self, plan: BinPlan, recipe: Recipe):
        self._plan, self._recipe = plan, recipe
        self._stream, self._made = plan.bins(), 0
        self._last: deque[PlannedStep] = deque(maxlen=3)

    def __getitem__(self, number: int) -> PlannedStep:
        while self._made < number:
            bins = list(itertools.islice(self._stream, self._recipe.data.bins_per_step))
            digests = [build_batch(self._plan.spans(bin_)).digest() for bin_ in bins]
            self._last.append(PlannedStep(bins, digests, *count(bins, self._recipe.objective)))
            self._made += 1
        return self._last[number - self._made - 1]


def audit(run_dir: str | Path, shards: list[str] | None = None) -> dict[str, Any]:
    """Walk through every step and every checkpoint of a run.

    Args:
        shards: where the recipe's shard sets lie now, if they have moved.
    Returns: `clean`; `findings`, a line each; `steps`, `bins`, `tokens`; `skipped`, steps that the guard did
        not apply (their bins are consumed all the same); `starts` (as in starts.jsonl) and
        `world_changes`; `checkpoints` that were compared; `damaged` ones that could not be.
    Raises: UserError when there is no run, or the shards are not those that it was trained on.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS).is_file():
        raise UserError(f"{run_dir} holds no {METRICS}: not a run directory, or no step has been computed")
    recipe = load_recipe(run_dir / "recipe.yaml")
    metas, damaged = _checkpoints(run_dir)
    plan = _plan(recipe, shards or recipe.data.shards, metas)
    findings: list[str] = []
    records = _step_records(run_dir / METRICS, findings)
    starts = read_records(run_dir / STARTS)
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
    """A line of verdict; what was found; where the number of ranks changed."""
    starts, found = result["starts"], result["findings"]
    if result["clean"]:
        verdict = (
            f"clean: {result['steps']:,} steps trained on {result['bins']:,} bins "
            f"({result['tokens']:,} tokens) in the planned order, each once"
        )
    else:
        verdict = f"NOT clean: {len(found)} finding{'s' * (len(found) != 1)} in {result['steps']:,} steps"
    lines = [f"{result['run_dir']}: {verdict}"]
    lines += [f"  {line}" for line in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"  and {len(found) - SHOWN} more")
    lines.append(
        f"  {max(0, len(starts) - 1)} restarts, {result['world_changes']} of them with another number of "
        f"ranks; {sum(start['lost_steps'] or 0 for start in starts)} steps computed again; "
        f"{len(result['skipped'])} skipped by the guard; "
        f"{len(result['checkpoints'])} checkpoints compared"
    )
    for before, start in itertools.pairwise(starts):
        if before["world"] != start["world"]:
            lines.append(f"  from step {start['step'] + 1} on: {before['world']} → {start['world']} ranks")
    lines += [f"  not compared: {line}" for line in result["damaged"]]
    return "\n".join(lines)


def _checkpoints(run_dir: Path) -> tuple[dict[int, Meta], list[str]]:
    """The metas of whole checkpoints by step, up to `latest` (what is beyond it will be written again); and
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
    """The plan that the run followed. Raises UserError when these are other shards than a checkpoint's."""
    shard_sets = [ShardSet.open(folder) for folder in folders]
    fingerprints = [shard_set.fingerprint for shard_set in shard_sets]
    for number, meta in metas.items():
        if meta.shards != fingerprints:
            raise UserError(
                f"{', '.join(folders)}: not the shards that checkpoint {store.step_name(number)} was "
                "trained on; name those by --shards"
            )
    data = recipe.data
    return BinPlan(shard_sets, data.window_tokens, data.bin_tokens, recipe.seed, data.weights)


def _step_records(path: Path, findings: list[str]) -> dict[int, dict[str, Any]]:
    """The records by step; adds a finding for lines that are none, and for steps that are missing, repeated
    or out of order."""
    records: dict[int, dict[str, Any]] = {}
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a kill may leave half a line
    reached = 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            findings.append(f"{METRICS}, line {number}: not the record of a step")
            continue
        if step in records:
            findings.append(f"step {step} stands twice in {METRICS} (line {number})")
            continue
        if step < reached:
            findings.append(f"step {step} stands after step {reached} in {METRICS} (line {number})")
        missing = range(reached + 1, step)
        if missing:
            which = (
                f"step {missing[0]} is" if len(missing) == 1 else f"steps {missing[0]} to {missing[-1]} are"
            )
            findings.append(f"{which} missing in {METRICS} (line {number})")
        records[step] = record
        reached = max(reached, step)
    return records


def _compare_step(number: int, record: dict[str, Any], planned: PlannedSteps, tokens: int) -> list[str]:
    """What differs between a step's record and the plan; `tokens` counts those of all steps so far."""
    step = planned[number]
    found = []
    ours = len(step.bins), sum(step.digests)
    theirs = record.get("bins"), record.get("bins_digest")
    if theirs != ours:
        neighbours = [planned[number - 1]] if number > 1 else []
        neighbours += [step, planned[number + 1]]
        why = _explain(step, theirs, neighbours)
        found.append(
            f"step {number} computed other bins than planned: {theirs[0]} with digest {theirs[1]}, "
            f"planned {ours[0]} with digest {ours[1]}, from {step.bins[0]} on{why}"
        )
    for name, value in (("targets", step.targets), ("tokens", tokens)):
        if record.get(name) != value:
            found.append(f"step {number}: {name} is {record.get(name)} in {METRICS} and {value} by the plan")
    return found


def _explain(step: PlannedStep, theirs: tuple[Any, Any], neighbours: Iterable[PlannedStep]) -> str:
    """Which bin was left out or taken for another, if one alone accounts for the difference."""
    bins, digest = theirs
    if not isinstance(bins, int) or not isinstance(digest, int):
        return " (no count or digest)"
    excess = digest - sum(step.digests)
    ours = dict(zip(step.digests, step.bins, strict=True))
    if bins == len(step.bins) - 1 and -excess in ours:
        return f": {ours[-excess]} is missing"
    near = {d: bin_ for one in neighbours for d, bin_ in zip(one.digests, one.bins, strict=True)}
    if bins == len(step.bins):
        for mine, bin_ in ours.items():
            if mine + excess in near:
                return f": {bin_} is missing, {near[mine + excess]} was computed for it"
    return ""


def _compare_checkpoint(meta: Meta, ours: dict[str, Any], recipe: Recipe) -> list[str]:
    """What differs between a checkpoint and the steps up to it."""
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
