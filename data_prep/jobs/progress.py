"""The progress of a run of `data-prep shard` over all its processes, and its display."""

from __future__ import annotations

import json
import os
import time
from typing import Any, TextIO

from data_prep.jobs.executor import RECORD
from data_prep.jobs.job import Job

LOG_SECONDS = 10.0
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """The counts of all processes, read from the work folder by `update`.

    done, total: bytes of input, over all phases; documents, rejected: in the current phase; documents_rate:
    per second, in this phase and since this object was made.
    """

    def __init__(self, job: Job):
        self.work, self._board = job.work, job.work_folder()
        sizes = [job.unit_bytes(unit) for unit in range(len(job.units))]
        units = range(len(sizes)) if job.only is None else job.only
        self._names = (["hash"] if job.settings.deduplicate else []) + ["shard"]
        self._counts: dict[tuple[str, int], dict] = {}
        self._phase_started = time.monotonic()
        self._first_documents = 0
        self._phase: str | None = None
        self.done = self.documents = self.rejected = 0
        self.total = sum(sizes[unit] for unit in units) * len(self._names)

    @property
    def documents_rate(self) -> float:
        fresh = self.documents - self._first_documents
        return fresh / max(time.monotonic() - self._phase_started, 1e-3)

    def update(self) -> None:
        """Read the work folder again."""
        if self._board.is_finished():
            self.done = self.total
            return
        running = {(phase, unit): claim for phase, unit, claim in self._board.locks()}
        self.done = 0
        for name in self._names:
            finished = self._board.done(name)
            here = [self._count(name, unit) for unit in finished]
            here += [c for (phase, unit), c in running.items() if phase == name and unit not in finished]
            self.done += sum(count.get("bytes", 0) for count in here)
            if here:
                self.documents = sum(count.get("documents", 0) for count in here)
                self.rejected = sum(count.get("rejected", 0) for count in here)
                if name != self._phase:
                    self._phase, self._phase_started = name, time.monotonic()
                    self._first_documents = self.documents

    def _count(self, phase: str, unit: int) -> dict:
        if (phase, unit) not in self._counts:
            try:
                record = json.loads((self._board.result(phase, unit) / RECORD).read_bytes())
            except (FileNotFoundError, ValueError):  # tidied up, or cut short by a crash
                return {}
            self._counts[phase, unit] = record["counts"]
        return self._counts[phase, unit]


class ProgressLine:
    """`report` for `make_shards`: a bar on a terminal, a plain line every ten seconds in a log."""

    def __init__(self, stream: TextIO, label: str = "data-prep shard"):
        self._stream, self._label = stream, label
        self._bar: Any = None
        self._printed = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        live = self._stream.isatty()
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._label,
                total=progress.total,
                initial=progress.done,
                unit="B",
                unit_scale=True,
                smoothing=0,
                file=self._stream if live else open(os.devnull, "w"),
                bar_format=None if live else LOG_FORMAT,
            )
        self._bar.total = progress.total
        counts = f"{progress.documents:,} documents ({progress.documents_rate:,.0f}/s)"
        self._bar.set_postfix_str(f"{counts}, {progress.rejected:,} rejected", refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if not live and time.monotonic() - self._printed >= LOG_SECONDS:
            self._printed = time.monotonic()
            print(self._bar, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
