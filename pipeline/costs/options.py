"""What the benchmarks are asked to measure. Imports nothing heavy: the fields are options of the commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from data_prep.common.command_line import Positive, whole_number

SIDES = ("model", "against")  # what is measured, and what it is compared with
Several = Annotated[Sequence[Positive], Parameter(consume_multiple=1)]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a model is to be trained.

    Args:
        nodes: machines
        gpus: GPUs of each
        bandwidth: Gbit/s of the slowest link of a ring through all GPUs: of a machine's network, or of one
            GPU if there is one machine (default: 400, or 3600)
        tflops: 10^12 operations per second that a GPU reaches (400: 40 % of an H100's bf16 peak)
        strategy: files of ds_configs/ (default: every ZeRO stage)
        accumulation: micro-batches of a step (default: what the recipe's data.bins_per_step asks for)
    """

    nodes: Positive = 1
    gpus: Positive = 8
    bandwidth: Annotated[float | None, Parameter(validator=validators.Number(gt=0))] = None
    tflops: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 400
    strategy: Annotated[Sequence[str], Parameter(alias="--deepspeed-config", consume_multiple=1)] = ()
    accumulation: Several = ()

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    @property
    def link(self) -> float:
        """Gbit/s of the slowest link of the ring."""
        return self.bandwidth or (400 if self.nodes > 1 else 3600)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What both benchmarks share.

    Args:
        recipe: recipe file, or the name of one that ships with the package
        vae_recipe: recipe of the SentenceVAE where model.vae.path does not exist (default: by its name)
        runs: runs of each
        threads: CPU threads (default: all cores)
        no_memory: do not measure memory (CPU: a process per model)
        output: also write the figures to this file, as JSON
    """

    recipe: str
    vae_recipe: str | None = None
    runs: Positive = 5
    threads: Positive | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    no_memory: bool = False
    output: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark(Benchmark):
    """Forward and backward of two models, by turns.

    Args:
        against: opt-125m, opt-350m or opt-1.3b (Hugging Face's model and loss), a recipe, or a model folder
        data: shard folder (default: the recipe's data.shards)
        tokens: tokens of a step
        step: with the update of the optimizer
    """

    against: str | None = None
    data: Annotated[str | None, Parameter(alias="--shards")] = None
    tokens: Positive = 8192
    step: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationBenchmark(Benchmark):
    """Sentences written by two models, by turns.

    Args:
        against: opt-125m, opt-350m or opt-1.3b, or a recipe of the objective lm
        engine: runs the other model: Hugging Face's generate (hf-static: preallocated cache), CTranslate2 or
            llama.cpp (Llamas, by llama-cpp-python)
        vocab_size: entries of both models (default: what a recipe says, else OPT's 50,272)
        batch: texts at once
        context: tokens of the prompts
        sentence_tokens: tokens of every sentence
        sentences: new sentences per text
        int8: weights in 8 bits (CPU; of the other model by CTranslate2 and llama.cpp, docs/generation.md)
        columns: lay the other model's matrices out by columns too
    """

    against: str | None = None
    engine: Literal["hf", "hf-static", "ctranslate2", "llama.cpp"] = "hf"
    vocab_size: Annotated[int, whole_number(5)] | None = None
    batch: Several = (1,)
    context: Several = (256,)
    sentence_tokens: Positive = 11
    sentences: Positive = 5
    int8: bool = False
    columns: bool = False
