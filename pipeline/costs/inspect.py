"""`sllm inspect`: parameters, multiply-adds per token, and memory per GPU of a recipe's model under each ZeRO
stage and world size.

Needs no memory and no shards: the real model runs one step, forward and backward, on fake tensors, which have
shapes only. Operations are counted from the rows that reach each layer, activations from the tensors alive
during the step, so the figures follow the code. `benchmark_training.py` measures the same on hardware.

The synthetic bin has windows of `data.window_tokens` that fill `data.bin_tokens`, with sentences of
`TOKENS_PER_SENTENCE` tokens on average (the clause cut of English with OPT's tokenizer).
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from data_prep.common.errors import UserError
from data_prep.common.page import to_plain
from pipeline.common.text import FILTERS
from pipeline.config.library import RECIPES, find_recipe
from pipeline.costs.sized_recipe import DTYPES, Vocabulary, sized_recipe
from pipeline.data.batch import Batch, build_batch
from pipeline.data.windows import Span
from pipeline.models import flops
from pipeline.models.factory import new_model
from pipeline.models.folders import model_config, parameter_count

TOKENS_PER_SENTENCE = 10.9
WORLDS = (1, 8, 64)

# DeepSpeed's defaults, as in ds_configs/: elements of one communication buffer; gathered weights that stage 3
# may hold at once (both limits, live and reuse distance).
BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
STAGES = ("0", "1", "2", "3", "3-offload")

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

    def peak(self, leave_out: set[int], only: set[int] | None = None) -> int:
        """Peak of live bytes, without the storages in `leave_out`, or of those in `only` alone."""
        alive = most = 0
        for key, size in self.events:
            if key not in leave_out and (only is None or key in only):
                alive += size
                most = max(most, alive)
        return most


@dataclasses.dataclass
class DryStep:
    """Costs of one step. Bytes at the peak: `activations` without weights and gradients; `logits` those of
    them in rows as wide as the vocabulary; `peak` of weights, gradients and activations together (one
    process, no ZeRO)."""

    operations: flops.Operations
    activations: int
    logits: int
    peak: int


def made_up_batch(window_tokens: int, bin_tokens: int, tokens_per_sentence: float, longest: int) -> Batch:
    """A batch of full windows that fill the bin, with sentences of about `tokens_per_sentence` tokens."""
    spans = []
    for _ in range(max(1, bin_tokens // window_tokens)):
        sentences = max(1, round(window_tokens / tokens_per_sentence), -(-window_tokens // longest))
        ends = np.round(np.arange(sentences + 1) * (window_tokens / sentences)).astype(np.int64)
        spans.append(Span(np.zeros(window_tokens, dtype=np.int64), np.diff(ends), True))
    return build_batch(spans)


def dry_step(model: nn.Module, batch: Batch) -> DryStep:
    """Run forward and backward of a model made under a `FakeTensorMode`, inside that mode."""
    memory = _Memory()
    weights = {memory.see(parameter) for parameter in model.parameters()}
    weights |= {memory.see(buffer) for buffer in model.buffers()}
    with flops.counted_rows(model) as rows, memory:
        model(batch).objective.backward()
    gradients = {memory.see(p.grad) for p in model.parameters() if p.grad is not None}
    vocabulary = _vocabulary(model)
    logits = {key for key, width in memory.widths.items() if width == vocabulary}
    return DryStep(
        flops.count_operations(model, rows, flops.batch_cores(model, batch)),
        memory.peak(weights | gradients),
        memory.peak(weights | gradients, only=logits),
        memory.peak(set()),
    )


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)`, which does not work for fake weights; shared weights stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.to(dtype), parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
    return model


def _vocabulary(model: nn.Module) -> int:
    config = model_config(model)
    return getattr(config, "vae", config).vocab_size


# Memory of a rank ------------------------------------------------------------------------------------------


def states_memory(parameters: int, stage: str, world: int, dtype: str) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW on one rank under a file of `ds_configs/`.

    Per parameter: weights 4 (bf16 2), optimizer 8 for the two moments, and 4 for fp32 master weights, which
    ZeRO keeps in fp32 too. Gradients 4; bf16: 2 as torch makes them, from stage 1 on their sum in fp32 (4).
    Stage 1 divides the optimizer by `world`, 2 also the summed gradients, 3 also the weights.

    gathered: the most that stage 3 gathers for use; below a billion parameters it frees nothing.
    buckets: communication buffers of fixed size. update: temporary memory of the update, after the
    activations are freed (fp32 copies of the gradients; on GPUs PyTorch's AdamW takes 4 more per parameter).
    host: host memory under offloading.
    """
    low = 2 if dtype == "bf16" else 4
    share = -(-parameters // world)
    bucket = BUCKET_ELEMENTS * low
    held = {
        "weights": low * parameters,
        "gathered": 0,
        "gradients": low * parameters,
        "optimizer": 12 * share,
    }
    held |= {"buckets": 0, "update": 8 * share, "host": 0}
    if stage == "0":
        master = 4 if low == 2 else 0
        held |= {"optimizer": (8 + master) * parameters, "update": (4 + master) * parameters}
    elif stage == "1" and low == 2:
        held |= {"gradients": 6 * parameters, "update": 4 * share}
    elif stage == "2":
        held |= {"gradients": 4 * share, "buckets": 2 * bucket}
    elif stage.startswith("3"):
        gathered = low * min(parameters, LIVE_ELEMENTS)
        held |= {"weights": low * share, "gathered": gathered, "gradients": 4 * share, "buckets": bucket}
    if stage == "3-offload":
        host = held["weights"] + held["gradients"] + held["optimizer"]
        held |= {"weights": 0, "gradients": 0, "optimizer": 0, "update": 0, "host": host}
    return held


# The command -----------------------------------------------------------------------------------------------


def inspect(
    recipe: str | Path,
    vae_recipe: str | Path | None = None,
    vocab_size: int | None = None,
    tokens: int | None = None,
    tokens_per_sentence: float = TOKENS_PER_SENTENCE,
    worlds: Sequence[int] = WORLDS,
    dtype: str = "bf16",
) -> dict[str, Any]:
    """Parameters, operations and memory of a recipe's model, as plain JSON (docs/performance.md).

    Args:
        recipe: file, or name of a recipe that ships with the package. vae_recipe: see `sized_recipe`.
        vocab_size: of the tokenizer (default: the recipe's, else OPT's 50,272).
        tokens: bin size (default: the recipe's `data.bin_tokens`).
        dtype: of weights and activations: `bf16` (GPUs) or `fp32` (CPUs).
    Raises: UserError for a recipe that does not build a model.
    """
    sized = sized_recipe(recipe, vae_recipe)
    tokens = tokens or sized.data.bin_tokens
    window = min(sized.data.window_tokens, tokens)
    longest = sized.model.vae.get("max_sentence_tokens") or 64
    if not 1 <= tokens_per_sentence < math.inf:
        raise UserError(f"--tokens-per-sentence must be at least 1, not {tokens_per_sentence}")
    batch = made_up_batch(window, tokens, tokens_per_sentence, longest)
    own = (sized.model.backbone if sized.objective == "lm" else sized.model.vae).get("vocab_size")
    vocab_size = vocab_size or own or Vocabulary().vocab_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _converted(new_model(sized, Vocabulary(vocab_size), {}), DTYPES[dtype]).train()
        for module in model.modules():
            # Older transformers draw a number for each layer even at 0, and a fake tensor has no value.
            module.training &= not hasattr(module, "layerdrop")
        step = dry_step(model, batch)
    parameters = parameter_count(model)
    memory = []
    for stage in STAGES:
        for world in worlds:
            states = states_memory(parameters, stage, world, dtype)
            # The update runs after the activations are freed.
            held = sum(states.values()) - states["host"] - states["update"]
            total = held + max(states["update"], step.activations)
            row = {"stage": stage, "world": world, **states, "activations": step.activations, "total": total}
            memory.append(row)
    operations = step.operations
    return {
        "recipe": find_recipe(recipe).stem,
        "objective": sized.objective,
        "dtype": dtype,
        "bin": {"tokens": batch.tokens, "sentences": batch.sentences, "windows": batch.documents},
        "vocab_size": _vocabulary(model),
        "parameters": {"total": parameters, "by_part": parameters_by_part(model)},
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
            "peak_one_process": step.peak,
        },
        "memory_per_gpu": memory,
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
