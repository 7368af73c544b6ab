"""Reads the files of a run directory; every report of runs goes through here."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError
from data_prep.common.files import read_json
from pipeline.config.deepspeed_config import DEEPSPEED_CONFIG
from pipeline.training.provenance import PROVENANCE
from pipeline.training.run_log import EVALUATIONS, METRICS, SAVES, STARTS, read_records


@dataclass(frozen=True)
class Run:
    """A run directory's files, each read when first used; empty where there is none. UserError for one that
    does not parse. `name` is unique among the runs of a report."""

    folder: Path
    name: str = ""

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        path = self.folder / "recipe.yaml"
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            return {}
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} cannot be read ({error})") from None

    @functools.cached_property
    def deepspeed(self) -> dict[str, Any]:
        return read_json(self.folder / DEEPSPEED_CONFIG, default={})

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.folder / PROVENANCE, default={})

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_records(self.folder / METRICS)

    @functools.cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return read_records(self.folder / EVALUATIONS)

    @functools.cached_property
    def saves(self) -> list[dict[str, Any]]:
        return read_records(self.folder / SAVES)

    @functools.cached_property
    def starts(self) -> list[dict[str, Any]]:
        return read_records(self.folder / STARTS)

    @functools.cached_property
    def positions(self) -> dict[str, list[float | None]]:
        """By axis, each step's coordinate at its end; None where the records do not have it."""
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
        """A step's coordinate on an axis; None for a step without a record."""
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
    runs = [Run(path, name) for name, path in zip(names, paths, strict=True)]
    for run in runs:
        if not (run.folder / METRICS).is_file():
            raise UserError(f"{run.folder} is no run directory: it has no {METRICS}")
        if not run.metrics:
            raise UserError(f"{run.folder / METRICS} has no whole line: the run has made no step yet")
    return runs


def training_text(run: Run) -> str:
    """Fingerprints of a run's training shards: equal for equal text."""
    return json.dumps([one.get("fingerprint") for one in run.provenance.get("shards", [])])


def validation_sample(run: Run) -> list[Any]:
    """What determines the text of a run's evaluations: equal for equal samples."""
    data, training = run.recipe.get("data", {}), run.recipe.get("training", {})
    prints = [one.get("fingerprint") for one in run.provenance.get("validation", [])]
    return [prints, data.get("window_tokens"), data.get("bin_tokens"), training.get("eval_bins")]
