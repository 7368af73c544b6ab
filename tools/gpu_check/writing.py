"""New tokens per second beside OPT, by Hugging Face's `generate`: eager, and compiled with a static cache."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from pipeline.costs.benchmark_generation import Case, make_side, measure
from pipeline.costs.options import GenerationBenchmark
from tools.gpu_check.bench import Bench

CONTEXT, SENTENCES, SENTENCE_TOKENS = 256, 5, 11
LONG, SHORT = 64, 8  # new tokens: the difference leaves the prompt out


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
        device=bench.device.type,
    )
    with bench.device, torch.random.fork_rng(devices=[]):
        sides: dict[str, Any] = {
            name: make_side(name, options, bench.device) for name in ("model", "against")
        }
    context = CONTEXT // 4 if bench.small else CONTEXT
    for batch in batches:
        with bench.peak() as memory:
            point = measure(Case(batch, context, SENTENCES, SENTENCE_TOKENS), sides, 1 if bench.small else 3)
        bench.fact(
            batch=batch,
            **{f"{side}_name": sides[side].name for side in sides},
            **{f"{side}_tokens_per_second": point[side]["tokens_per_second"]["median"] for side in sides},
            **{f"{side}_first_sentence_s": point[side]["first_sentence"]["median"] for side in sides},
            peak_gb=memory["gb"],
            ratio=point["ratios"]["tokens_per_second"],
        )
        bench.fact(
            **_static(bench, sides["against"], batch, context),
            ours=point["model"]["tokens_per_second"]["median"],
        )


def _static(bench: Bench, side: Any, batch: int, context: int) -> dict[str, Any]:
    """Tokens per second of a token model with a static cache: on a GPU, transformers compiles its decoding
    step with CUDA graphs."""
    prompts = np.random.default_rng(0).integers(4, side.model.config.vocab_size, (batch, context))
    ids = torch.from_numpy(prompts).to(bench.device)

    def write(tokens: int) -> None:
        with torch.inference_mode():
            side.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                cache_implementation="static",
            )

    began = time.perf_counter()
    write(LONG)
    warm_up = time.perf_counter() - began
    long, short = (bench.seconds(lambda n=n: write(n), runs=2, warm=1) for n in (LONG, SHORT))
    speed = batch * (LONG - SHORT) / (long - short)
    return {"batch": batch, "static_name": side.name, "static_tokens_per_second": speed, "warm_up_s": warm_up}
