"""Who runs the tasks of a job: this process, a pool of processes, MPI ranks, or a Dask cluster.

An engine is called as `engine(function, tasks, watch)`. It returns when `function(task)` has returned for
every task, and calls `watch()` regularly.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, CancelledError, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

from data_prep.common.errors import UserError, describe, first_line, log
from data_prep.common.extras import import_extra
from data_prep.common.results import Incomplete

WATCH_SECONDS = 0.5


class Task(Protocol):
    """name: of its input, for messages."""

    @property
    def name(self) -> str: ...

    def is_started(self) -> bool:
        """Whether a process has started it and not completed it."""


Engine = Callable[[Callable[..., None], Sequence[Any], Callable[[], None]], None]


def run_by(
    executor: Any, function: Callable, tasks: Sequence[Task], watch: Callable, killed: type[Exception]
) -> list[Task]:
    """Run tasks by any executor; returns those that failed with `killed`. Other errors are raised."""
    lost, futures = [], {}
    try:
        with _ctrl_c_later():
            for task in tasks:
                try:
                    futures[executor.submit(function, task)] = task
                except killed:
                    lost.append(task)
        pending = set(futures)
        while pending:
            done, pending = wait(pending, WATCH_SECONDS, FIRST_EXCEPTION)
            for future in done:
                if isinstance(future.exception(), killed):
                    lost.append(futures[future])
                else:
                    future.result()
            watch()
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return lost


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Processes that are started meanwhile inherit that Ctrl-C is blocked, from their first moment on: it
    reaches the whole process group, and only the parent reports it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refuse_killers(killers: Sequence[Task]) -> None:
    if killers:
        names = ", ".join(task.name for task in killers)
        raise UserError(
            f"the process that read {names} was killed each time (out of memory?); the other input is done: "
            "rerun the same command where there is more memory"
        )


def run_here(function: Callable, tasks: Sequence[Task], watch: Callable[[], None]) -> None:
    """The engine of this process."""
    for task in tasks:
        function(task, watch)
        watch()


class ProcessPool:
    """The engine of several processes on this machine; `with` ends them.

    A killed process ends the whole pool. Then each task that was in progress runs alone, which shows whether
    it was the reason, and the others run in a new pool that has one process fewer.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def __call__(self, function: Callable, tasks: Sequence[Task], watch: Callable[[], None]) -> None:
        killers: list[Task] = []
        while lost := self._run(function, tasks, watch, self._workers):
            log("data-prep: warning: a worker process was killed (out of memory?); its work is done again")
            started = [task for task in lost if task.is_started()]
            if self._workers == 1 and not started:
                raise UserError("a worker process was killed as it started (out of memory?)")
            self._workers = max(1, self._workers - 1)
            for task in started:
                killers += self._run(function, [task], watch, 1)
            self._close()
            tasks = [task for task in lost if task not in started]
        _refuse_killers(killers)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _run(self, function: Callable, tasks: Sequence[Task], watch: Callable, workers: int) -> list[Task]:
        if self._pool is None:
            # A fork starts faster, but it would copy mutexes that other threads hold.
            alone = len(os.listdir("/proc/self/task")) == 1
            context = multiprocessing.get_context("fork" if alone else "spawn")
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
        lost = run_by(self._pool, function, tasks, watch, BrokenExecutor)
        if lost:
            self._close()
        return lost

    def _close(self) -> None:
        # Workers are at work here only after an error or Ctrl-C; a rerun resumes.
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None


def _start_worker(parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, as a killed parent cannot do it."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


@contextmanager
def mpi_engine() -> Iterator[Engine]:
    """The ranks of `mpirun`, called by all of them: rank 0 gets the engine, the others work and exit."""
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise UserError(f"the mpi backend needs mpi4py and an MPI: {error}") from error
    if MPI.COMM_WORLD.size == 1:
        yield run_here
        return
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is not None:

            def run(function: Callable, tasks: Sequence[Task], watch: Callable[[], None]) -> None:
                try:
                    run_by(executor, function, tasks, watch, BrokenExecutor)
                except (UserError, OSError) as error:
                    # The other ranks are at work: end them after reporting the error.
                    log(f"data-prep: error: {describe(error)}")
                    MPI.COMM_WORLD.Abort(2)

            yield run
    if executor is None:
        raise SystemExit(0)


@contextmanager
def dask_engine(scheduler: str) -> Iterator[Engine]:
    """The workers of a Dask cluster, which must see the same files under the same paths."""
    distributed = import_extra("distributed", "dask")
    for name in ("distributed", "distributed.client", "distributed.utils", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a lost connection gets one line below
    try:
        client = distributed.Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise UserError(f"no Dask scheduler answers at {scheduler}: {first_line(error)}") from None

    def run(function: Callable, tasks: Sequence[Task], watch: Callable[[], None]) -> None:
        if not client.scheduler_info()["workers"]:
            log(f"data-prep: the Dask cluster at {scheduler} has no worker yet; waiting for one")
        try:
            executor = client.get_executor(pure=False)
            # The scheduler gives a lost worker's tasks to others. After some deaths it blames every task that
            # was there each time; alone they show which it was.
            blamed = run_by(executor, function, tasks, watch, distributed.KilledWorker)
            alone = (run_by(executor, function, [task], watch, distributed.KilledWorker) for task in blamed)
            _refuse_killers(list(chain.from_iterable(alone)))
        except (UserError, OSError, Incomplete):
            raise
        except CancelledError:
            raise UserError(f"the Dask scheduler at {scheduler} is gone; rerun the same command") from None
        except Exception as error:
            raise UserError(f"a Dask worker failed: {first_line(error)}") from error

    try:
        yield run
    finally:
        client.close()
