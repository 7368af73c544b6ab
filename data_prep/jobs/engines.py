"""Who runs the units: this process, a pool of processes, MPI ranks, or the workers of a Dask cluster.

Every engine is called as `run(tasks, watch)`. It returns when all are done and calls `watch()` regularly.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, CancelledError, Executor, wait
from concurrent.futures import ProcessPoolExecutor as Pool
from contextlib import contextmanager
from functools import partial
from typing import Any

from data_prep.common.errors import UserError, describe, first_line, log
from data_prep.common.extras import import_extra
from data_prep.jobs.job import Task
from data_prep.jobs.results import Incomplete
from data_prep.jobs.units import run_unit

WATCH_SECONDS = 0.5

Watch = Callable[[], None]
Engine = Callable[[Sequence[Task], Watch], None]


def run_here(tasks: Sequence[Task], watch: Watch) -> None:
    """The engine of one process."""
    for task in tasks:
        run_unit(task, watch)
        watch()


def run_by(executor: Executor, tasks: Sequence[Task], watch: Watch, killed: type[Exception]) -> list[Task]:
    """Run tasks; returns those that ended with the error `killed`. Other errors are raised."""
    lost = []
    futures = {}
    try:
        for task in tasks:
            try:
                futures[executor.submit(run_unit, task)] = task
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


def _refuse_killers(killers: Sequence[Task]) -> None:
    if killers:
        names = ", ".join(task.name for task in killers)
        raise UserError(
            f"the process that read {names} was killed each time (out of memory?); all other units are done: "
            "rerun the same command where there is more memory"
        )


class ProcessPool:
    """The engine of several processes on this machine.

    A killed process ends the whole pool. Then each unit that was in progress runs alone, which shows whether
    it was the reason, and the others run in a new pool that has one process fewer.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._pool: Pool | None = None
        self._others = set(multiprocessing.active_children())

    def __call__(self, tasks: Sequence[Task], watch: Watch) -> None:
        killers: list[Task] = []
        while lost := self._run(tasks, watch, self._workers):
            log("data-prep: warning: a worker process was killed (out of memory?); its units run again")
            started = [task for task in lost if task.is_started()]
            if self._workers == 1 and not started:
                raise UserError("a worker process was killed as it started (out of memory?)")
            self._workers = max(1, self._workers - 1)
            for task in started:
                killers += self._run([task], watch, 1)
                self.close()
            tasks = [task for task in lost if task not in started]
        _refuse_killers(killers)

    def _run(self, tasks: Sequence[Task], watch: Watch, workers: int) -> list[Task]:
        if self._pool is None:
            # A fork starts faster, but it would copy mutexes that other threads hold.
            alone = len(os.listdir("/proc/self/task")) == 1
            context = multiprocessing.get_context("fork" if alone else "spawn")
            self._pool = Pool(workers, context, _start_worker, (os.getpid(),))
        lost = run_by(self._pool, tasks, watch, BrokenExecutor)
        if lost:
            self.close()
        return lost

    def close(self) -> None:
        """End the processes, also those that are at work after an error or Ctrl-C: a rerun resumes."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None


def _start_worker(parent: int) -> None:
    # Ctrl-C reaches the whole process group; only the parent reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, as a killed parent cannot do it."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


@contextmanager
def pool_engine(workers: int) -> Iterator[Engine]:
    """Processes of this machine; one worker is this process."""
    if workers == 1:
        yield run_here
        return
    pool = ProcessPool(workers)
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def mpi_engine() -> Iterator[Engine | None]:
    """The ranks of `mpirun`, called by all of them: rank 0 gets the engine, the others work and get None."""
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise UserError(f"the mpi backend needs mpi4py and an MPI: {error}") from error

    def run(executor: Any, tasks: Sequence[Task], watch: Watch) -> None:
        try:
            run_by(executor, tasks, watch, BrokenExecutor)
        except (UserError, OSError) as error:
            # The other ranks are at work: end them after reporting the error.
            print(f"data-prep: error: {describe(error)}", file=sys.stderr, flush=True)
            MPI.COMM_WORLD.Abort(2)

    if MPI.COMM_WORLD.size == 1:
        yield run_here
        return
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is not None:
            yield partial(run, executor)
    if executor is None:
        yield None


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

    def run(tasks: Sequence[Task], watch: Watch) -> None:
        if not client.scheduler_info()["workers"]:
            log(f"data-prep: the Dask cluster at {scheduler} has no worker yet; waiting for one")
        try:
            executor = client.get_executor(pure=False)
            _refuse_killers(run_by(executor, tasks, watch, distributed.KilledWorker))
        except (UserError, OSError, Incomplete):
            raise
        except CancelledError:
            raise UserError(
                f"the Dask scheduler at {scheduler} is gone; rerun the same command to resume"
            ) from None
        except Exception as error:
            raise UserError(f"a Dask worker failed: {first_line(error)}") from error

    try:
        yield run
    finally:
        client.close()
