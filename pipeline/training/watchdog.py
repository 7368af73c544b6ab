"""Ends a rank that hangs, after writing its stacks."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from pipeline.parallel.signals import HUNG

EXIT_DELAY_SECONDS = 3.0  # between a hung rank's stacks and its exit
STACKS = "stacks"  # folder in the run directory: each rank's stacks when it hung
STACKS_BEFORE = "stacks-before"  # the same, of the last earlier start that hung


class Watchdog:
    """Ends this process after `seconds` without a heartbeat: writes the stacks of all threads to
    RUN/stacks/rank-N.txt and one line to standard error, and exits with status 76 (`HUNG`).

    Every rank has its own, because one that hangs makes all others wait; without `seconds` it never acts. It
    waits for EXIT_DELAY_SECONDS before it exits: the first rank's end breaks the collective in which the
    others wait, and they must have written their stacks by then. Use it as a context manager, from before the
    process group forms: a rank that never joins also hangs the others.
    """

    def __init__(self, run_dir: Path, rank: int, seconds: float | None):
        self._file, self._rank, self._seconds = run_dir / STACKS / f"rank-{rank}.txt", rank, seconds
        self._ended = threading.Event()
        self._last, self._finished = time.monotonic(), ""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.heartbeat("the start")
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds is not None:
            self._thread.join()

    def heartbeat(self, finished: str) -> None:
        """Something was finished; the message of a rank that hangs later names it."""
        self._last, self._finished = time.monotonic(), finished

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._last > self._seconds:
                self._give_up()

    def _give_up(self) -> None:
        message = f"rank {self._rank}: nothing finished since {self._finished}, for {self._seconds:g} s "
        message += "(health.hang_seconds)"
        try:  # the disk may hang or be full: exit all the same
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            message += f": stacks in {self._file}"
        except OSError:
            pass
        print(message, file=sys.stderr, flush=True)
        time.sleep(EXIT_DELAY_SECONDS)
        os._exit(HUNG)
