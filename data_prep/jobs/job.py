"""One run of `data-prep shard`, as all of its processes know it: settings, input, units, folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.common.progress import Progress, Report
from data_prep.common.results import WorkFolder
from data_prep.corpus.finding import Survey
from data_prep.corpus.inputs import InputFile, Piece
from data_prep.corpus.limits import Limits
from data_prep.shards.layout import MANIFEST, UNFINISHED
from data_prep.shards.manifest import missing_units
from data_prep.shards.reader import ShardSet
from data_prep.shards.settings import ShardSettings


@dataclass(frozen=True)
class Job:
    """One run. `only`: the units to shard again when a finished set is repaired; None for all units."""

    output: Path
    settings: ShardSettings
    facts: dict  # the manifest's format version, settings and tokenizer
    found: Survey
    units: dict[int, list[Piece]]
    tokenizer: Path  # folder
    limits: Limits = Limits()
    only: tuple[int, ...] | None = None

    @property
    def files(self) -> list[InputFile]:
        return self.found.files

    @property
    def work(self) -> Path:
        return self.output / UNFINISHED

    def unit_bytes(self, unit: int) -> int:
        """Bytes of input of a unit, as stored."""
        return sum(piece.size for piece in self.units[unit])

    def work_folder(self) -> WorkFolder:
        """Results of the run."""
        if self.only is None:
            return WorkFolder(self.work, (self.output / MANIFEST).is_file)
        manifest = ShardSet.open(self.output).manifest
        return WorkFolder(self.work, lambda: not missing_units(self.output, manifest) & set(self.only))

    def progress(self, report: Report) -> Progress:
        """The progress of the whole run, over all its processes."""
        phases = (["hash"] if self.settings.compares else []) + ["shard"]
        total = sum(map(self.unit_bytes, self.units if self.only is None else self.only))
        return Progress(self.work_folder(), phases, total * len(phases), report)

    def tasks(self, phase: str, units: Iterable[int]) -> list[Task]:
        """Units of one phase, each with the part of the job that it needs."""
        part = replace(
            self, output=self.output.absolute(), tokenizer=self.tokenizer.absolute(), found=Survey()
        )
        return [Task(replace(part, units={unit: self.units.get(unit, [])}), phase, unit) for unit in units]


@dataclass(frozen=True)
class Task:
    """One unit of one phase, as it is sent to the process that runs it."""

    job: Job
    phase: str
    unit: int

    @property
    def name(self) -> str:
        """Its input, for messages."""
        if self.phase == "seen":
            return f"shard {self.unit} of the sets that were seen"
        first, *more = self.job.units[self.unit]
        return f"{first.file.name} from {first.start:,}" + (f" and {len(more)} more" if more else "")

    def is_started(self) -> bool:
        """Whether a process has started it and has not published it."""
        return any(unit == self.unit for unit, _ in self.job.work_folder().staging(self.phase))
