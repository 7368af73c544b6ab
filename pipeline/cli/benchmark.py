"""`sllm benchmark train` and `benchmark generation`: speed and memory on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pipeline.cli.options import Json, answer, app
from pipeline.costs.options import GenerationBenchmark, TrainingBenchmark

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
