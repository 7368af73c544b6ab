"""Multiply-adds of one forward pass, by part: what the arithmetic of a model says before any clock is asked.

In: a model (ours, or any Hugging Face causal LM) and what it is run on. Out: `Operations`. Linear layers are
counted by the rows that really reach them (forward hooks), attention cores from the lengths of their
segments. Adds, norms, activations and look-ups are left out: time they take, but hardly any arithmetic.
One training pass (forward and backward) costs three times the forward: each product has two gradients, each
as large as itself. Called by `inspection.py`, `benchmark_training.py` and (`utilisation`) `training_run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.data.batch import Batch
from pipeline.data.segments import SegmentLayout
from pipeline.models.attention import choose_path
from pipeline.models.folders import model_kind
from pipeline.models.token_lm import TokenLM

TRAINING_FACTOR = 3  # forward 1, gradient of the inputs 1, gradient of the weights 1
# Dense peak of one device in FLOP/s with bf16 inputs, by what its name holds; the first that fits.
_BF16_PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}
PARTS = ("embedding", "encoder", "decoder", "head", "backbone", "adapters", "start vector", "stop head")


def utilisation(multiply_adds: float, seconds: float, device: torch.device) -> float | None:
    """Share of the device's bf16 peak that so many multiply-adds in so many seconds are (MFU, if they are
    those that the model needs); None where the peak is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for key, flops in _BF16_PEAK.items() if key in name), None)
    return peak and 2 * multiply_adds / seconds / peak


def part_of(model: nn.Module) -> dict[str, str]:
    """The part of `PARTS` that each named module of a model belongs to ("" is the model itself)."""
    kind = model_kind(model)
    inner = model.model if isinstance(model, TokenLM) else model
    head = inner.get_output_embeddings() if kind == "lm" else None
    parts = {}
    for name, module in model.named_modules():
        path = name.removeprefix("vae.") if kind == "sllm" else name
        first = path.split(".")[0]
        if kind == "lm":
            embedding = isinstance(module, nn.Embedding)
            parts[name] = "head" if module is head else "embedding" if embedding else "backbone"
        elif path.startswith(("encoder.embedding", "decoder.embedding")):
            parts[name] = "embedding"
        elif first in ("to_backbone", "from_backbone"):
            parts[name] = "adapters"
        elif first == "start":
            parts[name] = "start vector"
        else:
            parts[name] = first.replace("_", " ")
    return parts


class Core(NamedTuple):
    """The attention cores of one part: `layers` times q·k and weights·v over `lengths` (one per segment).

    width: heads · d_head. causal: a row needs only the rows up to itself. computed: pairs of rows that the
    attention path in use works on, padding included. needed: pairs that are needed, where some rows of the
    segments have no query.
    """

    part: str
    layers: int
    width: int
    lengths: np.ndarray
    causal: bool
    computed: int
    needed: int | None = None


@dataclass
class Operations:
    """Multiply-adds of one forward pass by part.

    linear: linear layers, at the rows that reached them. attention: cores, pairs that are needed (a causal
    row's own past). masked: pairs of a segment that are in a row's future, which a kernel may skip or not,
    and those of rows whose query goes unused (`Reach`). padding: pairs with a padded slot.
    """

    linear: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)
    masked: int = 0
    padding: int = 0

    @property
    def needed(self) -> int:
        """What no implementation can leave out."""
        return sum(self.linear.values()) + sum(self.attention.values())

    @property
    def padding_share(self) -> float:
        """Padded pairs by all that is computed: needed, masked and padding."""
        return self.padding / (self.needed + self.masked + self.padding)

    def by_part(self) -> dict[str, int]:
        """Needed multiply-adds of every part that has any, in the order of `PARTS`."""
        sums = {part: self.linear.get(part, 0) + self.attention.get(part, 0) for part in PARTS}
        return {part: count for part, count in sums.items() if count}


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside the `with` block: rows that reach each linear layer (by module name), summed over calls."""
    rows: dict[str, int] = {}

    def hook(name: str):
        def count(module: nn.Module, inputs: tuple) -> None:
            rows[name] = rows.get(name, 0) + inputs[0].numel() // inputs[0].shape[-1]

        return count

    linear = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linear.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def count_operations(model: nn.Module, rows: dict[str, int], cores: list[Core]) -> Operations:
    """Put `counted_rows` and attention cores together."""
    parts, operations = part_of(model), Operations()
    weights = {name: module.weight.numel() for name, module in model.named_modules() if name in rows}
    for name, count in rows.items():
        part = parts[name]
        operations.linear[part] = operations.linear.get(part, 0) + weights[name] * count
    for core in cores:
        square = int((core.lengths**2).sum())
        needed = int((core.lengths * (core.lengths + 1) // 2).sum()) if core.causal else square
        needed = needed if core.needed is None else core.needed
        each = 2 * core.width * core.layers  # q·k and weights·v
        operations.attention[core.part] = operations.attention.get(core.part, 0) + each * needed
        operations.masked += each * (square - needed)
        operations.padding += each * (core.computed - square)
    return operations


def batch_cores(model: nn.Module, batch: Batch) -> list[Core]:
    """The attention cores of one of our models on one of our batches."""
    kind, config = model_kind(model), model.config
    dtype = next(model.parameters()).dtype

    def core(
        part: str, layers: int, width: int, heads: int, layout: SegmentLayout, causal: bool, dropout: float
    ) -> Core:
        dropout = dropout if model.training else 0.0  # of attention weights: not every kernel has it
        path = choose_path(batch.device, dtype, width // heads, requires_grad=True, dropout=dropout)
        return Core(part, layers, width, layout.lengths, causal, layout.computed_pairs(path))

    if kind == "lm":
        dropout = getattr(config, "attention_dropout", 0.0)
        return [core("backbone", *_backbone_sizes(config), batch.token_model_layout, True, dropout)]
    vae = config.vae if kind == "sllm" else config
    dropout = vae.dropout if vae.layout == "paper" else 0.0
    slots, context = decoder_sight(model)
    reach = batch.reach(slots, context)
    decoder_layout = reach.layout if reach else batch.slotted_layout(slots)
    cores = [
        core(
            "encoder", vae.encoder_layers, vae.hidden_size, vae.heads, batch.sentence_layout, False, dropout
        ),
        core("decoder", vae.layers, vae.hidden_size, vae.heads, decoder_layout, True, dropout)._replace(
            needed=reach.needed if reach else None
        ),
    ]
    if kind == "sllm":
        dropout = getattr(config.backbone, "attention_dropout", 0.0)
        cores.append(
            core("backbone", *_backbone_sizes(config.backbone), batch.backbone_layout, True, dropout)
        )
    return cores


def decoder_sight(model: nn.Module) -> tuple[int, int]:
    """(slots, context sentences) of a model's sentence decoder."""
    kind = model_kind(model)
    if kind == "lm":
        return 0, 0
    vae = model.config.vae if kind == "sllm" else model.config
    return vae.slots, vae.context_sentences if kind == "sllm" else 0


def row_cores(model: nn.Module, rows: int, length: int) -> list[Core]:
    """The attention cores of a token-level model on `rows` full rows of `length` tokens."""
    layers, width, _ = _backbone_sizes(model.config)
    lengths = np.full(rows, length, dtype=np.int64)
    return [Core("backbone", layers, width, lengths, True, int((lengths**2).sum()))]


def _backbone_sizes(config) -> tuple[int, int, int]:
    """(layers, heads · d_head, heads) of a Hugging Face decoder."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return config.num_hidden_layers, width, heads


class StepArithmetic:
    """Counts multiply-adds of one forward pass of `model` (`SentenceVAE`, `SLLM`, `TokenLM`); make it before
    DeepSpeed partitions the weights."""

    def __init__(self, model: nn.Module):
        self._model, kind = model, model_kind(model)
        self._weights: dict[str, int] = {}  # kind of row → weights of the linear layers that such rows reach
        for name, part in model.named_modules():
            if isinstance(part, (nn.Linear, Conv1D)) and (row := _row_kind(name, kind)):
                self._weights[row] = self._weights.get(row, 0) + part.weight.numel()

    def count(self, batch: Batch) -> tuple[int, int]:
        """(padding, everything computed), in multiply-adds.

        everything = Σ over linear layers: weights · rows that reach the layer
                   + Σ over attention layers: 2 · width · pairs that the attention path computes
        padding    = Σ over attention layers: 2 · width · (pairs computed − pairs within segments)

        A pair is a query slot and a key slot; 2 · width are q·k and weight·v over all heads. Linear layers,
        norms and losses run on real rows only, so padding exists in the attention core alone. A training
        step does three times as much of both, so the share is that of the whole step.
        """
        rows = _rows(batch, decoder_sight(self._model)[0])
        linear = sum(weights * rows[row] for row, weights in self._weights.items())
        padding = computed = 0
        for core in batch_cores(self._model, batch):
            each = 2 * core.width * core.layers
            computed += each * core.computed
            padding += each * (core.computed - int((core.lengths**2).sum()))
        return padding, linear + computed


def _rows(batch: Batch, slots: int) -> dict[str, int]:
    """How many rows of each kind a batch has."""
    return {
        "token": batch.tokens,
        "decoder row": batch.slotted_layout(slots).rows,
        "symbol": batch.decoder_layout.rows,
        "sentence": batch.sentences,
        "position": batch.backbone_layout.rows,
        "lm position": batch.token_model_layout.rows,
        "lm target": batch.tokens + int(batch.document_end_D.sum()),
    }


def _row_kind(name: str, kind: str) -> str | None:
    """The kind of row that reaches the linear layer `name` of a model of `kind` (`vae`, `sllm` or `lm`); None
    for the layer that an SLLM never runs: it reads means alone."""
    path = name.removeprefix("vae.").split(".")
    if kind == "lm":
        return "lm target" if path[-1] == "lm_head" else "lm position"
    if kind == "sllm" and "log_variance" in path:
        return None
    if path[0] in ("stop_head", "from_backbone") or {"condition", "slots", "log_variance"} & set(path):
        return "sentence"
    kinds = {"encoder": "token", "decoder": "decoder row", "head": "symbol"}
    return kinds.get(path[0], "position")  # the backbone and the map into it
