"""New tokens per second beside OPT, by Hugging Face's `generate`: eager, and compiled with a static cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.costs.benchmark_generation import make_side, measure
from pipeline.costs.engines import Case
from pipeline.costs.options import SIDES, GenerationBenchmark
from tools.gpu_check.bench import Bench

CONTEXT, SENTENCES, SENTENCE_TOKENS = 256, 5, 11


def generation(bench: Bench) -> None:
    """125M, one text and 64 at once."""
    _beside(bench, "sllm-125m-h1", "opt-125m", (1, 4 if bench.small else 64))


def large_batch(bench: Bench) -> None:
    """125M, 256 texts at once."""
    _beside(bench, "sllm-125m-h1", "opt-125m", (8 if bench.small else 256,))


def large_model(bench: Bench) -> None:
    """1.3B, one text and 64 at once."""
    _beside(bench, "sllm-1.3b-h1", "opt-1.3b", (1, 4 if bench.small else 64))


def _beside(bench: Bench, ours: str, theirs: str, batches: tuple[int, ...]) -> None:
    options = GenerationBenchmark(
        recipe="small-sllm" if bench.small else ours,
        against="small-lm" if bench.small else theirs,
        sentences=SENTENCES,
        sentence_tokens=SENTENCE_TOKENS,
        dtype=bench.precision,
        device=bench.device_type,
    )
    with bench.device:  # random weights are drawn where they are used
        sides: dict[str, Any] = {name: make_side(name, options, bench.device) for name in SIDES}
    context, runs = (CONTEXT // 4, 1) if bench.small else (CONTEXT, 3)
    cases = [Case(batch, context, SENTENCES, SENTENCE_TOKENS) for batch in batches]
    for case in cases:
        with bench.trial(f"batch {case.batch}"), bench.peak() as memory:
            point = measure(case, sides, runs)
            for side in SIDES:
                _figures(bench, sides[side].name, case.batch, point[side], "")
            bench.fact(
                model=sides["model"].name, batch=case.batch, times_eager=point["ratios"]["tokens_per_second"]
            )
        bench.fact(model=sides["model"].name, batch=case.batch, peak_gb=memory["gb"])
    # On a GPU, transformers compiles the decoding step with CUDA graphs then: the strongest baseline.
    with bench.device:
        static = make_side("against", replace(options, engine="hf-static"), bench.device)
    for case in cases:
        with bench.trial(f"static cache, batch {case.batch}"):
            point = measure(case, {"against": static}, runs)
            _figures(bench, static.name, case.batch, point["against"], " static")


def _figures(bench: Bench, name: str, batch: int, side: dict[str, Any], how: str) -> None:
    medians = {key: side[key]["median"] for key in ("tokens_per_second", "first_sentence")}
    bench.fact(model=name + how, batch=batch, **medians)
