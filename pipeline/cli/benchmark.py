"""`sllm benchmark train` and `benchmark generation`: speed and memory on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from data_prep.common.command_line import Positive
from pipeline.cli.options import Json, Output, answer, app
from pipeline.costs.options import GenerationBenchmark, Several, TrainingBenchmark

Words = Annotated[Sequence[str], Parameter(consume_multiple=True)]
HELP = """Measure speed and memory on this machine.

example: sllm benchmark generation --recipe sllm-125m-h1 --against opt-125m --batch 1 8"""

benchmark = App(name="benchmark", group="Cost and speed", help=HELP)
app.command(benchmark)


@benchmark.command
def train(*, options: Annotated[TrainingBenchmark, Parameter(name="*")], json: Json = False) -> None:
    """Real tokens per second of forward and backward, padding and memory, beside another model.

    example:
      sllm benchmark train --recipe sllm-125m-h1 --against opt-125m --data shards/train
    """
    from pipeline.costs import benchmark_training

    answer(benchmark_training.run(options), json, benchmark_training.format_benchmark)


@benchmark.command
def generation(*, options: Annotated[GenerationBenchmark, Parameter(name="*")], json: Json = False) -> None:
    """New tokens per second, time to the first sentence and cached bytes, beside a token-level model. With
    --output FILE, a chart is written beside it (.svg).

    example:
      sllm benchmark generation --recipe sllm-125m-h1 --against opt-125m --batch 1 8 --context 256 1024
    """
    from pipeline.costs import benchmark_generation

    result = benchmark_generation.run(options)
    if options.output:
        from pipeline.reports.charts import generation_chart

        Path(options.output).with_suffix(".svg").write_text(generation_chart(result), encoding="utf-8")
    answer(result, json, benchmark_generation.format_benchmark)


@benchmark.command
def counts(
    *,
    recipe: str,
    strategy: Annotated[str, Parameter(alias="--deepspeed-config")] = "zero1",
    tokens: Positive | None = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Kernels, host waits and bytes of a training step on one GPU, counted on the CPU.

    example:
      sllm benchmark counts --recipe sllm-125m-h1 --tokens 16384

    Args:
        recipe: recipe file, or the name of one that ships with the package
        strategy: a file of ds_configs/
        tokens: tokens of a micro-batch (default: the recipe's data.bin_tokens)
    """
    from data_prep.common.environment import write_result
    from pipeline.costs import counts as counting

    result = counting.run(recipe, strategy, tokens)
    write_result(result, output)
    answer(result, json, counting.format_counts)


@benchmark.command
def bound(
    *,
    recipe: str,
    against: str,
    layers: Several = (8, 12),
    vocab_size: Several = (2048, 8192, 50265),
    context: Positive = 2048,
    sentence_tokens: Positive = 11,
    dtype: Literal["fp32", "bf16"] = "fp32",
    output: Output = None,
    json: Json = False,
) -> None:
    """Operations and bytes of a new token by arithmetic, beside a token-level model of the same depth.

    example:
      sllm benchmark bound --recipe default-stack --against default-lm --layers 8 12

    Args:
        recipe: recipe of an SLLM, or the name of one that ships with the package
        against: recipe of a token-level model
        layers: depths: token layers and backbone together
        vocab_size: entries of both models
        context: tokens before the new one
        sentence_tokens: tokens of every sentence
        dtype: of weights and caches
    """
    from data_prep.common.environment import write_result
    from pipeline.costs import generation_bound

    result = generation_bound.run(recipe, against, layers, vocab_size, context, sentence_tokens, dtype)
    write_result(result, output)
    answer(result, json, generation_bound.format_bound)


@benchmark.command
def serve(
    *,
    model: Words = (),
    url: Words = (),
    rate: Annotated[Sequence[float], Parameter(consume_multiple=True)] = (),
    clients: Several = (),
    seconds: float = 30.0,
    prompts: str | None = None,
    max_tokens: Positive = 64,
    temperature: float = 1.0,
    rows: Positive = 32,
    output: Output = None,
    json: Json = False,
) -> None:
    """Servers under load, side by side: tokens per second and per second of the CPU, percentiles of the time
    to the first token, failures, and whether each text is the one that its seed gives alone.

    example:
      sllm benchmark serve --model models/sllm models/lm --rate 2 8 32 --clients 64 --output serving.json

    Args:
        model: model folders; each gets a server on this machine
        url: running servers of OpenAI's API (the key: OPENAI_API_KEY)
        rate: requests per second that arrive whether or not others are answered; several loads
        clients: clients that each ask again at once; several loads
        seconds: how long requests arrive under each load
        prompts: JSON lines, each with `prompt` (default: seven openings)
        max_tokens: most new tokens of a text
        temperature: of sampling
        rows: texts that the servers of --model generate at once
    """
    import os

    from data_prep.common.extras import import_extra

    for package in ("openai", "starlette"):
        import_extra(package, "serve")
    from pipeline.cli.generate import read_prompts
    from pipeline.serving import benchmark as serving

    texts = serving.PROMPTS if prompts is None else [str(line["prompt"]) for line in read_prompts(prompts)]
    asked = serving.Asked(texts, max_tokens, temperature)
    key = os.environ.get("OPENAI_API_KEY") or "none"
    result = serving.run(model, url, rate, clients, seconds, asked, rows, key, output)
    answer(result, json, serving.format_serving)
