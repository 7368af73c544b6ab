"""`sllm inspect`: parameters, multiply-adds per token, and memory per GPU of a recipe's model under each ZeRO
stage and world size.

Needs no memory and no shards: the real model runs one step, forward and backward, on tensors that have shapes
only: in bf16 on the meta device, on the paths that a GPU takes, in fp32 as on a CPU. Operations are counted
from the rows that reach each layer, activations from the tensors alive during the step, so the figures follow
the code. `benchmark_training.py` measures the same on hardware.

The synthetic bin has windows of `data.window_tokens` that fill `data.bin_tokens`, with sentences of
`TOKENS_PER_SENTENCE` tokens on average (the clause cut of English with OPT's tokenizer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from data_prep.common.errors import UserError
from data_prep.common.page import to_plain
from pipeline.common.text import FILTERS
from pipeline.config.deepspeed_config import micro_batches
from pipeline.config.library import RECIPES, find_recipe
from pipeline.config.schema import Recipe
from pipeline.costs.options import Cluster
from pipeline.costs.sized_recipe import DTYPES, Vocabulary, sized_recipe
from pipeline.costs.zero import (
    Calls,
    Strategy,
    Weights,
    exposed_seconds,
    gathered_weights,
    peak_memory,
    recorded_calls,
    states_memory,
    traffic,
    with_backward,
)
from pipeline.data.batch import Batch, build_batch
from pipeline.data.windows import Span
from pipeline.models import flops
from pipeline.models.factory import new_model
from pipeline.models.folders import model_config, parameter_count
from pipeline.models.layers import checkpoint_layers, transformer_layers
from pipeline.models.lora import add_lora, is_adapter
from pipeline.training.optimizer import parameter_groups

TOKENS_PER_SENTENCE = 10.9
WORLDS = (1, 8, 64)

STRATEGIES = ("zero0", "zero1", "zero2", "zero3", "zero3-offload")

# Millions, from the paper's main table (arXiv 2408.00655), which has no 1.3B-H4 and no SentenceVAE alone.
PUBLISHED = {
    "sllm-125m-h1": 214.3,
    "sllm-125m-h2": 226.1,
    "sllm-125m-h4": 249.8,
    "sllm-350m-h1": 429.5,
    "sllm-350m-h2": 450.5,
    "sllm-350m-h4": 492.5,
    "sllm-1.3b-h1": 1606.0,
    "sllm-1.3b-h2": 1690.0,
}


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Parameters of every part; a shared one counts once, in the first part that has it."""
    parts, counts, seen = flops.part_of(model), dict.fromkeys(flops.PARTS, 0), set[int]()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[parts[name]] = counts.get(parts[name], 0) + parameter.numel()
    return {part: count for part, count in counts.items() if count}


def body_parameters(model: nn.Module) -> int:
    """Parameters without embeddings (of tokens and positions, in any part) and vocabulary head."""
    parts, seen = flops.part_of(model), dict[int, tuple[bool, int]]()
    for name, module in model.named_modules():
        outside = isinstance(module, nn.Embedding) or parts[name] in ("embedding", "head")
        for parameter in module.parameters(recurse=False):
            seen[id(parameter)] = (seen.get(id(parameter), (False,))[0] or outside, parameter.numel())
    return sum(count for outside, count in seen.values() if not outside)


# One step on fake tensors --------------------------------------------------------------------------------


class AsOnCuda(TorchFunctionMode):
    """Takes the operators of CUDA for attention with a mask and for dropout, where the meta device takes
    several others."""

    def __enter__(self) -> Any:
        self._asked = torch.is_autocast_enabled
        torch.is_autocast_enabled = lambda *_: False  # older torch does not know the meta device there
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.is_autocast_enabled = self._asked
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _efficient_attention(*args, **given)
        if func is F.dropout and given["p"] and given["training"]:
            return torch.native_dropout(args[0], given["p"], True)[0]
        return func(*args, **given)


def _efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), float("-inf"))
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, bias, True, dropout, is_causal, scale=scale)[0]


def of_shapes(recipe: Recipe, vocabulary: Vocabulary, dtype: torch.dtype) -> nn.Module:
    """The recipe's model for training on a GPU, on the meta device."""
    with torch.device("meta"):
        return _trained(new_model(recipe, vocabulary, {}).to(dtype), recipe)


def _trained(model: nn.Module, recipe: Recipe) -> nn.Module:
    fake = next(model.parameters()).device
    with torch.device("meta"):  # peft would move what it makes, and tensors without values do not move
        add_lora(model, recipe.model.lora)
    for name, weight in [*model.named_parameters()] if fake.type != "meta" else ():
        if is_adapter(name):
            part, _, last = name.rpartition(".")
            setattr(model.get_submodule(part), last, nn.Parameter(torch.empty_like(weight, device=fake)))
    parameter_groups(model, recipe.optimizer)  # freezes what the recipe freezes
    for module in model.train().modules():
        # Older transformers draw a number for each layer even at 0, and tensors without values have none.
        module.training &= not hasattr(module, "layerdrop")
    return model


def _varlen_workspace(query: Tensor, segments: int) -> int:
    """Bytes inside of the backward kernel of varlen attention: fp32 gradients of the queries and a sum for
    each, with 128 rows more for every segment (FlashAttention 2, `mha_varlen_bwd`)."""
    rows, heads, width = query.shape
    wide = -(-width // 32) * 32 if width <= 192 else 256
    return 4 * (rows + 128 * segments) * heads * (wide + 1)


class _Memory(TorchDispatchMode):
    """Records when each tensor's storage is allocated and freed.

    events: (key, bytes), negative when freed. keys: the key of every live storage. widths: last dimension of
    the first tensor seen on a storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.keys = WeakIdKeyDictionary()
        self.widths: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        if func._schema.name == "torch_attn::_varlen_attn_backward":
            size = _varlen_workspace(args[1], len(args[6]) - 1)
            self.events += [(-1, size), (-1, -size)]
        return out

    def see(self, tensor: Tensor) -> int:
        """The key of a tensor's storage; a new storage is recorded as allocated."""
        storage = tensor.untyped_storage()
        if storage not in self.keys:
            key, size = len(self.widths), storage.nbytes()
            self.keys[storage] = key
            self.widths[key] = tensor.shape[-1] if tensor.ndim else 1
            self.events.append((key, size))
            weakref.finalize(storage, self.events.append, (key, -size)).atexit = False
        return self.keys[storage]

    def peak(self, shares: Mapping[int, float], others: float = 1.0) -> int:
        """Peak of live bytes, in which a storage counts by its share, or by that of all others."""
        alive = most = 0.0
        for key, size in self.events:
            alive += shares.get(key, others) * size
            most = max(most, alive)
        return round(most)


@dataclasses.dataclass
class DryStep:
    """Costs of one step. `logits`: bytes in rows as wide as the vocabulary, at their peak. gradients: bytes
    of all gradients. alive: bytes of the activations and a share of the gradients, at their peak. calls: of
    the model's submodules (`zero.with_backward`). training: multiply-adds of forward and backward, recomputed
    ones included."""

    operations: flops.Operations
    training: int
    logits: int
    gradients: int
    alive: Callable[[float], int]
    calls: Calls

    @property
    def activations(self) -> int:
        return self.alive(0)


def made_up_batch(window_tokens: int, bin_tokens: int, tokens_per_sentence: float, longest: int) -> Batch:
    """A batch of full windows that fill the bin, with sentences of about `tokens_per_sentence` tokens."""
    spans = []
    for _ in range(max(1, bin_tokens // window_tokens)):
        sentences = max(1, round(window_tokens / tokens_per_sentence), -(-window_tokens // longest))
        ends = np.round(np.arange(sentences + 1) * (window_tokens / sentences)).astype(np.int64)
        spans.append(Span(np.zeros(window_tokens, dtype=np.int64), np.diff(ends), True))
    return build_batch(spans)


def dry_step(
    model: nn.Module,
    batch: Batch,
    checkpointing: bool = False,
    again: Callable[[], Any] = contextlib.nullcontext,
) -> DryStep:
    """Run forward and backward of a model made under a `FakeTensorMode`, inside that mode. again: the mode in
    which layers are computed again, where the backward pass leaves it."""
    memory = _Memory()
    weights = {memory.see(parameter) for parameter in model.parameters()}
    weights |= {memory.see(buffer) for buffer in model.buffers()}
    if checkpointing:
        checkpoint_layers(model, again)
    with memory, recorded_calls(model) as calls:
        with flops.counted_rows(model) as rows:
            objective = model(batch).objective
        forward = calls.copy()
        objective.backward()
    made = [p.grad for p in model.parameters() if p.grad is not None]
    gradients = {memory.see(gradient) for gradient in made}
    vocabulary, none = _vocabulary(model), dict.fromkeys(weights, 0.0)
    logits = {key for key, width in memory.widths.items() if width == vocabulary}
    # Without what the tensors' ends will add.
    memory.events = memory.events.copy()
    operations = flops.count_operations(model, rows, flops.batch_cores(model, batch))
    repeated = sum(operations.by_part().get(part, 0) for part in flops.IN_LAYERS) if checkpointing else 0
    return DryStep(
        operations,
        flops.TRAINING_FACTOR * operations.needed + repeated,
        memory.peak(dict.fromkeys(logits, 1.0) | none | dict.fromkeys(gradients, 0.0), others=0.0),
        sum(gradient.nbytes for gradient in made),
        functools.cache(lambda share: memory.peak(none | dict.fromkeys(gradients, share))),
        with_backward(forward, calls[len(forward) :], transformer_layers(model)),
    )


def _vocabulary(model: nn.Module) -> int:
    return model_config(model).vocab_size


class DryRun:
    """Steps of a recipe's model without memory.

    vocab_size: of the tokenizer (default: the recipe's, else OPT's).
    """

    def __init__(
        self,
        recipe: Recipe,
        vocab_size: int | None,
        dtype: str,
        tokens_per_sentence: float = TOKENS_PER_SENTENCE,
    ):
        if not 1 <= tokens_per_sentence < math.inf:
            raise UserError(f"--tokens-per-sentence must be at least 1, not {tokens_per_sentence}")
        own = recipe.reading_part.get("vocab_size")
        self.recipe, self.dtype, self.tokens_per_sentence = recipe, dtype, tokens_per_sentence
        self.vocabulary = Vocabulary(vocab_size or own or Vocabulary().vocab_size)

    def step(self, tokens: int, checkpointing: bool) -> tuple[nn.Module, Batch, DryStep]:
        """A step of one bin of `tokens`, and the model and batch it ran."""
        longest = self.recipe.reading_part.get("max_sentence_tokens") or 64
        window = min(self.recipe.data.window_tokens, tokens)
        batch = made_up_batch(window, tokens, self.tokens_per_sentence, longest)
        if self.dtype != "fp32":  # as on a GPU
            batch, model = batch.to("meta"), of_shapes(self.recipe, self.vocabulary, DTYPES[self.dtype])
            with AsOnCuda():
                return model, batch, dry_step(model, batch, checkpointing, AsOnCuda)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = _trained(new_model(self.recipe, self.vocabulary, {}), self.recipe)
            return model, batch, dry_step(model, batch, checkpointing)


# The command -----------------------------------------------------------------------------------------------


def inspect(
    recipe: str | Path,
    vae_recipe: str | Path | None = None,
    vocab_size: int | None = None,
    tokens: int | None = None,
    tokens_per_sentence: float = TOKENS_PER_SENTENCE,
    worlds: Sequence[int] = WORLDS,
    dtype: str = "bf16",
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """Parameters, operations and memory of a recipe's model, as plain JSON (docs/performance.md).

    Args:
        recipe: file, or name of a recipe that ships with the package. vae_recipe: see `sized_recipe`.
        vocab_size: of the tokenizer (default: the recipe's, else OPT's 50,272).
        tokens: bin size (default: the recipe's `data.bin_tokens`).
        dtype: of weights and activations: `bf16` (GPUs) or `fp32` (CPUs).
        cluster: in place of `worlds`: also the traffic and time of a step there.
    Raises: UserError for a recipe that does not build a model.
    """
    sized = sized_recipe(recipe, vae_recipe)
    run = DryRun(sized, vocab_size, dtype, tokens_per_sentence)
    strategies = {name: Strategy.read(name) for name in (cluster.strategy if cluster else ()) or STRATEGIES}
    model, batch, step = run.step(tokens or sized.data.bin_tokens, sized.training.activation_checkpointing)
    usual = micro_batches(sized.data.bins_per_step, cluster.world if cluster else 1)

    def weights(strategy: Strategy, accumulation: int = usual) -> Weights:
        return gathered_weights(model, step.calls, strategy, accumulation)

    memory = []
    for (name, strategy), world in itertools.product(
        strategies.items(), [cluster.world] if cluster else worlds
    ):
        states = states_memory(weights(strategy), strategy, world, dtype, sized.training.ema is not None)
        total = peak_memory(states, step.alive, step.gradients, usual)
        row = {"stage": name.removeprefix("zero"), "world": world, **states}
        memory.append({**row, "activations": step.activations, "total": total})
    operations = step.operations
    return {
        "recipe": find_recipe(recipe).stem,
        "objective": sized.objective,
        "dtype": dtype,
        "bin": {"tokens": batch.tokens, "sentences": batch.sentences, "windows": batch.documents},
        "vocab_size": _vocabulary(model),
        "parameters": {
            "total": parameter_count(model),
            "by_part": parameters_by_part(model),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "adapters": sum(p.numel() for name, p in model.named_parameters() if is_adapter(name)),
        },
        "multiply_adds_per_token": {
            "by_part": {part: count / batch.tokens for part, count in operations.by_part().items()},
            "forward": operations.needed / batch.tokens,
            "training": flops.TRAINING_FACTOR * operations.needed / batch.tokens,
            "attention_cores": sum(operations.attention.values()) / batch.tokens,
            "padding_share": operations.padding_share,
        },
        "step_memory": {
            "activations": step.activations,
            "of_which_logits": step.logits,
            "peak_one_process": sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            + step.alive(1),
        },
        "memory_per_gpu": memory,
        "traffic": [
            {
                "strategy": name,
                **step_costs(strategy, weights(strategy, count), step.training, cluster, count, dtype),
            }
            for name, strategy in strategies.items()
            for count in cluster.accumulation or [usual]
        ]
        if cluster
        else [],
    }


def step_costs(
    strategy: Strategy,
    weights: Weights,
    multiply_adds: float,
    cluster: Cluster,
    accumulation: int,
    dtype: str,
) -> dict[str, Any]:
    """Bytes that a rank sends in a step of `accumulation` micro-batches, and the step's seconds.

    Args:
        multiply_adds: of forward and backward of one micro-batch.
    """
    sent = traffic(strategy, weights, cluster.world, accumulation, dtype)
    compute = 2 * multiply_adds * accumulation / (cluster.tflops * 1e12)
    exposed = exposed_seconds(sent, strategy, weights, compute, cluster.link)
    return {
        "world": cluster.world,
        "accumulation": accumulation,
        "gradient_bytes": round(sent.gradients),
        "weight_bytes": round(sent.weights),
        "sent_bytes": round(sent.sent),
        "compute_seconds": compute,
        "network_seconds": sent.sent * 8 / cluster.link / 1e9,
        "exposed_seconds": exposed,
        "step_seconds": compute + exposed,
        "efficiency": compute / (compute + exposed),
    }


def inspect_all(vocab_size: int | None = None) -> dict[str, Any]:
    """One row per published size: our parameters, those of `layout: paper`, and the paper's count."""
    rows, vocabulary = [], Vocabulary(vocab_size or Vocabulary().vocab_size)
    for path in sorted([*RECIPES.glob("svae-*.yaml"), *RECIPES.glob("sllm-*-h*.yaml")]):
        recipe, counts = sized_recipe(path), {}
        for layout in ("lean", "paper"):
            recipe.model.vae["layout"] = layout
            with torch.device("meta"):
                counts[layout] = parameter_count(new_model(recipe, vocabulary, {}))
        rows.append({"recipe": path.stem, "parameters": counts, "paper_millions": PUBLISHED.get(path.stem)})
    return {"vocab_size": vocabulary.vocab_size, "sizes": rows}


def format_inspection(result: dict[str, Any]) -> str:
    """The result of `inspect` as text."""
    values = {**result, "parts": flops.PARTS, "factor": flops.TRAINING_FACTOR}
    return to_plain(Path(__file__).with_name("inspect.md.jinja"), values, FILTERS)


def format_all(result: dict[str, Any]) -> str:
    """The result of `inspect_all` as text."""
    return to_plain(Path(__file__).with_name("inspect_all.md.jinja"), result, FILTERS)
