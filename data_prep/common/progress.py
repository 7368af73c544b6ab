"""The progress of all processes that publish results in one work folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.common.results import RECORD, WorkFolder

REPORT_SECONDS = 0.5

Report = Callable[["Progress"], None]


class Progress:
    """The counts of all processes, read from the work folder. Called regularly, it calls `report(self)`.

    phases: those that are counted, in order. done, total: bytes of input, over all phases; documents and
    rejected: in the current phase; documents_rate: per second, in this phase and since this object was made.
    """

    def __init__(self, work: WorkFolder, phases: list[str], total: int, report: Report):
        self._work, self._names, self._report = work, phases, report
        self._finished: dict[tuple[str, int], dict] = {}
        self._phase_started = self._reported = time.monotonic()
        self._first_documents = 0
        self._phase: str | None = None
        self.done = self.documents = self.rejected = 0
        self.total = total

    @property
    def documents_rate(self) -> float:
        fresh = self.documents - self._first_documents
        return fresh / max(time.monotonic() - self._phase_started, 1e-3)

    def __call__(self, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._reported >= REPORT_SECONDS:
            self._read()
            self._report(self)
            self._reported = time.monotonic()

    def _read(self) -> None:
        if self._work.is_finished():
            self.done = self.total
            return
        self.done, phase, current = 0, None, []
        for name in self._names:
            counts = {unit: _counts(folder) for unit, folder in self._work.staging(name)}
            for unit in self._work.done(name):
                if not self._finished.get((name, unit)):
                    self._finished[name, unit] = _counts(self._work.result(name, unit))
                counts[unit] = self._finished[name, unit]
            self.done += sum(count.get("bytes", 0) for count in counts.values())
            if counts:
                phase, current = name, list(counts.values())
        self.documents = sum(count.get("documents", 0) for count in current)
        self.rejected = sum(count.get("rejected", 0) for count in current)
        if phase != self._phase:
            self._phase, self._phase_started = phase, time.monotonic()
            self._first_documents = self.documents


def _counts(folder: Path) -> dict:
    try:
        return json.loads((folder / RECORD).read_bytes())["counts"]
    except (OSError, ValueError):  # removed, being written, or cut short by a crash
        return {}
