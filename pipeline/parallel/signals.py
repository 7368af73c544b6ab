"""Signals that ask a run to stop, and the exit statuses of a run that stopped early."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from data_prep.common.errors import REQUEUE

HUNG = 76  # exit status of a rank in which nothing was finished for too long (`health.Watchdog`)
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
SECOND_SIGNAL_SECONDS = 1.0


class StopSignals:
    """USR1 (Slurm's warning) and TERM ask for a stop: the flag is read at the next step's all-reduce, so all
    ranks agree.

    A second one, at least a second later (Slurm's tools may deliver one signal twice), ends this process at
    once, without saving, with the requeue status. A thread does that: Python runs handlers in the main thread
    only when no collective blocks it.

    Install it before the slow imports (a USR1 that nobody handles kills).
    """

    def __init__(self) -> None:
        self.received: str | None = None
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()

    def _remember(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name

    def _watch(self, read: int) -> None:
        first = None
        while number := os.read(read, 1):
            if number[0] not in STOP_SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first >= SECOND_SIGNAL_SECONDS:
                name = signal.Signals(number[0]).name
                print(f"a second signal ({name}): ends at once, nothing saved", file=sys.stderr, flush=True)
                os._exit(REQUEUE)

    def ignore(self) -> None:
        """From now on these signals do nothing, up to the process's very end: call it when all is saved.

        The first rank to exit with 75 makes `srun --kill-on-bad-exit` terminate the others. Python gives its
        own handlers up before it ends; a rank killed there would hide the 75, and no job would be requeued.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
