"""Signals that ask a run to stop, and the exit statuses of a run that stopped early."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from data_prep.common.errors import INTERRUPTED, REQUEUE

HUNG = 76  # exit status of a rank without a heartbeat for too long (`Watchdog`)
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SECOND_SIGNAL_SECONDS = 1.0
LAUNCHER = "SLLM_LAUNCHER"  # process id of `sllm train --ranks`, for its ranks
POLL_SECONDS = 0.5  # between looks at the launcher


class Stopped(Exception):
    """A signal came before the first step."""

    def report(self) -> int:
        """Report it, once a machine; returns the exit status."""
        _say_once_a_machine(f"stopped by {self} before the first step: nothing to save")
        return INTERRUPTED if str(self) == "SIGINT" else REQUEUE


def _say_once_a_machine(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


class StopSignals:
    """USR1 (Slurm's warning), TERM and Ctrl-C request a stop: the flag is part of the next step's all-reduce,
    so all ranks agree. The end of the launcher counts as TERM.

    A second signal, at least a second later (Slurm may deliver one signal twice), ends this process at once
    with the requeue status, without saving. A thread does that, because Python runs no handler while a
    collective blocks the main thread.

    Install it before the slow imports: without a handler, USR1 kills the process.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._at_once = False
        self._launchers = _launchers()
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()

    def _remember(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """As long as there is nothing to save and no rank to agree with: a signal ends the process at once,
        also while the main thread is in a slow import. An earlier one raises `Stopped`."""
        self._at_once = True
        try:
            if self.received:
                raise Stopped(self.received)
            yield
        finally:
            self._at_once = False

    def _watch(self, read: int) -> None:
        first = kind = None
        while True:
            if not select.select([read], [], [], POLL_SECONDS)[0]:
                if self._launchers and self.received is None and not all(map(_runs, self._launchers)):
                    self._launchers = []
                    print("the launcher has ended", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                continue
            number = os.read(read, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            if self._at_once:
                os._exit(Stopped(signal.Signals(number).name).report())
            if first is None:
                first, kind = time.monotonic(), number
                _say_once_a_machine(f"{signal.Signals(number).name}: stops when this step is done and saved")
            elif kind == signal.SIGINT and number == signal.SIGTERM:
                pass  # of DeepSpeed's launcher, which has seen the same Ctrl-C
            elif time.monotonic() - first >= SECOND_SIGNAL_SECONDS:
                name = signal.Signals(number).name
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


def _launchers() -> list[tuple[int, str]]:
    """The processes of `deepspeed` and `sllm train` that a rank must not outlive, each as `_runs` knows it.

    DeepSpeed's launcher survives its runner, and ranks survive both: no process would stop them.
    """
    if "CROSS_SIZE" not in os.environ:  # set by DeepSpeed's launcher, which is then the parent
        return []
    parent = os.getppid()
    found = [parent, _stat(parent)[0], int(os.environ.get(LAUNCHER, parent))]
    return [(pid, _stat(pid)[1]) for pid in dict.fromkeys(found) if pid > 1]


def _stat(pid: int) -> tuple[int, str]:
    """Parent and start time of a process; (0, "") when there is none, or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, parent, *rest = file.read().rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return (0, "") if state == "Z" else (int(parent), rest[17])


def _runs(launcher: tuple[int, str]) -> bool:
    return _stat(launcher[0])[1] == launcher[1]
