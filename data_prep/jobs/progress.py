"""How far a run of `data-prep shard` is, whoever does the work, and the line that tells it.

In: a `Job`, whose board is read. Out: numbers, and a bar on a terminal or plain lines in a log. Called by
`sharding.py` and `cli.py`.
"""

from __future__ import annotations

import json
import time

from data_prep.jobs.executor import RECORD
from data_prep.jobs.job import Job


class Progress:
    """How far the whole run is, whoever does the work: read from the board, `update` by `update`.

    done, total: bytes of input, over all phases; documents, rejected: in the phase under way; bytes_rate and
    documents_rate: per second, over what has been done since this object, or the phase, began.
    """

    def __init__(self, job: Job):
        self.work, self._board = job.work, job.work_folder()
        sizes = [job.unit_bytes(unit) for unit in range(len(job.units))]
        units = range(len(sizes)) if job.only is None else job.only
        self._names = (["hash"] if job.settings.deduplicate else []) + ["shard"]
        self._counts: dict[tuple[str, int], dict] = {}
        self._began = self._phase_began = time.monotonic()
        self._first: int | None = None  # bytes done when we first looked
        self._first_documents = 0
        self._phase: str | None = None
        self.done = self.documents = self.rejected = 0
        self.total = sum(sizes[unit] for unit in units) * len(self._names)

    @property
    def bytes_rate(self) -> float:
        return (self.done - (self._first or 0)) / max(time.monotonic() - self._began, 1e-3)

    @property
    def documents_rate(self) -> float:
        fresh = self.documents - self._first_documents
        return fresh / max(time.monotonic() - self._phase_began, 1e-3)

    def update(self) -> None:
        """Look at the board again."""
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
                    self._phase, self._phase_began = name, time.monotonic()
                    self._first_documents = self.documents
        if self._first is None:
            self._first = self.done

    def _count(self, phase: str, unit: int) -> dict:
        if (phase, unit) not in self._counts:
            try:
                record = json.loads((self._board.result(phase, unit) / RECORD).read_bytes())
            except (FileNotFoundError, ValueError):  # tidied up, or cut short by a crash
                return {}
            self._counts[phase, unit] = record["counts"]
        return self._counts[phase, unit]


class ProgressLine:
    """`report` for `sharding.make_shards`: a live line on a terminal, else a plain line every ten seconds."""

    def __init__(self, stream: object, label: str = "data-prep shard"):
        self._stream, self._label = stream, label
        self._bar = None
        self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if self._stream.isatty():
            if self._bar is None:
                from tqdm import tqdm

                shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}B{postfix}"
                options = {"unit_scale": True, "desc": self._label, "bar_format": shape}
                self._bar = tqdm(total=progress.total, file=self._stream, **options)
            self._bar.set_postfix_str(_said(progress), refresh=False)
            self._bar.update(progress.done - self._bar.n)
        elif time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            line = f"{self._label}: {progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB read, "
            print(line + _said(progress), file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _said(progress: Progress) -> str:
    speed = progress.bytes_rate
    left = f", {_duration((progress.total - progress.done) / speed)} left" if speed > 1 else ""
    return (
        f"{progress.documents:,} documents ({progress.documents_rate:,.0f}/s), {speed / 1e6:.1f} MB/s, "
        f"{progress.rejected:,} rejected{left}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    )
