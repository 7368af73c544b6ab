"""`sllm benchmark counts`: what a GPU and its host would do in one training step, counted without a GPU.

Forward and backward run on the meta device, where tensors have shapes only, on the paths that CUDA takes. The
update runs DeepSpeed itself on the CPU, in bf16, with weights of a few numbers: its kernels depend on how
many weights there are, not on their sizes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_prep.common.errors import counted as with_noun
from data_prep.common.page import columns, to_text
from pipeline.common.text import gigabytes
from pipeline.config.deepspeed_config import complete_strategy, read_strategy
from pipeline.config.library import find_recipe
from pipeline.config.schema import Recipe
from pipeline.costs.inspect import TOKENS_PER_SENTENCE, AsOnCuda, made_up_batch, of_shapes
from pipeline.costs.sized_recipe import Vocabulary, sized_recipe
from pipeline.data.upload import Uploader
from pipeline.models.attention import attention_path
from pipeline.models.factory import new_model
from pipeline.models.folders import parameter_count
from pipeline.models.losses import LossSums

# Operators that are several kernels in torch's CUDA code, or none.
_KERNELS = {
    "aten::native_layer_norm_backward": 2,
    "aten::embedding_dense_backward": 8,  # sorts the tokens
    "aten::index_add": 2,
    "aten::select_backward": 2,
    "aten::slice_backward": 2,
    "aten::binary_cross_entropy_with_logits": 6,
    "torch_attn::_varlen_attn_backward": 3,
    "aten::_scaled_dot_product_efficient_attention_backward": 3,
} | dict.fromkeys(
    [
        f"aten::{name}"
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh")
    ],
    0,
)
PHASES = ("upload", "forward and backward", "gradients (DeepSpeed)", "update")
_SORTED_WRITE = 8  # kernels of a write by index that adds up equal places
_TENSORS, _ELEMENTS = 30, 320 << 16  # of one launch over a list of tensors
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique2")


@dataclass
class Counted:
    """kernels: launched on the device. waits: of the host for the device; a copy from or to unpinned memory
    is one. uploads: tensors sent to the device. bytes: of all operands and results. host_ms: that this
    machine takes to issue the kernels."""

    kernels: int = 0
    waits: int = 0
    uploads: int = 0
    bytes: int = 0
    host_ms: float | None = None
    operators: Counter[str] = field(default_factory=Counter)


class DeviceCounts(TorchDispatchMode):
    """Counts inside of the `with` block what a GPU would do for tensors outside of the host's memory.

    host: the tensors of the device are on the CPU (a test device that computes); there each `torch.tensor` is
    taken for an upload.
    """

    def __init__(self, host: bool = False):
        super().__init__()
        self.counted, self._host = Counted(), host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        on_device = [self._host or tensor.device.type != "cpu" for tensor in tensors]
        counted = self.counted
        if name in _WAITS or (name == "aten::lift_fresh" and self._host):
            counted.waits += 1
        moved = any(on_device) and not all(on_device)
        if moved and name in ("aten::_to_copy", "aten::copy_"):
            counted.uploads += 1
            counted.waits += not all(tensor.is_pinned() for tensor in tensors if tensor.device.type == "cpu")
        elif any(on_device) and name not in _WAITS and not _is_view(func):
            kernels = _kernels(name, args)
            counted.kernels += kernels
            counted.operators[name] += kernels
            counted.bytes += sum(tensor.nbytes for tensor in tensors) if kernels else 0
        return out


def _is_view(func: Any) -> bool:
    """Whether an operator only makes another view of its input."""
    aliases = [result.alias_info for result in func._schema.returns]
    viewed = any(alias is not None and not alias.is_write for alias in aliases)
    return viewed or func._schema.name == "aten::_unsafe_view"


def _kernels(name: str, args: Any) -> int:
    if name in _KERNELS:
        return _KERNELS[name]
    if name.removeprefix("aten::_").startswith(("foreach", "fused")):
        elements = sum(tensor.numel() for tensor in args[0])
        return max(-(-len(args[0]) // _TENSORS), -(-elements // _ELEMENTS))
    if name in ("aten::index_put", "aten::index_put_") and len(args) > 3 and args[3]:
        return _SORTED_WRITE
    return 1


def forward_backward(recipe: Recipe, tokens: int, path: str | None = None) -> tuple[Counted, Counted]:
    """The upload of one micro-batch of so many tokens, and its forward and backward pass in bf16.

    Args:
        path: of attention (default: what a GPU chooses)
    """
    model = of_shapes(recipe, Vocabulary(), torch.bfloat16)
    longest = recipe.reading_part.get("max_sentence_tokens") or 64
    window = min(recipe.data.window_tokens, tokens)
    uploader, no_mode = Uploader(torch.device("meta")), nullcontext()

    def run(upload: Any = no_mode, step: Any = no_mode) -> float:
        batch = uploader.prepare(made_up_batch(window, tokens, TOKENS_PER_SENTENCE, longest))
        model.zero_grad(set_to_none=True)
        with upload:
            batch = batch.to("meta")
        began = time.perf_counter()
        with AsOnCuda(), step:
            model(batch).objective.backward()
        uploader.learn(batch)
        return time.perf_counter() - began

    with attention_path(path) if path else nullcontext():
        run()  # imports, and what a batch needs
        seconds = run()
        run(upload := DeviceCounts(), step := DeviceCounts())
    step.counted.host_ms = 1000 * seconds
    upload.counted.waits = 0  # `Upload` pins its memory where there is a GPU
    return upload.counted, step.counted


class _Gradients(torch.autograd.Function):
    """A loss whose backward pass gives every weight a gradient, by one operator each."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.weights = weights
        return weights[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ones_like(weight) for weight in ctx.weights)


def update(recipe: Recipe, strategy: str) -> tuple[Counted, Counted]:
    """What a DeepSpeed strategy adds to a backward pass on one rank, and one update."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Imports DeepSpeed, which reads DS_ACCELERATOR.
    from pipeline.parallel.ranks import find_ranks, join, leave
    from pipeline.training.engine import Engine

    with torch.device("meta"):
        model = new_model(recipe, Vocabulary(), {})
    elements = parameter_count(model)
    _shrink(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    model.forward = lambda _batch: LossSums(_Gradients.apply(*weights), *[torch.zeros(())] * 6)
    with ExitStack() as opened:
        device = join(find_ranks())
        opened.callback(leave)
        one_bin = {"gradient_accumulation_steps": 1, "train_batch_size": 1}
        config = complete_strategy(read_strategy(strategy), recipe, 1, on_gpu=True) | one_bin
        engine = Engine(model, recipe, config, device)
        modes: tuple[Any, Any] = (nullcontext(), nullcontext())
        for counts in (False, True):
            losses = LossSums(**engine.deepspeed(None))
            if counts:
                modes = DeviceCounts(host=True), DeviceCounts(host=True)
            with modes[0]:
                engine.deepspeed.backward(losses.objective)
            with modes[1]:
                engine.update(1.0)
    reduced, updated = (mode.counted for mode in modes)
    reduced.kernels -= reduced.operators.pop("aten::ones_like")
    for counted in (reduced, updated):
        counted.bytes = counted.bytes * elements // parameter_count(model)
    return reduced, updated


def _shrink(model: nn.Module) -> None:
    """Replace every weight by a few numbers; shared weights stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                few = torch.ones([min(2, size) for size in parameter.shape], device="cpu")
                made[id(parameter)] = nn.Parameter(few, parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, _ in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(1, device="cpu"))


def run(recipe: str, strategy: str, tokens: int | None = None, path: str | None = None) -> dict[str, Any]:
    """The counts of a recipe's step on one GPU, as plain JSON.

    Args:
        strategy: a file of ds_configs/
        tokens: of a micro-batch (default: the recipe's data.bin_tokens)
        path: of attention (default: what a GPU chooses)
    """
    sized = sized_recipe(recipe)
    tokens = tokens or sized.data.bin_tokens
    counted = *forward_backward(sized, tokens, path), *update(sized, strategy)
    return {
        "recipe": find_recipe(recipe).stem,
        "strategy": strategy,
        "tokens": tokens,
        "phases": {name: asdict(one) for name, one in zip(PHASES, counted, strict=True)},
    }


def format_counts(result: dict[str, Any]) -> str:
    """The result of `run` as text."""
    phases = [{"phase": name, **counted} for name, counted in result["phases"].items()]
    rows: list[tuple] = [
        ("kernels", "kernels", ","),
        ("host waits", "waits", ","),
        ("uploads", "uploads", ","),
        ("GB read and written", "bytes", gigabytes),
        ("host ms here", "host_ms", ".0f"),
    ]
    title = f"{result['recipe']}, {result['strategy']}, one GPU, {with_noun(result['tokens'], 'token')}"
    return f"{title}\n\n{to_text(columns(PHASES, phases, rows))}"
