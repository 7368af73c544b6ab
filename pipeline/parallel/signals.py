"""Signals that ask a run to stop, and the exit statuses of a run that stopped early."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from data_prep.common.errors import REQUEUE

HUNG = 76  # exit status of a rank without a heartbeat for too long (`Watchdog`)
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
SECOND_SIGNAL_SECONDS = 1.0


class StopSignals:
    """USR1 (Slurm's warning) and TERM request a stop: the flag is part of the next step's all-reduce, so all
    ranks agree.

    A second signal, at least a second later (Slurm may deliver one signal twice), ends this process at once
    with the requeue status, without saving. A thread does that, because Python runs no handler while a
    collective blocks the main thread.

    Install it before the slow imports: without a handler, USR1 kills the process.
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

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *_: object) -> None:
        self.ignore()

    def ignore(self) -> None:
        """Ignore these signals until the process ends; call it when all is saved.

        The first rank to exit with 75 makes `srun --kill-on-bad-exit` terminate the others. Python removes
        its own handlers before it ends. A rank killed then would hide the 75, and the job would not requeue.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
