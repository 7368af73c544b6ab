"""Ends a rank that hangs, and writes down what it was doing."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from pipeline.parallel.signals import HUNG

LAST_WORDS_SECONDS = 3.0  # between a hung rank's stacks and its end
STACKS = "stacks"  # folder in the run directory: what each rank was doing when it hung
STACKS_BEFORE = "stacks-before"  # the same, of the last start that hung before this one


class Watchdog:
    """Ends this process when nothing was finished for `seconds`: stacks of all its threads in
    RUN/stacks/rank-N.txt, one line to standard error, exit status 76 (`launch.HUNG`).

    Every rank has its own, because one that hangs makes all others wait; without `seconds` it never acts.
    Between stacks and end it waits for LAST_WORDS_SECONDS: the first rank's end breaks the collective that
    the others wait in, and they would leave with that error before they have written theirs. Use as a
    context manager, from before the ranks meet: one that never comes is waited for like one that hangs.
    `beat(what)` says what was finished.
    """

    def __init__(self, run_dir: Path, rank: int, seconds: float | None):
        self._file, self._rank, self._seconds = run_dir / STACKS / f"rank-{rank}.txt", rank, seconds
        self._ended = threading.Event()
        self._last, self._finished = time.monotonic(), ""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat("the start")
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds is not None:
            self._thread.join()

    def beat(self, finished: str) -> None:
        self._last, self._finished = time.monotonic(), finished

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._last > self._seconds:
                self._give_up()

    def _give_up(self) -> None:
        said = f"rank {self._rank}: nothing finished since {self._finished}, for {self._seconds:g} s "
        said += "(health.hang_seconds)"
        try:  # the disk may be what hangs or is full: end all the same
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            said += f": stacks in {self._file}"
        except OSError:
            pass
        print(said, file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(HUNG)
