"""The files of a training run's folder, read."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError
from pipeline.training.run_log import EVALUATIONS, METRICS, SAVES, STARTS, read_records


@dataclass(frozen=True)
class Run:
    """One run directory's files. `name` tells it from the other runs of the report."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    deepspeed: dict[str, Any]
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    saves: list[dict[str, Any]]
    starts: list[dict[str, Any]]

    @functools.cached_property
    def positions(self) -> dict[str, list[float | None]]:
        """By axis, where each step stands on it; None where its lines do not say."""
        beside: dict[int, float] = {}  # seconds of saving and evaluating after a step
        for row in (*self.saves, *self.evaluations):
            seconds = row.get("save_seconds", row.get("seconds")) or 0.0
            beside[row["step"]] = beside.get(row["step"], 0.0) + seconds
        waits = [0.0, *(beside.get(row["step"], 0.0) for row in self.metrics[:-1])]
        seconds = [row["seconds"] + wait for row, wait in zip(self.metrics, waits, strict=True)]
        known = all("operations" in row for row in self.metrics)
        operations = itertools.accumulate(row["operations"] for row in self.metrics) if known else None
        return {
            "steps": [row["step"] for row in self.metrics],
            "tokens": [row["tokens"] / 1e6 for row in self.metrics],
            "time": [total / 3600 for total in itertools.accumulate(seconds)],
            "operations": [n / 1e12 for n in operations] if operations else [None] * len(self.metrics),
        }

    def place(self, axis: str, step: int) -> float | None:
        """Where the end of `step` stands on an axis; None for a step that no line is about."""
        row = self._rows.get(step)
        return None if row is None else self.positions[axis][row]

    @functools.cached_property
    def _rows(self) -> dict[int, int]:
        return {row["step"]: number for number, row in enumerate(self.metrics)}

    def values(self, key: str) -> list[float]:
        """A figure of every step that has it."""
        return [row[key] for row in self.metrics if row.get(key) is not None]

    def skipped(self) -> list[tuple[int, str]]:
        """(step, reason) of every step that was not applied."""
        return [(row["step"], str(row["skipped"])) for row in self.metrics if row.get("skipped")]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read run directories.

    Raises: UserError for a folder that is no run directory, or whose run has made no step.
    """
    paths = [Path(folder) for folder in folders]
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    return [_read_run(name, path) for name, path in zip(names, paths, strict=True)]


def _read_run(name: str, folder: Path) -> Run:
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} is no run directory: it has no {METRICS}")
    metrics = read_records(folder / METRICS)
    if not metrics:
        raise UserError(f"{folder / METRICS} has no whole line: the run has made no step yet")
    return Run(
        name,
        folder,
        _read(folder / "recipe.yaml", yaml.safe_load),
        _read(folder / "ds_config.json", json.loads),
        _read(folder / "provenance.json", json.loads),
        metrics,
        *(read_records(folder / file) for file in (EVALUATIONS, SAVES, STARTS)),
    )


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file's mapping; empty when there is none. UserError when it does not parse."""
    try:
        return parse(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def training_text(run: Run) -> str:
    """The shards that a run reads, by content: equal for equal text."""
    return json.dumps([one.get("fingerprint") for one in run.provenance.get("shards", [])])


def validation_sample(run: Run) -> list[Any]:
    """What decides on which text the evaluations of a run were made: equal for equal samples."""
    data, training = run.recipe.get("data", {}), run.recipe.get("training", {})
    prints = [one.get("fingerprint") for one in run.provenance.get("validation", [])]
    return [prints, data.get("window_tokens"), data.get("bin_tokens"), training.get("eval_bins")]
