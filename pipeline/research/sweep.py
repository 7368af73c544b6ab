"""`sllm sweep SWEEP.yaml`: trains and evaluates a set of runs, and writes a row of figures for each.

A sweep file (`pipeline/recipes/sweeps/`) names a recipe, seeds, and for every run the keys that it changes.
The output folder holds:

    NAME-sSEED/                    one run directory per run and seed
    recipes/ logs/ models/         per run: its recipe, its output, its exported model
    rows/NAME-sSEED.json           its figures, written when the run is done
    results.json                   machine, the sweep's text, and all rows in order

Several runs train at once, one per core where there are enough. Rerun the command to resume: runs that are
done are kept, others resume at their last checkpoint. A run directory of another recipe is refused, never
overwritten. The last checkpoint is evaluated, not the best one, which is chosen on the evaluated text.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.environment import header, require_folder
from data_prep.common.errors import UserError, counted, log
from data_prep.common.extras import import_extra
from data_prep.common.files import json_bytes, read_json, write_atomically
from data_prep.common.page import to_plain
from data_prep.common.processes import last_line, start_logged
from data_prep.shards.reader import ShardSet
from pipeline.checkpoints import store
from pipeline.common.figures import exact_matches
from pipeline.common.text import FILTERS, duration
from pipeline.config.library import find_recipe
from pipeline.config.loading import load_yaml, parse_overrides
from pipeline.config.schema import Recipe, load_recipe
from pipeline.parallel.device import uses_gpu
from pipeline.training.run_files import read_runs

STRATEGY = "zero0"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
RESULTS = "results.json"
KEYS = ("about", "recipe", "seeds", "overrides", "runs")
OURS = ("seed", "output_dir")  # recipe keys that the sweep itself sets
COSTS = ("tokens", "seconds", "operations")
# Figures of `sllm evaluate` that are columns of a row; the others are in its `evaluation`.
FIGURES = (
    "parameters",
    "body_parameters",
    "bits_per_byte",
    "bits_per_byte_interval",
    "vector_gain",
    "vector_gain_interval",
    "ppl",
    "exact_match",
    "window_tokens",
)
SHORT = 8  # tokens: `exact_match_to_8`
STOP_SECONDS = 60.0  # for a stopped training to save


@dataclass(frozen=True)
class Job:
    """One run of a sweep with one seed.

    overrides: the recipe keys that this run changes. after: the run of the SentenceVAE that it starts from.
    """

    name: str
    seed: int
    folder: Path
    recipe: Recipe
    overrides: dict[str, Any]
    after: Job | None = None

    @property
    def key(self) -> str:
        return f"{self.name}-s{self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.folder / self.key

    @property
    def model(self) -> Path:
        return self.folder / "models" / self.key

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.key}.log"

    @property
    def row_file(self) -> Path:
        return self.folder / "rows" / f"{self.key}.json"

    def row(self) -> dict[str, Any] | None:
        """Its row, if it is done: trained to the end on these shards, and evaluated on this text."""
        meta = self.trained()
        if meta is None or not self.row_file.is_file():
            return None
        row = read_json(self.row_file)
        data = self.recipe.data
        same = (
            row["checkpoint"] == store.step_name(meta.step)
            and meta.shards == [_fingerprint(folder) for folder in data.shards]
            and row["evaluation"]["shards_fingerprint"] == _fingerprint(data.validation)
        )
        return row if same else None

    def trained(self) -> store.Meta | None:
        """The checkpoint at the run's end, if there is one."""
        found = store.newest_whole(self.run_dir)
        meta = found[1] if found else None
        return meta if meta and self.recipe.training.progress(meta.step, meta.tokens) >= 1 else None

    def require_same(self) -> None:
        """Refuse (UserError) a run directory of another recipe, or of another SentenceVAE."""
        before = self.run_dir / "recipe.yaml"
        if not before.is_file():
            return
        was, now = (_what_is_trained(self, recipe) for recipe in (load_recipe(before), self.recipe))
        wrong = store.first_difference(was, now)
        if not wrong and self.after and not self.after.trained():
            wrong = f"it started from another run of {self.after.key}"
        if wrong:
            raise UserError(
                f"{self.run_dir} is of another sweep ({wrong}): remove it, or choose another --output"
            )


def _what_is_trained(job: Job, recipe: Recipe) -> dict[str, Any]:
    """A recipe without what may change between two calls. Shards are compared by content in `Job.row`."""
    values = recipe.to_dict()
    for key in ("output_dir", "log"):
        del values[key]
    for key in ("shards", "validation"):
        del values["data"][key]
    if job.after:
        values["model"].pop("vae")
    return values


@functools.cache
def _fingerprint(folder: str) -> str:
    return ShardSet.open(folder).fingerprint


# From a sweep file to jobs --------------------------------------------------------------------------------


def read_sweep(path: Path, folder: Path, overrides: Sequence[str] = ()) -> list[Job]:
    """The jobs of a sweep file in its order, with checked recipes. overrides: from the command line, for all
    runs; they take precedence.

    Raises: UserError for a wrong file, key or recipe, with the run's name.
    """
    try:
        sweep = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"sweep {path} cannot be read: {error}") from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("runs"), dict) or not sweep["runs"]:
        raise UserError(f"sweep {path}: needs `runs`, a mapping of names to changed recipe keys")
    if unknown := [key for key in sweep if key not in KEYS]:
        raise UserError(f"sweep {path}: unknown key {unknown[0]!r}: known keys are {', '.join(KEYS)}")
    seeds = sweep.get("seeds")
    if seeds is not None and not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
        raise UserError(f"sweep {path}: seeds must be a list of whole numbers, not {seeds!r}")
    for key, _ in parse_overrides(list(overrides)):
        if key in OURS:
            raise UserError(f"--{key}: the sweep sets it itself (`seeds` in {path}, --output)")
    if sorted(set(seeds or ())) != sorted(seeds or ()):
        raise UserError(f"sweep {path}: {seeds} has a seed twice")

    jobs: dict[str, list[Job]] = {}
    runs = {name: settings or {} for name, settings in sweep["runs"].items()}
    for name, settings in _in_order(path, runs):
        where = f"sweep {path}, run {name}"
        own = {key: value for key, value in settings.items() if key not in ("recipe", "after")}
        common = sweep.get("overrides") or {}
        file = settings.get("recipe", sweep.get("recipe"))
        if file is None:
            raise UserError(f"{where}: neither it nor the sweep names a recipe")
        if mine := [key for key in OURS if key in {**common, **own}]:
            raise UserError(f"{where}: {mine[0]} is set by the sweep itself (`seeds`, --output)")
        texts = [f"--{key}={json.dumps(value)}" for key, value in {**common, **own}.items()] + [*overrides]
        before = {job.seed: job for job in jobs[settings["after"]]} if "after" in settings else {}
        try:
            jobs[name] = []
            for seed in seeds or [load_recipe(find_recipe(file, path.parent), texts).seed]:
                if before and seed not in before:
                    raise UserError(f"{settings['after']} has another seed: name `seeds` in the sweep")
                after = before.get(seed)
                fixed = [f"--seed={seed}", f"--output_dir={folder / f'{name}-s{seed}'}"]
                fixed += [f"--model.vae.path={after.model}"] if after else []
                recipe = load_recipe(find_recipe(file, path.parent), texts + fixed)
                if not recipe.data.validation:
                    raise UserError("needs validation shards: --data.validation SHARDS")
                if after and (recipe.objective, after.recipe.objective) != ("sllm", "vae"):
                    raise UserError("`after` is for an SLLM that starts from a SentenceVAE of this sweep")
                jobs[name].append(Job(name, seed, folder, recipe, own, after))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return [job for name in runs for job in jobs[name]]


def _in_order(path: Path, runs: dict[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings; runs that others start from come first."""
    for name, settings in runs.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"sweep {path}: run {name!r}: a name is text of letters, digits, '.', '_', '-'")
        if not isinstance(settings, dict):
            raise UserError(f"sweep {path}, run {name}: must be a mapping of recipe keys to values")
        before = settings.get("after")
        if before is not None and (before not in runs or "after" in runs[before]):
            raise UserError(
                f"sweep {path}, run {name}: after {before!r} names no run of this sweep that starts by itself"
            )
    yield from sorted(runs.items(), key=lambda item: "after" in item[1])


# The jobs' work -------------------------------------------------------------------------------------------


class JobFailed(Exception):
    """A run that failed; the message is one line."""


class Workers:
    """Runs jobs in subprocesses, `number` at once. lock: an open file that every subprocess inherits."""

    def __init__(self, number: int, lock: int):
        import torch  # here: a sweep with nothing to do needs none

        self.number, self._lock = number, lock
        self._cores = sorted(os.sched_getaffinity(0))
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(number):
            self._slots.put(slot)
        self._processes: dict[str, subprocess.Popen] = {}
        self._guard, self._stopped = threading.Lock(), False
        gpus = torch.cuda.device_count() if uses_gpu() else 0
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        self._gpus = chosen.split(",") if gpus else []

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Do these jobs, each after the one it starts from; returns the reasons of failed ones by key. Ctrl-C
        stops all; trainings save first."""
        failed: dict[str, str] = {}
        futures: dict[str, Future] = {}
        with ThreadPoolExecutor(len(jobs)) as pool:  # a thread waits for its slot
            try:
                for job in sorted(jobs, key=lambda job: job.after is not None):
                    before = futures.get(job.after.key) if job.after else None
                    futures[job.key] = pool.submit(self._do, job, before)
                keys = {future: key for key, future in futures.items()}
                for done in as_completed(keys):
                    try:
                        row = done.result()
                    except JobFailed as error:
                        failed[keys[done]] = str(error)
                        log(f"{keys[done]}: failed: {error}")
                    else:
                        took, bits = duration(row["seconds"]), row["bits_per_byte"]
                        log(f"{keys[done]}: {took} of training, {bits:.4f} bits per byte")
            except BaseException:
                log("stopping; trainings save first (Ctrl-C again: at once)")
                self._stop()
                raise
        return failed

    def _do(self, job: Job, before: Future | None) -> dict[str, Any]:
        """Train, export, evaluate; writes and returns the row. Raises: JobFailed."""
        if before is not None and before.exception():
            raise JobFailed(f"not started, because {job.after.key} failed")
        recipe = job.folder / "recipes" / f"{job.key}.yaml"
        write_atomically(recipe, job.recipe.to_yaml().encode())
        train = [sys.executable, "-m", "pipeline.train", "--config", str(recipe)]
        measure = [sys.executable, "-m", "pipeline.research.sweep", str(job.run_dir), str(job.model)]
        slot = self._slots.get()
        try:
            self._execute(job, slot, [*train, "--deepspeed_config", STRATEGY])
            printed = self._execute(job, slot, [*measure, job.recipe.data.validation], capture=True)
        finally:
            self._slots.put(slot)
        row = make_row(job, json.loads(printed), self.number)
        write_atomically(job.row_file, json_bytes(row))
        return row

    def _execute(self, job: Job, slot: int, command: list[str], capture: bool = False) -> str:
        """Run a command; its output goes to the job's log, or is returned (`capture`). Raises: JobFailed."""
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            # One process, whatever a launcher has set; port 0: any that is free.
            **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        }
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        else:
            environment["DS_ACCELERATOR"] = "cpu"
        with self._guard:
            if self._stopped:
                raise JobFailed("stopped")
            process = start_logged(command, job.log, capture, env=environment, pass_fds=(self._lock,))
            self._processes[job.key] = process
        if not self._gpus and self.number <= len(self._cores):
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(process.pid, {self._cores[slot]})
        printed, _ = process.communicate()
        if process.returncode:
            last = last_line(job.log.read_text(encoding="utf-8", errors="replace"))
            raise JobFailed(f"{last} (status {process.returncode}; its whole output: {job.log})")
        return printed or ""

    def _stop(self) -> None:
        with self._guard:
            self._stopped = True
            processes = list(self._processes.values())
        for process in processes:
            process.terminate()
        try:
            for process in processes:
                process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:  # a second Ctrl-C, too
            for process in processes:
                process.kill()


def measure(run_dir: str, model: str, data: str) -> dict[str, Any]:
    """Export a run's last checkpoint and score it; the figures of `sllm evaluate`, and `body_parameters`."""
    from pipeline.costs.inspect import body_parameters
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.export.model_folder import export_run
    from pipeline.models.factory import load_model

    export_run(run_dir, model, "last")
    return {**evaluate(model, data=data), "body_parameters": body_parameters(load_model(model))}


def make_row(job: Job, figures: dict[str, Any], workers: int) -> dict[str, Any]:
    """A run's row, from its metrics and the figures of `measure`."""
    [run] = read_runs([job.run_dir])
    operations = run.values("operations")
    row: dict[str, Any] = {
        "name": job.name,
        "seed": job.seed,
        "overrides": job.overrides,
        "after": job.after.key if job.after else None,
        "objective": job.recipe.objective,
        "tokens": run.metrics[-1]["tokens"],
        "seconds": sum(run.values("seconds")),
        "operations": sum(operations) if len(operations) == len(run.metrics) else None,
        "checkpoint": store.step_name(run.metrics[-1]["step"]),
        "workers": workers,
        "recipe": job.recipe.to_dict(),
        **{key: figures.get(key) for key in FIGURES},
    }
    row["tokens_per_second"] = row["tokens"] / row["seconds"]
    if job.after:
        vae = read_json(job.after.row_file)
        row |= {f"{cost}_with_vae": _sum(row[cost], vae[cost]) for cost in COSTS}
    if job.recipe.objective == "vae":
        _, row[f"exact_match_to_{SHORT}"] = exact_matches(figures["exact_match_by_length"], 1, SHORT)
    left_out = {*FIGURES, "by_sentence_position"}
    row["evaluation"] = {key: value for key, value in figures.items() if key not in left_out}
    began = header(())
    return row | {key: began[key] for key in ("date", "git_commit", "git_changed")}


def _sum(*parts: float | None) -> float | None:
    return None if None in parts else sum(parts)


# The command ----------------------------------------------------------------------------------------------


def run(
    path: str | Path,
    output: str | Path,
    workers: int = 1,
    result_file: str | Path | None = None,
    only: Iterable[str] = (),
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Do the jobs of a sweep that are not done, and write its result file (default: OUTPUT/results.json).

    Args:
        only: names of runs; the ones they start from are included.
    Returns: the result: `rows` of all runs that are done, `failed` (key → reason), `missing` (other keys).
    Raises: UserError, before any training, for a wrong sweep or folder.
    """
    path, folder = Path(path), Path(output)
    require_folder(str(result_file) if result_file else None)
    jobs = read_sweep(path, folder, overrides)
    names = {job.name for job in jobs}
    if unknown := sorted(set(only) - names):
        raise UserError(f"--only {unknown[0]}: the sweep has no such run; there are {', '.join(names)}")
    wanted = {job.key for job in jobs if not only or job.name in only}
    wanted |= {job.after.key for job in jobs if job.key in wanted and job.after}
    if any(job.recipe.objective == "vae" for job in jobs):  # refused before hours of training
        import_extra("rapidfuzz", "eval")
    for part in ("recipes", "logs", "models", "rows"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with _only_one(folder) as lock:
        for job in jobs:
            if job.key in wanted:
                job.require_same()
        todo = [job for job in jobs if job.key in wanted and job.row() is None]
        log(f"{folder}: {len(wanted) - len(todo)} of {counted(len(wanted), 'run is', 'runs are')} done")
        failed = Workers(min(workers, len(todo)), lock).run(todo) if todo else {}
        rows = {job.key: job.row() for job in jobs}
        result = {
            **header(PACKAGES),
            "sweep": path.name,
            "text": path.read_text(encoding="utf-8"),
            "overrides": list(overrides),
            "rows": [row for row in rows.values() if row],
            "failed": failed,
            "missing": [key for key, row in rows.items() if not row and key not in failed],
        }
        write_atomically(
            Path(result_file or folder / RESULTS), (json.dumps(result, indent=1) + "\n").encode()
        )
    return result


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Lock the folder for this sweep; yields the lock's file, which the trainings of a killed sweep keep
    open. TERM acts like Ctrl-C meanwhile."""
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by a sweep, or by trainings that a killed one has left: wait, or stop it"
            ) from None
        yield handle
    finally:
        os.close(handle)
        if main:
            signal.signal(signal.SIGTERM, before)


def format_sweep(result: dict[str, Any]) -> str:
    """The result of `run` as a table. A SentenceVAE's bits per byte are in another column: they measure
    reconstruction, not prediction."""
    return to_plain(Path(__file__).with_name("sweep.md.jinja"), result, FILTERS)


if __name__ == "__main__":
    from data_prep.common.errors import run_main

    sys.exit(run_main("sweep", lambda: print(json.dumps(measure(*sys.argv[1:])))))
