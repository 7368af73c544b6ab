"""Models on this device: the same scores as on the CPU, and the speed of forward and backward."""

from __future__ import annotations

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pipeline.config.schema import Recipe
from pipeline.costs import benchmark_training
from pipeline.costs.benchmark_training import Bins, RecipeModel, Settings, Stepper
from pipeline.costs.options import TrainingBenchmark
from pipeline.costs.sized_recipe import sized_recipe
from pipeline.evaluation.self_check import check_model
from pipeline.models.factory import new_model
from tools.gpu_check.bench import Bench

KINDS = ("small-sllm", "default-stack", "small-vae", "small-lm")
KERNELS_SHOWN = 14


def same_scores(bench: Bench) -> None:
    """Small models of every kind: CPU = device, bf16 near fp32, and the guarantees of `sllm check`."""
    for name in KINDS:
        with bench.trial(name):
            _same_scores(bench, name)


def _same_scores(bench: Bench, name: str) -> None:
    shards = bench.shards()
    recipe = sized_recipe(name)
    recipe.data.window_tokens = min(recipe.data.window_tokens, 512)
    torch.manual_seed(0)
    model = new_model(recipe, shards.tokenizer(), shards.settings.to_dict()).eval()
    _, batch = Bins(shards, recipe, 512)[0]
    with torch.no_grad():
        cpu = float(model(batch).objective)
        model, batch = model.to(bench.device), batch.to(bench.device)
        here = float(model(batch).objective)
    report = check_model(model, documents=3, half_kernels=bench.on_gpu)
    worst = max(check["max_difference"] for check in report["checks"])
    with torch.no_grad():
        half = float(model.to(torch.bfloat16)(batch).objective)
    found = {"device": abs(here / cpu - 1), "bf16": abs(half / cpu - 1), "check": worst}
    bench.fact(model=name, objective=cpu, **found, checks=len(report["checks"]))
    failed = [f"{check['check']} {check['path']}" for check in report["checks"] if not check["passed"]]
    assert not failed, ", ".join(failed)
    assert found["device"] < 1e-4 and found["bf16"] < 3e-2, f"differs: {found}"


def speed(bench: Bench) -> None:
    """Forward and backward at 125M."""
    _beside(bench, "sllm-125m-h1", "opt-125m")
    if not bench.small:
        _beside(bench, "sllm-125m-h2", None)


def speed_large(bench: Bench) -> None:
    """Forward and backward at 1.3B."""
    _beside(bench, "sllm-1.3b-h1", "opt-1.3b")
    if not bench.small:
        _beside(bench, "sllm-1.3b-h2", None)


def _beside(bench: Bench, name: str, against: str | None) -> None:
    recipe = bench.sized(name)
    if bench.small:
        name, against = "small-sllm", "small-lm"
    options = TrainingBenchmark(
        recipe=str(bench.written(recipe, name)),
        against=against,
        data=bench.train,
        tokens=bench.tokens,
        runs=3 if bench.small else 6,
        dtype=bench.precision,
        device=bench.device_type,
        no_memory=True,
    )
    result = benchmark_training.run(options)
    for side in (result[side] for side in ("model", "against") if side in result):
        bench.fact(
            model=side["name"],
            parameters=side["parameters"],
            tokens_per_second=side["tokens_per_second"]["median"],
            mfu=side.get("mfu"),
            share_of_limit=side["share_of_limit"],
            best_gemm_tflops=result["peak_gflops"] / 1e3,
        )
    if "ratios" in result:
        bench.fact(model=name, times_against=result["ratios"]["tokens_per_second"], by=against)
    _kernels(bench, recipe, name)


def _kernels(bench: Bench, recipe: Recipe, name: str) -> None:
    """Memory of a step, and the kernels (on a CPU: operators) that take most of it."""
    settings = Settings(recipe, name, bench.shards(), bench.tokens, bench.precision, bench.device)
    side = RecipeModel(recipe, name, settings)
    step = Stepper(side, with_update=False)
    side.prepare(0)
    step()
    step.clear()
    with bench.peak() as memory:
        step()
    kind = DeviceType.CUDA if bench.on_gpu else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    side.prepare(1)
    with profile(activities=activities) as profiled:
        step()
        bench.wait()

    def own_us(event) -> float:
        return event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total

    events = [event for event in profiled.key_averages() if event.device_type == kind]
    total = sum(map(own_us, events))
    bench.fact(model=name, step_gb=memory["gb"], busy_ms=total / 1e3, kinds=len(events))
    for event in sorted(events, key=own_us, reverse=True)[:KERNELS_SHOWN]:
        bench.fact(
            kernel=event.key[:80], ms=own_us(event) / 1e3, calls=event.count, share=own_us(event) / total
        )
