"""`sllm compare RUN_DIR…`: SLLMs and token-level models at equal budgets, in one table and on one page.

The result is a dictionary of plain figures; compare_page.py makes the page of it (docs/evaluation.md).

A budget is tokens, seconds of steps (without evaluating and saving) or multiply-adds (forward and backward,
padding included). What a SentenceVAE has cost counts as its SLLM's, in all three. Every run's validation
curve is read at the largest budget that all of them reach, in a straight line between the evaluations on both
sides; nothing is extrapolated. torch is imported only where models are given.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common import charts
from data_prep.common.environment import require_folder
from data_prep.common.errors import UserError, counted
from data_prep.common.files import read_json, write_atomically
from data_prep.common.page import to_html, to_text
from pipeline.common.text import duration
from pipeline.research.compare_page import BUDGETS, compose, table
from pipeline.training.run_files import Run, read_runs, training_text, validation_sample

EVALUATED = (
    "bits_per_byte",
    "bits_per_byte_interval",
    "bits_per_byte_without_vectors",
    "vector_gain",
    "vector_gain_interval",
    "ppl",
    "parameters",
    "bytes",
    "documents",
    "data",
    "data_fingerprint",
    "window_tokens",
)
# What two measurements of speed must have in common.
CONDITIONS = ("cpu", "gpu", "device", "threads", "dtype", "sentences", "sentence_tokens")
NEARLY = 0.95  # of its length or of the other's time: a run that was read earlier gets a note


@dataclass(frozen=True)
class Candidate:
    """A run, and the run of the SentenceVAE that it starts from."""

    run: Run
    vae: Run | None

    @functools.cached_property
    def vae_cost(self) -> dict[str, float]:
        """By budget, what the SentenceVAE's whole run has cost; 0 where there is none."""
        if self.vae is None:
            return dict.fromkeys(BUDGETS, 0.0)
        return {budget: costs[-1] for budget, costs in _costs(self.vae).items()}

    @functools.cached_property
    def costs(self) -> dict[str, dict[int, float]]:
        """By budget and step, what has been spent at the step's end, the SentenceVAE included."""
        steps = [row["step"] for row in self.run.metrics]
        return {
            budget: {step: self.vae_cost[budget] + cost for step, cost in zip(steps, costs, strict=True)}
            for budget, costs in _costs(self.run).items()
            if budget in self.vae_cost
        }

    def spent(self, step: int) -> dict[str, float | None]:
        """By budget, what had been spent at the end of a step; None for a step of which no line tells."""
        return {budget: self.costs.get(budget, {}).get(step) for budget in BUDGETS}

    @functools.cached_property
    def measured(self) -> list[dict[str, Any]]:
        """The evaluations that have a figure, in order."""
        rows = self.run.evaluations
        return [r for r in rows if r.get("bits_per_byte") is not None and r["step"] in self._tokens]

    @functools.cached_property
    def _tokens(self) -> dict[int, int]:
        """By step, tokens of the run itself."""
        return {row["step"]: row["tokens"] for row in self.run.metrics}

    def progress(self, step: int) -> float:
        """Share of its own planned length that the run has done after a step."""
        training = self.run.recipe.get("training", {})
        ends = ((step, training.get("max_steps")), (self._tokens[step], training.get("max_tokens")))
        return min(1.0, max((done / end for done, end in ends if end), default=1.0))


def _costs(run: Run) -> dict[str, list[float]]:
    """By budget, what a run by itself has spent at the end of each step, as far as its lines say it."""
    costs = {
        "tokens": [float(row["tokens"]) for row in run.metrics],
        "seconds": list(itertools.accumulate(row["seconds"] for row in run.metrics)),
    }
    if all(row.get("operations") is not None for row in run.metrics):
        costs["operations"] = list(itertools.accumulate(float(row["operations"]) for row in run.metrics))
    return costs


def compare(
    folders: Sequence[str | Path],
    output: str | Path,
    vae_runs: Sequence[str] = (),
    models: Sequence[str] = (),
    data: str | None = None,
    generation: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare these runs and write the page about them to `output`.

    Args:
        folders: run directories of the objectives `sllm` and `lm`. A run's name is its folder's (its path
            where two are called alike).
        vae_runs: `NAME=RUN_DIR`, the SentenceVAE's run of an SLLM.
        models: `NAME=FOLDER`, exports of these runs, evaluated here on `data` (default: the first run's
            validation shards).
        generation: `NAME=FILE`, results of `sllm benchmark generation`: an SLLM's figures are those of its
            `model`, a token-level model's those of what it was measured `against`.
    Returns: {"output", "runs": by name, "equal": by budget, "generation": conditions or None, "notes"}.
    Raises: UserError for runs that cannot be compared, or files that do not belong to them.
    """
    output = Path(output)
    require_folder(str(output))
    charts.require()
    runs = read_runs(folders)
    candidates = _candidates(runs, vae_runs)
    names = list(candidates)
    exports, speed_files = _by_name("--model", models, names), _by_name("--generation", generation, names)
    conditions, speeds = _speeds(speed_files, candidates)  # before the models, which take long
    evaluated = _evaluate(exports, candidates, data or runs[0].recipe.get("data", {}).get("validation"))
    found = {
        name: {
            "run": str(one.run.folder),
            "objective": one.run.recipe["objective"],
            "vae_run": str(one.vae.folder) if one.vae else None,
            "spent": one.spent(one.run.metrics[-1]["step"]),
            "spent_on_vae": {budget: one.vae_cost.get(budget) for budget in BUDGETS} if one.vae else None,
            "curve": [
                {"step": row["step"], **one.spent(row["step"]), "bits_per_byte": row["bits_per_byte"]}
                for row in one.measured
            ],
            "evaluated": evaluated.get(name),
            "gap_recovered": None,
            "generation": speeds.get(name),
        }
        for name, one in candidates.items()
    }
    _add_gaps(found)
    budgets = [budget for budget in BUDGETS if all(budget in one.costs for one in candidates.values())]
    equal = {budget: _at_equal(candidates, budget) for budget in budgets}
    result = {
        "output": str(output),
        "runs": found,
        "equal": equal,
        "generation": conditions,
        "notes": list(_notes(candidates, found, equal)),
    }
    write_atomically(output, to_html(" · ".join(names), list(compose(result))).encode())
    return result


# What is compared -------------------------------------------------------------------------------------------


def _candidates(runs: Sequence[Run], vae_runs: Sequence[str]) -> dict[str, Candidate]:
    """The runs by name, each with its SentenceVAE's. Raises: UserError where they cannot be compared."""
    if len({run.folder.resolve() for run in runs}) < max(2, len(runs)):
        raise UserError("sllm compare needs two or more different run directories")
    vae_runs_by_name = _by_name("--vae-run", vae_runs, [run.name for run in runs])
    found = {}
    for run in runs:
        objective = run.recipe.get("objective")
        if objective not in ("sllm", "lm"):
            raise UserError(
                f"{run.folder}: its objective is {objective}, but only `sllm` and `lm` predict text; "
                "a SentenceVAE's run goes with its SLLM's: --vae-run NAME=RUN_DIR"
            )
        path = run.recipe.get("model", {}).get("vae", {}).get("path") if objective == "sllm" else None
        if path and run.name not in vae_runs_by_name:
            raise UserError(
                f"{run.folder}: starts from the SentenceVAE {path}, whose training counts as well: "
                f"name its run with --vae-run {run.name}=RUN_DIR"
            )
        if run.name in vae_runs_by_name and not path:
            raise UserError(
                f"--vae-run {run.name}: this run starts from no SentenceVAE (no model.vae.path in its recipe)"
            )
        vae = None
        if path:
            [vae] = read_runs([vae_runs_by_name[run.name]])
            if vae.recipe.get("objective") != "vae":
                raise UserError(f"{vae.folder}: its objective is {vae.recipe.get('objective')}, not vae")
        found[run.name] = Candidate(run, vae)
        if not found[run.name].measured:
            raise UserError(f"{run.folder}: has no evaluation yet (data.validation, training.eval_every)")
    if len({json.dumps(validation_sample(run)) for run in runs}) > 1:
        raise UserError(
            "these runs were validated on different samples: train them with the same data.validation, "
            "data.window_tokens, data.bin_tokens and training.eval_bins"
        )
    return found


def _by_name(flag: str, texts: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` by name. Raises: UserError for another form, a name of no run, or one given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UserError(f"{flag} {text}: must be NAME=PATH")
        if name not in names:
            raise UserError(f"{flag} {text}: no run is called {name}; there are {', '.join(names)}")
        if name in found:
            raise UserError(f"{flag}: {name} is given twice")
        found[name] = path
    return found


def _at_equal(candidates: dict[str, Candidate], budget: str) -> dict[str, Any]:
    """Every run's bits per byte at the largest budget that all reach; None for one whose first evaluation
    comes later."""
    places = {
        name: [one.costs[budget][row["step"]] for row in one.measured] for name, one in candidates.items()
    }
    amount = min(costs[-1] for costs in places.values())
    found: dict[str, Any] = {}
    for name, one in candidates.items():
        costs = places[name]
        if amount < costs[0]:
            found[name] = None
            continue
        shares = [one.progress(row["step"]) for row in one.measured]
        values = [row["bits_per_byte"] for row in one.measured]
        found[name] = {
            "bits_per_byte": float(np.interp(amount, costs, values)),
            "progress": float(np.interp(amount, costs, shares)),
        }
    return {"amount": amount, "runs": found}


def _evaluate(
    exports: dict[str, str], candidates: dict[str, Candidate], data: str | None
) -> dict[str, dict[str, Any]]:
    """The figures of `sllm evaluate` of each export, and what its weights have cost."""
    if not exports:
        return {}
    from pipeline.evaluation.evaluate import evaluate  # torch: seconds that the runs' files alone do not need
    from pipeline.export.model_card import ORIGIN

    if not data:
        raise UserError("--model needs --data SHARDS: the runs' recipes name no validation shards")
    origins = {}
    for name, folder in exports.items():
        origins[name] = origin = read_json(Path(folder) / ORIGIN)
        recipe = candidates[name].run.recipe
        theirs = origin.get("recipe", {})
        if any(theirs.get(key) != recipe.get(key) for key in ("objective", "seed", "model")):
            raise UserError(f"--model {name}={folder}: is an export of another run")
    found = {}
    for name, folder in exports.items():
        figures = evaluate(folder, data=data, progress=True)
        step = origins[name]["step"]
        found[name] = {
            "model": folder,
            "step": step,
            "spent": candidates[name].spent(step),
            **{key: figures[key] for key in EVALUATED if key in figures},
        }
    return found


def _speeds(
    files: dict[str, str], candidates: dict[str, Candidate]
) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """The conditions that all were measured under (None without files), and the figures by name: those of the
    smallest batch and, with it, the shortest context that all files have, where an SLLM gains least."""
    if not files:
        return None, {}
    conditions: dict[str, Any] = {}
    points: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        result = read_json(file)
        side = "model" if candidates[name].run.recipe["objective"] == "sllm" else "against"
        if "points" not in result or side not in result:
            raise UserError(f"{file}: is no result of `sllm benchmark generation` with figures for {name}")
        if side == "model" and result.get("int8"):
            raise UserError(f"{file}: was measured with --int8; the bits per byte here are of whole weights")
        under = {key: result.get(key) for key in CONDITIONS}
        conditions = conditions or under
        if different := [key for key in CONDITIONS if under[key] != conditions[key]]:
            raise UserError(
                f"{file}: was measured under other conditions than the file before: {', '.join(different)}"
            )
        points[name] = {
            (point["batch"], point["context"]): point[side]
            for point in result["points"]
            if "refused" not in point[side]
        }
        held = result.get("held_per_token", {}).get(side)
        found[name] = {**result[side], "file": file, "held_bytes_per_token": held}
    common = set.intersection(*(set(places) for places in points.values()))
    if not common:
        raise UserError("--generation: the files have no batch and context in common")
    batch, context = min(common)
    for name, places in points.items():
        figures = places[batch, context]
        found[name] |= {
            "tokens_per_second": figures["tokens_per_second"]["median"],
            "first_sentence": figures["first_sentence"]["median"],
            "peak_bytes": figures.get("memory", {}).get("peak"),
            "cached_bytes_per_token": figures["cached_bytes_per_token"],
        }
    return {**conditions, "batch": batch, "context": context}, found


def _add_gaps(found: dict[str, dict[str, Any]]) -> None:
    """Of the way from an SLLM without sentence vectors to the best token-level model, what its vectors go."""
    evaluated = {name: one for name, one in found.items() if one["evaluated"]}
    baselines = {
        name: one["evaluated"]["bits_per_byte"] for name, one in evaluated.items() if one["objective"] == "lm"
    }
    if not baselines:
        return
    best = min(baselines, key=baselines.__getitem__)
    for one in evaluated.values():
        if one["objective"] == "sllm":
            without = one["evaluated"]["bits_per_byte_without_vectors"]
            whole, made_good = without - baselines[best], without - one["evaluated"]["bits_per_byte"]
            one["gap_recovered"] = {"share": made_good / whole if whole > 0 else None, "baseline": best}


def _notes(
    candidates: dict[str, Candidate], found: dict[str, dict[str, Any]], equal: dict[str, Any]
) -> Iterable[str]:
    """In words, what must be known before these figures are believed."""
    everyone = [run for one in candidates.values() for run in (one.run, one.vae) if run is not None]
    if len({training_text(run) for run in everyone}) > 1:
        yield "not all were trained on the same shards"
    machines = {
        json.dumps([run.provenance.get("device"), sorted({start.get("world") or 0 for start in run.starts})])
        for run in everyone
    }
    if len(machines) > 1:
        yield "they were trained on different devices or numbers of ranks: equal time is not equal hardware"
    for name, one in candidates.items():
        recipe = one.run.recipe
        for source in (recipe.get("init_from"), recipe.get("model", {}).get("backbone", {}).get("path")):
            if source:
                yield f"{name} starts from {source}, whose training is not counted"
    if "operations" not in equal:
        yield "not all runs have written down their operations"
    for budget, at in equal.items():
        word = BUDGETS[budget][0]
        early = [n for n, one in at["runs"].items() if one and one["progress"] < NEARLY]
        if early:
            yield (
                f"equal {word}: {', '.join(early)} is read before the end of its schedule; "
                "a run planned for this budget would be better"
            )
        if late := [name for name, one in at["runs"].items() if one is None]:
            yield f"equal {word}: {', '.join(late)} has no evaluation as early as where the shortest run ends"
    for name, figures in found.items():
        gap, evaluated, speed = (figures[key] for key in ("gap_recovered", "evaluated", "generation"))
        if gap and gap["share"] is None:
            yield f"gap recovered: no gap, {gap['baseline']} is no better than {name} without vectors"
        elif gap:
            ours, other = (found[key]["evaluated"]["spent"]["seconds"] for key in (name, gap["baseline"]))
            if ours and other and min(ours, other) < NEARLY * max(ours, other):
                yield (
                    f"gap recovered: not at equal time: {duration(ours)} ({name}), {duration(other)} "
                    f"({gap['baseline']})"
                )
        if evaluated and speed and evaluated["parameters"] != speed["parameters"]:
            yield (
                f"speed of {name}: measured on {speed['name']} with "
                f"{counted(speed['parameters'], 'parameter')}; "
                f"the model trained here has {evaluated['parameters']:,}"
            )


def format_comparison(result: dict[str, Any]) -> str:
    """The result of `compare` as text."""
    lines = [to_text(table(result)), "", *(f"note: {note}" for note in result["notes"])]
    lines.append(f"wrote {result['output']}")
    return "\n".join(lines)
