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
from tools.benchmarks.strategies import train as short_run
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
    documents = ("--max-documents", 4 if bench.small else 16)
    for words in (
        ("audit", run),
        ("export", run, "--output", model, "--which", "last"),
        ("evaluate", "--model", model, "--data", bench.valid, *documents),
    ):
        with bench.trial(words[0]):
            began = time.monotonic()
            found = bench.sllm(*words)
            bits = found.get("bits_per_byte")
            bench.fact(command=words[0], seconds=time.monotonic() - began, bits_per_byte=bits)
            if bits is not None:
                # Other documents of the same text: a model that was damaged on its way is far off.
                of_run = read_records(run / EVALUATIONS)[-1]["bits_per_byte"]
                assert abs(bits / of_run - 1) < 0.3, f"the run evaluated to {of_run:.3f} bits per byte"


def _compare(bench: Bench, variants: dict[str, tuple[str, bool]]) -> None:
    """Short runs from the same weights on the same text: name → strategy, compiled. The first that works is
    the reference."""
    recipe, reference = _recipe(bench, 5 if bench.small else 8), list[float]()
    recipe.data.validation, threads = None, (os.cpu_count() or 1) if bench.on_gpu else 1
    for name, (strategy, recipe.training.compile) in variants.items():
        with bench.trial(name):
            began = time.monotonic()
            rows = short_run(recipe, [find_deepspeed_config(strategy)], 1, threads, bench.device.type)
            losses = [row["loss"] for row in rows]
            reference = reference or losses
            worst = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
            seconds = time.monotonic() - began
            bench.fact(run=name, start_to_end_s=seconds, **_figures(rows), loss_difference=worst)
            assert worst < (5e-2 if bench.on_gpu else 1e-3), f"its losses differ by {worst:.1e}"


def strategies(bench: Bench) -> None:
    """The ZeRO stages on one device."""
    _compare(bench, {name: (name, False) for name in ("zero0", "zero1", "zero3")})


def compiled(bench: Bench) -> None:
    """`training.compile` beside the same run without it."""
    _compare(bench, {"eager": ("zero1", False), "compiled": ("zero1", True)})


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
