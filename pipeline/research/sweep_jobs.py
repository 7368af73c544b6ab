"""From a sweep file to its runs: every job with a checked recipe, and how long it trains for a budget."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError, counted
from data_prep.common.files import read_json
from data_prep.shards.reader import ShardSet
from pipeline.checkpoints import store
from pipeline.config.keys import read_number
from pipeline.config.library import find_recipe
from pipeline.config.loading import load_yaml, parse_overrides
from pipeline.config.schema import Recipe, load_recipe

KEYS = ("about", "recipe", "seeds", "overrides", "runs", "grid", "context_curve", "fresh", "held_out")
OURS = ("seed", "output_dir")  # recipe keys that the sweep itself sets
OWN = ("recipe", "after", "operations", "held_out")  # keys of a run that are no recipe keys
SAMPLE = 32  # bins whose multiply-adds per token stand for those of a run


@dataclass(frozen=True)
class Job:
    """One run of a sweep with one seed.

    overrides: the recipe keys that this run changes. after: the run of the SentenceVAE that it starts from.
    operations: the multiply-adds that it may need, the SentenceVAE's included; they set its tokens. cell: its
    place in the grid. contexts: context lengths that are measured. fresh: it may see no token twice.
    held_out: shards that are scored too, on which nothing is chosen.
    """

    name: str
    seed: int
    folder: Path
    recipe: Recipe
    overrides: dict[str, Any]
    after: Job | None = None
    operations: float | None = None
    cell: dict[str, str] = field(default_factory=dict)
    contexts: tuple[int, ...] = ()
    fresh: bool = False
    held_out: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name}-s{self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.folder / self.key

    @property
    def model(self) -> Path:
        return self.folder / "models" / self.key

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.key}.log"

    @property
    def row_file(self) -> Path:
        return self.folder / "rows" / f"{self.key}.json"

    def row(self) -> dict[str, Any] | None:
        """Its row, if it is done: trained to the end on these shards, and evaluated on this text."""
        meta = self.trained()
        if meta is None or not self.row_file.is_file():
            return None
        row = read_json(self.row_file)
        data = self.recipe.data
        same = (
            row["checkpoint"] == store.step_name(meta.step)
            and meta.shards == [_fingerprint(folder) for folder in data.shards]
            and row["evaluation"]["shards_fingerprint"] == _fingerprint(data.validation)
            and row.get("contexts", []) == list(self.contexts)
            and (row.get("held_out") or {}).get("shards_fingerprint")
            == (_fingerprint(self.held_out) if self.held_out else None)
        )
        return row if same else None

    def trained(self) -> store.Meta | None:
        """The checkpoint at the run's end, if there is one."""
        found = store.newest_whole(self.run_dir)
        meta = found[1] if found else None
        return meta if meta and self.recipe.training.progress(meta.step, meta.tokens) >= 1 else None

    def require_same(self) -> None:
        """Refuse (UserError) a run directory of another recipe, or of another SentenceVAE."""
        before = self.run_dir / "recipe.yaml"
        if not before.is_file():
            return
        was, now = (_what_is_trained(self, recipe) for recipe in (load_recipe(before), self.recipe))
        wrong = store.first_difference(was, now)
        if not wrong and self.after and not self.after.trained():
            wrong = f"it started from another run of {self.after.key}"
        if wrong:
            raise UserError(
                f"{self.run_dir} is of another sweep ({wrong}): remove it, or choose another --output"
            )


def _what_is_trained(job: Job, recipe: Recipe) -> dict[str, Any]:
    """A recipe without what may change between two calls. Shards are compared by content in `Job.row`."""
    values = recipe.to_dict()
    for key in ("output_dir", "log"):
        del values[key]
    for key in ("shards", "validation"):
        del values["data"][key]
    if job.after:
        values["model"].pop("vae")
    return values


@functools.cache
def _fingerprint(folder: str) -> str:
    return ShardSet.open(folder).fingerprint


# From a sweep file to jobs --------------------------------------------------------------------------------


def read_sweep(path: Path, folder: Path, overrides: Sequence[str] = ()) -> list[Job]:
    """The jobs of a sweep file in its order, with checked recipes. overrides: from the command line, for all
    runs; they take precedence.

    Raises: UserError for a wrong file, key or recipe, with the run's name.
    """
    try:
        sweep = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"sweep {path} cannot be read: {error}") from None
    if not isinstance(sweep, dict) or not (sweep.get("runs") or sweep.get("grid")):
        raise UserError(f"sweep {path}: needs `runs`, a mapping of names to changed recipe keys")
    if unknown := [key for key in sweep if key not in KEYS]:
        raise UserError(f"sweep {path}: unknown key {unknown[0]!r}: known keys are {', '.join(KEYS)}")
    seeds = sweep.get("seeds")
    if seeds is not None and not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
        raise UserError(f"sweep {path}: seeds must be a list of whole numbers, not {seeds!r}")
    for key, _ in parse_overrides(list(overrides)):
        if key in OURS:
            raise UserError(f"--{key}: the sweep sets it itself (`seeds` in {path}, --output)")
    if sorted(set(seeds or ())) != sorted(seeds or ()):
        raise UserError(f"sweep {path}: {seeds} has a seed twice")

    contexts = sweep.get("context_curve") or ()
    if not isinstance(contexts, (list, tuple)) or any(type(n) is not int or n < 1 for n in contexts):
        raise UserError(f"sweep {path}: context_curve must be a list of numbers of tokens, not {contexts!r}")
    jobs: dict[str, list[Job]] = {}
    runs, cells = _cells(path, sweep)
    for name, settings in _in_order(path, runs):
        where = f"sweep {path}, run {name}"
        own = {key: value for key, value in settings.items() if key not in OWN}
        operations = read_number(settings.get("operations"))
        if operations is not None and not (type(operations) in (int, float) and operations > 0):
            raise UserError(f"{where}: operations must be a number above 0, not {operations!r}")
        held_out = settings.get("held_out", sweep.get("held_out"))
        if held_out is not None and not isinstance(held_out, str):
            raise UserError(f"{where}: held_out must be a shard folder, not {held_out!r}")
        common = sweep.get("overrides") or {}
        file = settings.get("recipe", sweep.get("recipe"))
        if file is None:
            raise UserError(f"{where}: neither it nor the sweep names a recipe")
        if mine := [key for key in OURS if key in {**common, **own}]:
            raise UserError(f"{where}: {mine[0]} is set by the sweep itself (`seeds`, --output)")
        texts = [f"--{key}={json.dumps(value)}" for key, value in {**common, **own}.items()] + [*overrides]
        before = {job.seed: job for job in jobs[settings["after"]]} if "after" in settings else {}
        try:
            jobs[name] = []
            for seed in seeds or [load_recipe(find_recipe(file, path.parent), texts).seed]:
                if before and seed not in before:
                    raise UserError(f"{settings['after']} has another seed: name `seeds` in the sweep")
                after = before.get(seed)
                fixed = [f"--seed={seed}", f"--output_dir={folder / f'{name}-s{seed}'}"]
                fixed += [f"--model.vae.path={after.model}"] if after else []
                recipe = load_recipe(find_recipe(file, path.parent), texts + fixed)
                if not recipe.data.validation:
                    raise UserError("needs validation shards: --data.validation SHARDS")
                if after and (recipe.objective, after.recipe.objective) != ("sllm", "vae"):
                    raise UserError("`after` is for an SLLM that starts from a SentenceVAE of this sweep")
                measured = () if recipe.objective == "vae" else tuple(contexts)
                scored = None if recipe.objective == "vae" else held_out
                place = operations, cells[name], measured, bool(sweep.get("fresh")), scored
                jobs[name].append(Job(name, seed, folder, recipe, own, after, *place))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return [job for name in runs for job in jobs[name]]


def _cells(path: Path, sweep: dict[str, Any]) -> tuple[dict[Any, Any], dict[Any, dict[str, str]]]:
    """Every run in every cell of the grid, by name: its settings, and the labels of its cell."""
    grid, runs = sweep.get("grid") or {}, sweep.get("runs") or {"": {}}
    sound = isinstance(grid, dict) and all(isinstance(axis, dict) and axis for axis in grid.values())
    if not sound or not all(isinstance(one, dict) for axis in grid.values() for one in axis.values()):
        raise UserError(f"sweep {path}: grid must map axes to labels, and labels to changed recipe keys")
    if not isinstance(runs, dict):
        raise UserError(f"sweep {path}: needs `runs`, a mapping of names to changed recipe keys")
    if not grid:
        return {name: settings or {} for name, settings in runs.items()}, {name: {} for name in runs}
    found, cells = {}, {}
    for labels in itertools.product(*(axis for axis in grid.values())):
        changes = [axis[label] for axis, label in zip(grid.values(), labels, strict=True)]
        for run, settings in runs.items():
            name = "-".join(str(part) for part in (run, *labels) if part != "")
            merged = {key: value for change in (*changes, settings or {}) for key, value in change.items()}
            if "after" in merged:
                merged["after"] = "-".join(map(str, (merged["after"], *labels)))
            found[name] = merged
            cells[name] = dict(zip(grid, map(str, labels), strict=True))
    return found, cells


def _in_order(path: Path, runs: dict[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings; runs that others start from come first."""
    for name, settings in runs.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"sweep {path}: run {name!r}: a name is text of letters, digits, '.', '_', '-'")
        if not isinstance(settings, dict):
            raise UserError(f"sweep {path}, run {name}: must be a mapping of recipe keys to values")
        before = settings.get("after")
        if before is not None and (before not in runs or "after" in runs[before]):
            raise UserError(
                f"sweep {path}, run {name}: after {before!r} names no run of this sweep that starts by itself"
            )
    yield from sorted(runs.items(), key=lambda item: "after" in item[1])


def require_held_out(jobs: Iterable[Job]) -> None:
    """Raises: UserError for held-out shards that a run could not be scored on after its training."""
    tokenizer = functools.cache(lambda folder: ShardSet.open(folder).tokenizer().fingerprint)
    for job in jobs:
        if job.held_out and tokenizer(job.held_out) != tokenizer(job.recipe.data.shards[0]):
            raise UserError(
                f"{job.key}: held_out {job.held_out} has another tokenizer than {job.recipe.data.shards[0]}"
            )


# Budgets --------------------------------------------------------------------------------------------------


def with_budgets(jobs: Sequence[Job], wanted: Collection[str]) -> list[Job]:
    """The same jobs; of those whose key is `wanted`, with `training.max_tokens` where a budget of operations
    sets it. The others need no shards.

    Raises: UserError for a budget that is too small, or one that would show a `fresh` run a token twice.
    """
    made: dict[str, Job] = {}
    for job in sorted(jobs, key=lambda job: job.after is not None):
        after = made[job.after.key] if job.after else None
        if job.key not in wanted or not (job.operations or job.fresh):
            made[job.key] = dataclasses.replace(job, after=after)
            continue
        recipe = job.recipe.model_copy(deep=True)
        if job.operations is not None:
            left = job.operations
            if after:
                left -= operations_per_token(after.recipe) * (after.recipe.training.max_tokens or 0)
            each = operations_per_token(recipe, after.recipe.model.vae if after else None)
            if left < each:
                raise UserError(f"{job.key}: nothing of {job.operations:g} operations is left to train with")
            recipe.training.max_tokens, recipe.training.max_steps = int(left / each), None
        held = sum(ShardSet.open(folder).manifest["totals"]["tokens"] for folder in recipe.data.shards)
        tokens = recipe.training.max_tokens or math.inf
        if job.fresh and tokens > held:
            raise UserError(
                f"{job.key}: its shards hold {counted(held, 'token')} of the {tokens:,} that it trains on, "
                "and `fresh` allows each one once: prepare more text, or lower its budget"
            )
        made[job.key] = dataclasses.replace(job, recipe=recipe, after=after)
    return [made[job.key] for job in jobs]


def operations_per_token(recipe: Recipe, vae: dict[str, Any] | None = None) -> float:
    """Multiply-adds that training needs per token, forward, backward and Muon's update, by the first bins of
    the run: without padding and without what attention masks.

    vae: the sizes of a SentenceVAE that is not there yet.
    """
    import torch

    from pipeline.data.batch import build_batch
    from pipeline.data.plan import BinPlan
    from pipeline.models.factory import new_model
    from pipeline.models.flops import TRAINING_FACTOR, StepArithmetic
    from pipeline.training.muon import update_operations
    from pipeline.training.optimizer import parameter_groups

    data, sets = recipe.data, [ShardSet.open(folder) for folder in recipe.data.shards]
    sized = recipe.model_copy(deep=True)
    sized.model.vae = dict(vae or recipe.model.vae)
    loads = sized.model.vae.get("path") or sized.model.backbone.get("path")
    with torch.device("cpu" if loads else "meta"):
        model = new_model(sized, sets[0].tokenizer(), sets[0].settings.to_dict())
    arithmetic = StepArithmetic(model)
    by_rule = recipe.model.ends == "rule"
    plan = BinPlan(sets, data.window_tokens, data.bin_tokens, recipe.seed, data.weights, by_rule=by_rule)
    batches = [build_batch(plan.spans(bin_)) for bin_ in itertools.islice(plan.bins(), SAMPLE)]
    needed = sum(arithmetic.needed(batch) for batch in batches)
    each = TRAINING_FACTOR * needed / sum(batch.tokens for batch in batches)
    if recipe.optimizer.kind == "muon":
        parameter_groups(model, recipe.optimizer)  # freezes what the recipe freezes
        each += update_operations(model) / (data.bin_tokens * data.bins_per_step)
    return each
