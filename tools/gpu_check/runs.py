"""Whole programs: training runs, `sllm doctor`, the tests that need a GPU."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from data_prep.common.processes import run_command
from pipeline.config.library import find_deepspeed_config
from pipeline.config.schema import Recipe
from pipeline.training.run_log import EVALUATIONS, METRICS, SAVES, read_records
from tools.benchmarks import strategies as starts
from tools.gpu_check.bench import Bench
from tools.gpu_check.runner import ROOT

WARM_UP = 2  # steps of a start, not counted


def _recipe(bench: Bench, steps: int) -> Recipe:
    recipe = bench.sized("sllm-125m-h1")
    recipe.data.bins_per_step = 2 if bench.small else 8
    training = recipe.training
    training.max_tokens, training.max_steps = None, steps
    training.save_every = training.eval_every = steps
    training.eval_bins, training.keep = 2, 1
    recipe.schedule.kind, recipe.optimizer.lr = "constant", 1e-3 if bench.small else 3e-4
    return recipe


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steady = rows[WARM_UP:]
    return {
        "step_s": statistics.median(row["seconds"] for row in steady),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steady),
        "mfu": steady[-1]["mfu"],
        "memory_gb": max(row["memory_bytes"] for row in rows) / 1e9,
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
    }


def train(bench: Bench) -> None:
    """One run under `zero1`, stopped and resumed, and all that is made of it."""
    steps = 6 if bench.small else 12
    run = bench.work / "run"
    path = bench.written(_recipe(bench, steps))
    command = [sys.executable, str(ROOT / "pipeline" / "train.py"), "--config", str(path)]
    command += ["--deepspeed_config", str(find_deepspeed_config("zero1")), "--output_dir", str(run)]

    def start(*more: str) -> float:
        began = time.monotonic()
        run_command([*command, *more], "train.py")
        return time.monotonic() - began

    seconds = start()
    rows = read_records(run / METRICS)
    waits = max(row["data_wait_seconds"] for row in rows[WARM_UP:])
    bench.fact(steps=len(rows), start_to_end_s=seconds, **_figures(rows), data_wait_s=waits)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["skips"] == 0, "the loss does not fall"
    save = read_records(run / SAVES)[-1]
    bench.fact(**{f"save_{key}": value for key, value in save.items() if isinstance(value, (int, float))})
    seconds = start("--training.max_steps", str(steps + 2))
    more = read_records(run / METRICS)
    bench.fact(resumed_at=steps + 1, steps=len(more), resume_s=seconds, resumed_loss=more[steps]["loss"])
    assert [row["step"] for row in more] == list(range(1, steps + 3))
    assert abs(more[steps]["loss"] - rows[-1]["loss"]) < 1.0, "the loss jumps where the run resumes"
    model = bench.work / "model"
    for words in (["audit", run], ["export", run, "--output", model, "--which", "last"]):
        began = time.monotonic()
        found = bench.sllm(*words)
        bench.fact(command=words[0], seconds=time.monotonic() - began, clean=found.get("clean", True))
    began = time.monotonic()
    documents = "4" if bench.small else "16"
    found = bench.sllm("evaluate", "--model", model, "--data", bench.valid, "--max-documents", documents)
    of_run = read_records(run / EVALUATIONS)[-1]["bits_per_byte"]
    bench.fact(
        command="evaluate",
        seconds=time.monotonic() - began,
        bits_per_byte=found["bits_per_byte"],
        in_the_run=of_run,
    )
    # Other documents of the same text: a model that was damaged on its way is far off.
    assert abs(found["bits_per_byte"] / of_run - 1) < 0.3, "the exported model is not the trained one"


def _start(bench: Bench, name: str, recipe: Recipe, strategy: str) -> list[dict[str, Any]]:
    began = time.monotonic()
    rows = starts.train(recipe, [find_deepspeed_config(strategy)], 1, os.cpu_count() or 1, bench.device.type)
    bench.fact(start=name, start_to_end_s=time.monotonic() - began, **_figures(rows))
    return rows


def _same_losses(one: list[dict[str, Any]], other: list[dict[str, Any]], allowed: float) -> None:
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True))
    assert worst < allowed, f"losses differ by {worst:.1e}"


def strategies(bench: Bench) -> None:
    """The ZeRO stages on one device, from the same weights and text."""
    recipe = _recipe(bench, 5 if bench.small else 8)
    recipe.data.validation = None
    rows = {name: _start(bench, name, recipe, name) for name in ("zero0", "zero1", "zero3")}
    for name in ("zero1", "zero3"):
        _same_losses(rows[name], rows["zero0"], 5e-2 if bench.on_gpu else 1e-3)


def compiled(bench: Bench) -> None:
    """`training.compile` beside the same run without it."""
    recipe = _recipe(bench, 5 if bench.small else 8)
    recipe.data.validation = None
    plain = _start(bench, "eager", recipe, "zero1")
    recipe.training.compile = True
    _same_losses(_start(bench, "compiled", recipe, "zero1"), plain, 5e-2 if bench.on_gpu else 1e-3)


def doctor(bench: Bench) -> None:
    """The command that users run first on a cluster."""
    found = bench.sllm("doctor", "--shards", bench.train, "--output_dir", bench.work)
    bench.fact(
        ok=found["ok"], gpus=str(found["gpus"]), warnings=found["warnings"], problems=found["problems"]
    )
    assert not bench.on_gpu or any(found["gpus"].values()), "doctor sees no GPU"


def cuda_tests(bench: Bench) -> None:
    """All tests with the marker `cuda`; on a CPU they are skipped."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *map(str, files)]
    needed = {"SLLM_REQUIRE": "cuda"} if bench.on_gpu else {}
    printed = run_command(command, "pytest", cwd=ROOT, env={**os.environ, **needed})
    bench.fact(files=len(files), said=printed.strip().splitlines()[-1])
