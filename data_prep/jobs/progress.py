"""The progress of a run of `data-prep shard` over all its processes, and its display."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from data_prep.jobs.job import Job
from data_prep.jobs.results import RECORD

LOG_SECONDS = 10.0
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """The counts of all processes, read from the work folder by `update`.

    done, total: bytes of input, over all phases; documents, rejected: in the current phase; documents_rate:
    per second, in this phase and since this object was made.
    """

    def __init__(self, job: Job):
        self._work = job.work_folder()
        units = job.units if job.only is None else job.only
        self._names = (["hash"] if job.settings.deduplicate else []) + ["shard"]
        self._finished: dict[tuple[str, int], dict] = {}
        self._phase_started = time.monotonic()
        self._first_documents = 0
        self._phase: str | None = None
        self.done = self.documents = self.rejected = 0
        self.total = sum(map(job.unit_bytes, units)) * len(self._names)

    @property
    def documents_rate(self) -> float:
        fresh = self.documents - self._first_documents
        return fresh / max(time.monotonic() - self._phase_started, 1e-3)

    def update(self) -> None:
        """Read the work folder again."""
        if self._work.is_finished():
            self.done = self.total
            return
        self.done = 0
        for name in self._names:
            counts = {unit: _counts(folder) for unit, folder in self._work.staging(name)}
            for unit in self._work.done(name):
                if not self._finished.get((name, unit)):
                    self._finished[name, unit] = _counts(self._work.result(name, unit))
                counts[unit] = self._finished[name, unit]
            self.done += sum(count.get("bytes", 0) for count in counts.values())
            if counts:
                self.documents = sum(count.get("documents", 0) for count in counts.values())
                self.rejected = sum(count.get("rejected", 0) for count in counts.values())
                if name != self._phase:
                    self._phase, self._phase_started = name, time.monotonic()
                    self._first_documents = self.documents


def _counts(folder: Path) -> dict:
    try:
        return json.loads((folder / RECORD).read_bytes())["counts"]
    except (OSError, ValueError):  # removed, being written, or cut short by a crash
        return {}


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
