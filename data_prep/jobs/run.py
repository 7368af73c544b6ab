"""Runs a job: which units each launch does, on which engine, and in which order.

Units are static. A launch runs the missing ones; a task of a Slurm array runs its share of them, and the task
that finds all of them done merges. So a launch that was killed is completed by the next one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.jobs import units
from data_prep.jobs.engines import WATCH_SECONDS, Engine, dask_engine, mpi_engine, pool_engine
from data_prep.jobs.job import Job, ShardSettings
from data_prep.jobs.merge import merge, restore_shards
from data_prep.jobs.plan import plan
from data_prep.jobs.progress import Progress
from data_prep.jobs.results import Incomplete
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

Report = Callable[[Progress], None]


class Unfinished(Exception):
    """This task of an array has done what it can; the message says what is missing."""


def make_shards(
    inputs: list[str | Path],
    output: str | Path,
    tokenizer_folder: str | Path,
    settings: ShardSettings,
    workers: int = 1,
    backend: str = "local",
    scheduler: str = "",
    report: Report | None = None,
) -> tuple[dict, bool]:
    """Make, resume, repair or find the shard set.

    Under the `mpi` backend every rank calls this, under `slurm` every task of an array. `report` is called
    regularly with the progress of the whole run over all processes.

    Returns:
        The manifest, and whether the set was complete before.

    Raises:
        UserError: the input is bad, or `output` holds something else.
        Unfinished: this task of an array has done its share; units of other tasks are missing.
        SystemExit: this rank is not rank 0, and the run has ended.
    """
    share = _array_share() if backend == "slurm" else (0, 1)
    with _engine(backend, workers, scheduler) as engine:
        if engine is None:
            raise SystemExit(0)
        tokenizer = load_tokenizer(tokenizer_folder)
        units.loaded.clear()
        units.loaded[tokenizer.fingerprint] = tokenizer
        found = True
        while (job := plan(inputs, output, tokenizer, tokenizer_folder, settings)) is not None:
            found = False
            watch = _Watch(report or (lambda progress: None), Progress(job))
            run_job(job, tokenizer, engine, share, watch)
            watch.now()
            if job.only is None:  # a repaired set is checked again: more may be missing by now
                break
    return ShardSet.open(output).manifest, found


def _engine(backend: str, workers: int, scheduler: str) -> AbstractContextManager[Engine | None]:
    if backend == "mpi":
        return mpi_engine()
    return dask_engine(scheduler) if backend == "dask" else pool_engine(workers)


class _Watch:
    """Reports the progress, at most twice a second when called."""

    def __init__(self, report: Report, progress: Progress):
        self._report, self._progress, self._last = report, progress, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= WATCH_SECONDS:
            self.now()

    def now(self) -> None:
        self._progress.update()
        self._report(self._progress)
        self._last = time.monotonic()


def run_job(job: Job, tokenizer: Tokenizer, engine: Engine, share: tuple[int, int], watch: _Watch) -> None:
    """Run what is missing of this launch's share; then merge.

    Raises:
        Unfinished: units of other shares are missing. Errors of units pass through.
    """
    work = job.work_folder()
    number, count = share
    # The largest first, so that no process runs a long unit alone at the end.
    order = sorted(job.units, key=lambda unit: -job.unit_bytes(unit))

    def run_phase(phase: str, wanted: Iterable[int]) -> None:
        mine = [unit for unit in order if unit in wanted][number::count]
        with work.lock(shared=count > 1):
            done = work.done(phase)
            missing = [unit for unit in mine if unit not in done]
            work.remove_staging(phase, missing)
            if missing:
                engine(job.tasks(phase, missing), watch)
        left = set(wanted) - work.done(phase)
        if left and not work.is_finished():
            if count == 1:
                raise Incomplete
            raise Unfinished(f"{len(left)} of {len(set(wanted))} units of other tasks are missing")

    def find_duplicates(folder: Path) -> None:
        units.find_duplicates(job, work, folder, watch)

    def finish(folder: Path) -> None:
        if job.only is None:
            merge(job, work, tokenizer, folder, watch)
        else:
            restore_shards(job, work, watch)

    while not work.is_finished():
        try:
            if job.settings.deduplicate:
                run_phase("hash", job.units)
                with work.lock():
                    work.make("duplicates", 0, find_duplicates)
            run_phase("shard", job.units if job.only is None else job.only)
            with work.lock():
                work.make("merge", 0, finish)
        except Incomplete:
            continue
    shutil.rmtree(job.work, ignore_errors=True)  # started again by a run that came too late


def choose_backend(name: str, scheduler: str = "") -> str:
    """`auto` by the environment: `mpi` under mpirun, `slurm` in an array job, `dask` with a scheduler."""
    if name not in ("auto", "dask") and scheduler:
        raise UserError(f"--scheduler is for --backend dask, not {name}")
    if name == "dask" and not scheduler:
        raise UserError("--backend dask needs --scheduler ADDRESS, such as tcp://node1:8786")
    if name != "auto":
        return name
    if scheduler:
        return "dask"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 0) > 1:
        return "mpi"
    return "slurm" if "SLURM_ARRAY_TASK_ID" in os.environ else "local"


def _array_share() -> tuple[int, int]:
    """(number of this task from 0, tasks) of a Slurm array."""
    task, least, most, step, count = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("STEP", 1), ("COUNT", 1))
    )
    if range(least, most + 1, step)[-1:] != range(most, most + 1) or (most - least) // step + 1 != count:
        raise UserError("the tasks of the array must be a range, such as --array=0-15")
    return (task - least) // step, count
