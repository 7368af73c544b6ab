"""`sllm sweep SWEEP.yaml`: trains and evaluates a set of runs, and writes a row of figures for each.

A sweep file (`pipeline/recipes/sweeps/`) names a recipe, seeds, and for every run the keys that it changes.
The output folder holds:

    NAME-sSEED/                    one run directory per run and seed
    recipes/ logs/ models/         per run: its recipe, its output, its exported model
    rows/NAME-sSEED.json           its figures, written when the run is done
    results.json                   machine, the sweep's text, and all rows in order
    context.svg                    the loss by context length, if the sweep measures it

Several runs train at once, one per core where there are enough. Rerun the command to resume: runs that are
done are kept, others resume at their last checkpoint. A run directory of another recipe is refused, never
overwritten. The last checkpoint is evaluated, not the best one, which is chosen on the evaluated text.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.common import charts
from data_prep.common.environment import header, require_folder
from data_prep.common.errors import UserError, counted, log
from data_prep.common.extras import import_extra
from data_prep.common.files import json_bytes, read_json, write_atomically
from data_prep.common.page import to_plain, to_text
from data_prep.common.processes import last_line, start_logged
from data_prep.shards.reader import ShardSet
from pipeline.checkpoints import store
from pipeline.common.figures import exact_matches
from pipeline.common.text import FILTERS, duration
from pipeline.config.schema import load_recipe
from pipeline.evaluation.controls import SHUFFLES
from pipeline.parallel.device import uses_gpu
from pipeline.research import context_table
from pipeline.research.sweep_jobs import Job, operations_per_token, read_sweep, require_held_out, with_budgets
from pipeline.training.run_files import read_runs

STRATEGY = "zero0"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
RESULTS = "results.json"
CHART = "context.svg"
COSTS = ("tokens", "seconds", "operations", "needed_operations")
NGRAM_TOKENS = 20_000_000  # of a run's training text that an n-gram model is counted on, at most
# Figures of `sllm evaluate` that are columns of a row; the others are in its `evaluation`.
FIGURES = (
    "parameters",
    "body_parameters",
    "bits_per_byte",
    "bits_per_byte_interval",
    "vector_gain",
    "vector_gain_interval",
    *(f"{name}_gain{end}" for name in SHUFFLES for end in ("", "_interval")),
    "ngram_bits_per_byte",
    "ngram_bits_per_byte_interval",
    "ngram_trained_tokens",
    "context_curve",
    "ppl",
    "exact_match",
    "window_tokens",
    "held_out",
    "new_token",
)
HELD_OUT = ("bits_per_byte", "bits_per_byte_interval", "by_document", "data", "shards_fingerprint")
WRITTEN_CONTEXT = 1024  # tokens before the new one whose cost is counted
SHORT = 8  # tokens: `exact_match_to_8`
STOP_SECONDS = 60.0  # for a stopped training to save


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
        # A thread waits for its slot. The bar is shown on a terminal alone.
        bar = tqdm(total=len(jobs), unit="run", disable=None)
        with ThreadPoolExecutor(len(jobs)) as pool, bar:
            try:
                for job in sorted(jobs, key=lambda job: job.after is not None):
                    before = futures.get(job.after.key) if job.after else None
                    futures[job.key] = pool.submit(self._do, job, before)
                keys = {future: key for key, future in futures.items()}
                for number, done in enumerate(as_completed(keys), start=1):
                    try:
                        row = done.result()
                    except JobFailed as error:
                        failed[keys[done]] = str(error)
                        found = f"failed: {error}"
                    else:
                        took, bits = duration(row["seconds"]), row["bits_per_byte"]
                        found = f"{took} of training, {bits:.4f} bits per byte"
                    bar.update()
                    bar.write(f"{number} of {len(jobs)}, {keys[done]}: {found}", file=sys.stderr)
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
            measure += [job.recipe.data.validation, ",".join(map(str, job.contexts)), job.held_out or ""]
            printed = self._execute(job, slot, measure, capture=True)
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


def measure(run_dir: str, model: str, data: str, contexts: str = "", held_out: str = "") -> dict[str, Any]:
    """Export a run's last checkpoint and score it; the figures of `sllm evaluate`, beside an n-gram model of
    the run's own training text, `body_parameters`, `operations_per_token`, and what a new token costs."""
    from pipeline.costs.generation_bound import cost_of_token
    from pipeline.costs.inspect import body_parameters
    from pipeline.costs.sized_recipe import sized_recipe
    from pipeline.data.plan import BinPlan
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.evaluation.ngram import count_plan
    from pipeline.export.model_folder import export_run
    from pipeline.models.factory import load_model

    export_run(run_dir, model, "last")
    recipe, [run] = load_recipe(Path(run_dir) / "recipe.yaml"), read_runs([run_dir])
    ngram, text = None, recipe.data
    if recipe.objective != "vae":
        sets = [ShardSet.open(folder) for folder in text.shards]
        plan = BinPlan(sets, text.window_tokens, text.bin_tokens, recipe.seed, text.weights)
        ngram = count_plan(plan, min(run.metrics[-1]["tokens"], NGRAM_TOKENS))
    curve = [int(length) for length in contexts.split(",") if length]
    figures = evaluate(model, data=data, ngram=ngram, context_curve=curve)
    figures["operations_per_token"] = operations_per_token(recipe)
    if ngram is not None:
        sentence = max(1, round(figures["tokens"] / figures["sentences"]))
        sized = sized_recipe(str(Path(run_dir) / "recipe.yaml"))
        cost = cost_of_token(sized, ngram.vocabulary, WRITTEN_CONTEXT, sentence, 4)
        figures["new_token"] = {"context": WRITTEN_CONTEXT, "sentence_tokens": sentence, **cost}
    if held_out:
        found = evaluate(model, data=held_out, by_document=True)
        figures["held_out"] = {key: found[key] for key in HELD_OUT}
    return {**figures, "body_parameters": body_parameters(load_model(model))}


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
        "needed_operations": run.metrics[-1]["tokens"] * figures["operations_per_token"],
        "budget": job.operations,
        "cell": job.cell,
        "contexts": list(job.contexts),
        "checkpoint": store.step_name(run.metrics[-1]["step"]),
        "workers": workers,
        "recipe": job.recipe.to_dict(),
        **{key: figures.get(key) for key in FIGURES},
    }
    row["tokens_per_second"] = row["tokens"] / row["seconds"]
    if job.after:
        vae = read_json(job.after.row_file)
        row |= {f"{cost}_with_vae": _sum(row[cost], vae.get(cost)) for cost in COSTS}
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
        only: names of runs, with a seed (`lm-s2`) of that one alone; the ones they start from are included.
    Returns: the result: `rows` of all runs that are done, `failed` (key → reason), `missing` (other keys).
    Raises: UserError, before any training, for a wrong sweep or folder.
    """
    path, folder = Path(path), Path(output)
    require_folder(str(result_file) if result_file else None)
    jobs = read_sweep(path, folder, overrides)
    names = {job.name for job in jobs} | {job.key for job in jobs}
    if unknown := sorted(set(only) - names):
        known = ", ".join(dict.fromkeys(job.name for job in jobs))
        raise UserError(f"--only {unknown[0]}: the sweep has no such run; there are {known}")
    wanted = {job.key for job in jobs if not only or {job.name, job.key} & set(only)}
    wanted |= {job.after.key for job in jobs if job.key in wanted and job.after}
    jobs = with_budgets(jobs, wanted | {job.key for job in jobs if job.row_file.is_file()})
    require_held_out(job for job in jobs if job.key in wanted)
    if curves := any(job.contexts for job in jobs):
        charts.require()
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
        if curves and (plots := context_table.plots(result["rows"])):
            chart = charts.svg(plots, context_table.CAPTION)
            write_atomically(folder / CHART, chart.encode())
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
    text = to_plain(Path(__file__).with_name("sweep.md.jinja"), {**result, "shuffles": SHUFFLES}, FILTERS)
    found = context_table.table(result["rows"])
    return text if found is None else f"{text}\n\n{to_text(found)}"


if __name__ == "__main__":
    from data_prep.common.errors import run_main

    sys.exit(run_main("sweep", lambda: print(json.dumps(measure(*sys.argv[1:])))))
