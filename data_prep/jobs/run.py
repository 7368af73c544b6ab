"""Runs a job: which units each launch does, on which engine, and in which order.

Units are static. A launch runs the missing ones; a task of a Slurm array runs its share of them, and the task
that finds all of them done merges. So a launch that was killed is completed by the next one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from data_prep.common.engines import Engine, ProcessPool, dask_engine, mpi_engine, run_here
from data_prep.common.errors import UserError, counted, log
from data_prep.common.processes import return_large_blocks
from data_prep.common.progress import Progress, Report
from data_prep.common.results import Incomplete
from data_prep.corpus.limits import Limits
from data_prep.jobs import units
from data_prep.jobs.job import Job
from data_prep.jobs.merge import merge, restore_shards
from data_prep.jobs.plan import NO_LIMITS, idle_workers, plan
from data_prep.shards.reader import ShardSet
from data_prep.shards.settings import ShardSettings
from data_prep.text.tokenizer import Tokenizer, load_tokenizer


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
    limits: Limits = NO_LIMITS,
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
    return_large_blocks()
    with _engine(backend, workers, scheduler) as engine:
        tokenizer = load_tokenizer(tokenizer_folder)
        units.loaded = {tokenizer.fingerprint: tokenizer}
        settings.sentences.segmenter_for().cuts("One. 二。")  # compiles what most texts need before a fork
        found = True
        while (job := plan(inputs, output, tokenizer, tokenizer_folder, settings, limits)) is not None:
            found = False
            if line := idle_workers(job, workers):
                log(f"data-prep: {line}")
            progress = job.progress(report or (lambda progress: None))
            progress(at_once=True)
            run_job(job, tokenizer, engine, share, progress)
            progress(at_once=True)
            if job.only is None:  # a repaired set is checked again: more may be missing by now
                break
    return ShardSet.open(output).manifest, found


def _engine(backend: str, workers: int, scheduler: str) -> AbstractContextManager[Engine]:
    if backend == "mpi":
        return mpi_engine()
    if backend == "dask":
        return dask_engine(scheduler)
    return ProcessPool(workers) if workers > 1 else nullcontext(run_here)


def run_job(
    job: Job, tokenizer: Tokenizer, engine: Engine, share: tuple[int, int], progress: Progress
) -> None:
    """Run what is missing of this launch's share; then merge. Raises `Unfinished` when more is missing."""
    work, (number, count) = job.work_folder(), share
    # The largest first, so that no process runs a long unit alone at the end.
    order = {unit: -job.unit_bytes(unit) for unit in job.units}

    def run_phase(phase: str, wanted: Collection[int]) -> None:
        mine = sorted(wanted, key=lambda unit: order.get(unit, unit))[number::count]
        with work.lock(shared=count > 1):
            done = work.done(phase)
            missing = [unit for unit in mine if unit not in done]
            work.remove_staging(phase, missing)
            if missing:
                engine(units.run_unit, job.tasks(phase, missing), progress)
        if (left := set(wanted) - work.done(phase)) and not work.is_finished():
            if count == 1:
                raise Incomplete
            raise Unfinished(
                f"{counted(len(left), 'unit of other tasks is', 'units of other tasks are')} missing"
            )

    while not work.is_finished():
        try:
            if job.settings.test_texts:
                with work.lock():
                    work.make("spans", 0, partial(units.write_test_spans, job))
            if job.settings.compares:
                run_phase("seen", range(len(job.settings.seen_shards)))
                run_phase("hash", job.units)
                with work.lock():
                    work.make("duplicates", 0, partial(units.find_duplicates, job, work, progress))
            run_phase("shard", job.units if job.only is None else job.only)
            with work.lock():
                step = restore_shards if job.only else partial(merge, tokenizer)
                work.make("merge", 0, partial(step, job, work, progress))
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
