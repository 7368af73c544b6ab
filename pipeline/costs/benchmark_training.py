"""`sllm benchmark train`: real tokens per second of forward and backward on real text, compared with OPT of a
published size, another recipe, or a Hugging Face folder.

Both models are in one process and alternate (A B A B …), so that noise of the machine affects both. Ours gets
bins as in training. A Hugging Face model gets the same text in full rows of 1,024 tokens without padding, and
computes its own loss (`labels=`) with its own SDPA attention: its best case. Both run without dropout. Only
real tokens of the text count: no BOS, end symbols or padded slots.

arithmetic  multiply-adds of the forward pass, counted from the rows that reach each layer, times 3 for
            training, against the fastest matrix product of the model's shapes in the same run: the limit of
            this machine, and the share of it that was reached
memory      each model in its own process: memory before a forward and backward pass, and its peak

Not yet tested on CUDA: `--device cuda --dtype bf16` (weights in bf16, as in DeepSpeed's bf16 mode).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from data_prep.common.environment import write_result
from data_prep.common.errors import UserError, counted, log
from data_prep.common.measuring import in_new_process, memory_field, spread
from data_prep.common.page import Show, columns, to_text
from data_prep.shards.reader import ShardSet
from pipeline.common.text import gigabytes, millions
from pipeline.config.library import find_recipe
from pipeline.config.schema import Recipe
from pipeline.costs.benchmark import (
    OPT_SIZES,
    OPT_VOCABULARY,
    conditions,
    published_opt,
    reset_peak,
    start,
)
from pipeline.costs.options import SIDES, TrainingBenchmark
from pipeline.costs.sized_recipe import DTYPES, sized_recipe
from pipeline.data.batch import Batch, build_batch
from pipeline.data.plan import Bin, BinPlan
from pipeline.models import flops
from pipeline.models.factory import new_model
from pipeline.models.flops import TRAINING_FACTOR, Core, Operations
from pipeline.models.folders import KINDS, load_pretrained, parameter_count, read_config
from pipeline.training.optimizer import new_optimizer

ROW_TOKENS = 1024  # of a Hugging Face model's rows
# Of one timed matrix product: long enough to time on this kind of device, and still short.
GEMM_MULTIPLY_ADDS = {"cpu": 1 << 34, "cuda": 1 << 38}
LONG_SECONDS = 1.0  # a measurement that is not repeated


@dataclass
class Settings:
    """Settings of both sides. `recipe` is the measured one; its data settings define the text."""

    recipe: Recipe
    name: str
    shards: ShardSet
    tokens: int
    dtype: str
    device: torch.device


class Bins:
    """Batches of a shard set by number, as in a recipe's training."""

    def __init__(self, shards: ShardSet, recipe: Recipe, tokens: int):
        self._plan = BinPlan(
            [shards],
            recipe.data.window_tokens,
            tokens,
            recipe.seed,
            by_rule=recipe.model.ends == "rule",
        )
        self._stream, self._bins = self._plan.bins(), list[Bin]()

    def __getitem__(self, number: int) -> tuple[Bin, Batch]:
        """A new batch every time, because computing layouts and indices is part of a step."""
        while len(self._bins) <= number:
            self._bins.append(next(self._stream))
        return self._bins[number], build_batch(self._plan.spans(self._bins[number]))


class RecipeModel:
    """One side of the comparison: a recipe's model on its bins.

    `prepare(turn)` makes the inputs of a turn with `tokens` real tokens, `loss()` computes their mean loss,
    `cores()` their attention cores.
    """

    def __init__(self, recipe: Recipe, name: str, settings: Settings):
        self.name, self._recipe, self._device = name, recipe, settings.device
        self.optimizer = recipe.optimizer
        torch.manual_seed(recipe.seed)
        with settings.device:  # a GPU draws the weights of 1.3B in a second, a CPU in half a minute
            model = new_model(recipe, settings.shards.tokenizer(), settings.shards.settings.to_dict())
        self.model = _placed(model, settings)
        self._bins = Bins(settings.shards, recipe, settings.tokens)

    def prepare(self, turn: int) -> None:
        bin_, batch = self._bins[turn]
        self._batch = batch.to(self._device)
        self._targets = bin_.targets(self._recipe.counted_as, self._recipe.data.sentence_ends)
        self.tokens = batch.tokens

    def loss(self) -> Tensor:
        return self.model(self._batch).objective / self._targets

    def cores(self) -> list[Core]:
        return flops.batch_cores(self.model, self._batch)


class PlainModel:
    """One side of the comparison: a Hugging Face causal LM on full rows of the text of the recipe's bins."""

    def __init__(self, model: nn.Module, name: str, settings: Settings):
        self.name, self._device = name, settings.device
        # The recipe's parts are of another model.
        self.optimizer = settings.recipe.optimizer.model_copy(update={"parts": {}, "kind": "adamw"})
        self.model = _placed(model, settings)
        self._bins, self._bins_read = Bins(settings.shards, settings.recipe, settings.tokens), 0
        self._length = min(ROW_TOKENS, settings.tokens)
        self._rows = settings.tokens // self._length
        self._text = np.zeros(0, dtype=np.int64)

    def prepare(self, turn: int) -> None:
        size = self._rows * self._length
        while len(self._text) < (turn + 1) * size:
            _, batch = self._bins[self._bins_read]
            self._text = np.concatenate([self._text, batch.tokens_T.numpy()])
            self._bins_read += 1
        rows = self._text[turn * size : (turn + 1) * size].reshape(self._rows, self._length)
        self._ids, self.tokens = torch.from_numpy(rows).to(self._device), size

    def loss(self) -> Tensor:
        return self.model(input_ids=self._ids, labels=self._ids, use_cache=False).loss

    def cores(self) -> list[Core]:
        return flops.row_cores(self.model, self._rows, self._length)


Side = RecipeModel | PlainModel


def _placed(model: nn.Module, settings: Settings) -> nn.Module:
    # eval: no dropout and no noise on either side; gradients are still computed.
    return model.to(settings.device, DTYPES[settings.dtype]).eval()


def make_side(side: str, options: TrainingBenchmark, settings: Settings) -> Side:
    """The recipe's model, or the one it is measured against, with random weights.

    Raises: UserError for an unknown `--against`, or one whose vocabulary is too small for the text.
    """
    if side == "model":
        return RecipeModel(settings.recipe, settings.name, settings)
    against, vocabulary = options.against, settings.shards.tokenizer().vocab_size
    if against in OPT_SIZES:
        with settings.device:
            opt = published_opt(against, max(OPT_VOCABULARY, vocabulary))
        return PlainModel(opt, against, settings)
    if find_recipe(against).is_file():
        recipe = _fitting(sized_recipe(against), settings.tokens)
        return RecipeModel(recipe, find_recipe(against).stem, settings)
    if not Path(against).is_dir():
        raise UserError(
            f"--against {against}: neither {', '.join(OPT_SIZES)}, nor a recipe, nor a model folder"
        )
    if (model_type := read_config(against).get("model_type")) in KINDS:
        raise UserError(f"--against {against}: holds a {model_type}; give its recipe instead")
    model = load_pretrained(AutoModelForCausalLM, against, attn_implementation="sdpa")
    if model.config.vocab_size < vocabulary:
        raise UserError(
            f"--against {against}: vocabulary of {model.config.vocab_size}, but the shards' tokenizer has "
            f"{counted(vocabulary, 'entry', 'entries')}"
        )
    return PlainModel(model, Path(against).name, settings)


def _fitting(recipe: Recipe, tokens: int) -> Recipe:
    recipe.data.window_tokens = min(recipe.data.window_tokens, tokens)
    return recipe


# Measuring ------------------------------------------------------------------------------------------------


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    _synchronise(device)
    started = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - started


class Stepper:
    """Forward and backward of one side, optionally with the optimizer's update."""

    def __init__(self, side: Side, with_update: bool):
        self.side = side
        self._optimizer = new_optimizer(side.model, side.optimizer)[0] if with_update else None

    def __call__(self) -> None:
        self.side.loss().backward()
        if self._optimizer is not None:
            self._optimizer.step()

    def clear(self) -> None:
        self.side.model.zero_grad(set_to_none=True)


def count(side: Side) -> tuple[Operations, dict[str, int]]:
    """Multiply-adds of one forward pass over the prepared inputs, and the rows of each linear layer."""
    with flops.counted_rows(side.model) as rows, torch.no_grad():
        side.loss()
    return flops.count_operations(side.model, rows, side.cores()), rows


def matmul_speeds(side: Side, rows: dict[str, int]) -> list[dict[str, Any]]:
    """FLOP/s of a plain matrix product of each shape with at least 1 % of the linear layers' work: best of
    three, with fewer rows for large products."""
    parameter = next(side.model.parameters())
    modules = dict(side.model.named_modules())
    shapes: dict[tuple[int, int], list[int]] = {}
    for name, reached in rows.items():
        shapes.setdefault(tuple(modules[name].weight.shape), []).append(reached)
    works = {shape: sum(reached) * shape[0] * shape[1] for shape, reached in shapes.items()}
    speeds = []
    for (wide, narrow), work in sorted(works.items(), key=lambda item: -item[1]):
        if work * 100 < sum(works.values()):
            continue
        most = max(shapes[wide, narrow])
        height = max(1, min(most, GEMM_MULTIPLY_ADDS[parameter.device.type] // (wide * narrow)))
        x = torch.randn(height, narrow).to(parameter)
        w = torch.randn(wide, narrow).to(parameter)
        seconds = min(_timed(parameter.device, partial(torch.mm, x, w.t())) for _ in range(3))
        speeds.append(
            {"rows": height, "in": narrow, "out": wide, "gflops": 2e-9 * height * narrow * wide / seconds}
        )
    return speeds


def products_seconds(side: Side, rows: dict[str, int]) -> float:
    """Seconds of the linear layers' matrix products alone, forward and backward, with the rows that reach
    each layer: best of three, or one if that is long."""
    modules = dict(side.model.named_modules())
    weights = [(modules[name].weight.detach(), reached) for name, reached in rows.items()]

    def all_products() -> None:
        for weight, reached in weights:
            x, slope = inputs[weight.shape[1], reached], inputs[weight.shape[0], reached]
            torch.mm(x, weight.t())
            torch.mm(slope, weight)
            torch.mm(slope.t(), x)

    shapes = {(width, reached) for weight, reached in weights for width in weight.shape}
    inputs = {(width, reached): torch.randn(reached, width).to(weights[0][0]) for width, reached in shapes}
    device = weights[0][0].device
    taken = [_timed(device, all_products)]
    if taken[0] < LONG_SECONDS:
        taken += [_timed(device, all_products) for _ in range(2)]
    return min(taken)


def step_memory(side: Side, stepper: Stepper, device: torch.device) -> dict[str, int]:
    """Bytes `before` a step (weights), at its `peak`, and the difference as `step`.

    On a CPU the process's resident memory (VmHWM) including libraries; on CUDA PyTorch's allocations, after a
    first step.
    Raises: UserError if Linux's /proc is missing or not writable.
    """
    side.prepare(0)
    if device.type == "cuda":
        stepper()
        stepper.clear()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        stepper()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        x = torch.randn(64, 64, requires_grad=True)
        torch.mm(x, x).sum().backward()  # allocates the buffers of libraries
        reset_peak()
        before = memory_field("VmHWM")
        stepper()
        peak = memory_field("VmHWM")
    return {"before": before, "peak": peak, "step": peak - before}


def memory_of(name: str, options: TrainingBenchmark) -> dict[str, int]:
    """`step_memory` of one side. Memory that the other one leaves behind would count too: call it in a new
    process."""
    settings = _settings(options)
    side = make_side(name, options, settings)
    return step_memory(side, Stepper(side, options.step), settings.device)


# The command ----------------------------------------------------------------------------------------------


def run(options: TrainingBenchmark) -> dict[str, Any]:
    """Measure what the options ask for; the result is plain JSON.

    Raises: UserError on bad options.
    """
    settings = _settings(options)
    # In a separate function: the models are freed before memory is measured.
    figures, peak = _side_by_side(options, settings)
    if settings.device.type == "cuda":  # PyTorch keeps what they held, and other processes need it now
        gc.collect()
        torch.cuda.empty_cache()
    if not options.no_memory:
        for name in figures:
            figures[name]["memory_bytes"] = in_new_process(memory_of, name, options)
            log(f"memory, {figures[name]['name']}: {figures[name]['memory_bytes']['peak'] / 1e9:.2f} GB")
    totals = settings.shards.manifest["totals"]
    result = {
        **conditions(options),
        "tokens": options.tokens,
        "with_update": options.step,
        "shards": {
            "fingerprint": settings.shards.fingerprint,
            "segmenter": settings.shards.settings.segmenter,
            "tokens_per_sentence": totals["tokens"] / totals["sentences"],
        },
        "peak_gflops": peak,
        **figures,
    }
    if "against" in figures:
        result["ratios"] = _ratios(figures["model"], figures["against"])
    write_result(result, options.output)
    return result


def _side_by_side(options: TrainingBenchmark, settings: Settings) -> tuple[dict[str, dict[str, Any]], float]:
    """Speed and arithmetic of each side, by its name in `SIDES`; the best matrix product, GFLOP/s."""
    sides = {name: make_side(name, options, settings) for name in SIDES[: 2 if options.against else 1]}
    steppers = {name: Stepper(side, options.step) for name, side in sides.items()}
    counted = {}
    for name, side in sides.items():  # counts, and warms up
        side.prepare(0)
        counted[name] = *count(side), side.tokens
        steppers[name]()
        steppers[name].clear()
    speeds = {name: matmul_speeds(side, counted[name][1]) for name, side in sides.items()}
    alone = {name: products_seconds(side, counted[name][1]) for name, side in sides.items()}
    taken: dict[str, list[tuple[int, float]]] = {name: [] for name in sides}
    for turn in range(options.runs):
        for name, side in sides.items():
            side.prepare(turn + 1)
            seconds = _timed(settings.device, steppers[name])
            steppers[name].clear()
            taken[name].append((side.tokens, seconds))
            log(f"run {turn + 1} of {options.runs}, {side.name}: {side.tokens / seconds:.1f} tokens/s")
    peak = max(shape["gflops"] for shapes in speeds.values() for shape in shapes)
    figures = {}
    for name, side in sides.items():
        operations, tokens = counted[name][0], counted[name][2]
        figures[name] = _figures(side, operations, tokens, speeds[name], taken[name], peak)
        figures[name]["matmul_only_tokens_per_second"] = tokens / alone[name]
    return figures, peak


def _settings(options: TrainingBenchmark) -> Settings:
    device = start(options)
    recipe = _fitting(sized_recipe(options.recipe, options.vae_recipe), options.tokens)
    shards = ShardSet.open(options.data or recipe.data.shards[0])
    return Settings(recipe, find_recipe(options.recipe).stem, shards, options.tokens, options.dtype, device)


def _figures(
    side: Side,
    operations: Operations,
    tokens: int,
    speeds: list[dict],
    taken: list[tuple[int, float]],
    peak: float,
) -> dict[str, Any]:
    """Figures of one side's turns. `peak`: the fastest matrix product of either side, GFLOP/s."""
    per_token = operations.needed / tokens
    rates = [real / seconds for real, seconds in taken]
    median = statistics.median(rates)
    limit = peak * 1e9 / (2 * TRAINING_FACTOR * per_token)
    figures = {
        "name": side.name,
        "parameters": parameter_count(side.model),
        "tokens": [real for real, _ in taken],
        "seconds": [seconds for _, seconds in taken],
        "tokens_per_second": spread(rates),
        "multiply_adds_per_second": median * TRAINING_FACTOR * per_token,
        "multiply_adds_per_token": {
            "by_part": {part: n / tokens for part, n in operations.by_part().items()},
            "forward": per_token,
            "training": TRAINING_FACTOR * per_token,
        },
        "padding_share": operations.padding_share,
        "matmul_gflops": speeds,
        "limit_tokens_per_second": limit,
        "share_of_limit": median / limit,
    }
    if (device := next(side.model.parameters()).device).type == "cuda":
        figures["mfu"] = flops.utilisation(median * TRAINING_FACTOR * per_token, 1.0, device)
    return figures


def _ratios(model: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Ratios of the two sides. `by_turn`: each turn by the one right after it, under the same conditions."""
    pairs = zip(*(side["tokens_per_second"]["values"] for side in (model, against)), strict=True)
    ratios = {
        "tokens_per_second": model["tokens_per_second"]["median"] / against["tokens_per_second"]["median"],
        "by_turn": [ours / theirs for ours, theirs in pairs],
        "limit": model["limit_tokens_per_second"] / against["limit_tokens_per_second"],
        "multiply_adds_per_second": model["multiply_adds_per_second"] / against["multiply_adds_per_second"],
    }
    if "memory_bytes" in model:
        for key in ("peak", "step"):
            ratios[f"memory_{key}"] = model["memory_bytes"][key] / against["memory_bytes"][key]
    return ratios


def _billions(number: float) -> str:
    return f"{number / 1e9:.1f}"


def format_benchmark(result: dict[str, Any]) -> str:
    """The result of `run` as text."""
    sides = [result[name] for name in SIDES if name in result]
    where = result["gpu"] or f"{result['cpu']}, {counted(result['threads'], 'thread')}"
    work = "forward, backward and update" if result["with_update"] else "forward and backward"
    rows: list[tuple[str, str, Show]] = [
        ("parameters", "parameters", ","),
        ("real tokens/s", "tokens_per_second.median", ",.1f"),
        ("multiply-adds per token, forward", "multiply_adds_per_token.forward", millions),
        *((f"  {part}", f"multiply_adds_per_token.by_part.{part}", millions) for part in flops.PARTS),
        ("multiply-adds/s (10⁹)", "multiply_adds_per_second", _billions),
        ("matrix products alone, tokens/s", "matmul_only_tokens_per_second", ",.1f"),
        ("limit, tokens/s", "limit_tokens_per_second", ",.1f"),
        ("share of the limit reached", "share_of_limit", ".1%"),
        ("padding, share of operations", "padding_share", ".2%"),
        ("MFU", "mfu", ".1%"),
        ("peak memory of a step, GB", "memory_bytes.peak", gigabytes),
        ("  beyond what was there before", "memory_bytes.step", gigabytes),
    ]
    lines = [
        f"{work}, {result['dtype']}, {counted(result['tokens'], 'token')} a step, "
        f"{result['shards']['tokens_per_sentence']:.1f} a sentence, {where}; "
        f"medians of {counted(result['runs'], 'run')}; "
        f"best matrix product {result['peak_gflops']:.1f} GFLOP/s",
        "",
        to_text(columns([side["name"] for side in sides], sides, rows)),
    ]
    if ratios := result.get("ratios"):
        turns, allowed = ratios["by_turn"], ratios["limit"]
        line = (
            f"{sides[0]['name']} by {sides[1]['name']}: {ratios['tokens_per_second']:.2f} × the "
            f"tokens/s (turn by turn {min(turns):.2f} to {max(turns):.2f}; arithmetic allows {allowed:.2f}), "
            f"{ratios['multiply_adds_per_second']:.2f} × the multiply-adds/s"
        )
        if "memory_peak" in ratios:
            peak, step = ratios["memory_peak"], ratios["memory_step"]
            line += f", {peak:.0%} of the memory ({step:.0%} of the step's own)"
        lines += ["", line]
    return "\n".join(lines)
