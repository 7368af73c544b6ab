"""Multiply-adds of one forward pass of a model (ours or any Hugging Face causal LM), by part.

Linear layers are counted by the rows that reach them (forward hooks), attention cores from the lengths of
their segments. Adds, norms, activations and look-ups are left out: they take time, but little arithmetic.
Forward and backward cost three times the forward: each product has two gradients of its own size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.data.batch import Batch, build_batch
from pipeline.data.segments import SegmentLayout
from pipeline.data.windows import Span
from pipeline.models.anchor_lm import AnchorLM
from pipeline.models.attention import attention_path, choose_path, forced_path
from pipeline.models.folders import model_config, model_kind
from pipeline.models.stack import StackConfig
from pipeline.models.token_lm import TokenLM

TRAINING_FACTOR = 3  # forward 1, gradient of the inputs 1, gradient of the weights 1
# Dense bf16 peak of one device in FLOP/s, by a part of its name; the first match counts.
_BF16_PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}
IN_LAYERS = ("encoder", "decoder", "lower layers", "upper layers", "backbone")  # transformer layers alone
PARTS: tuple[str, ...] = (
    "embedding",
    "encoder",
    "decoder",
    "lower layers",
    "upper layers",
    "memory",
    "head",
    "backbone",
)
PARTS += ("adapters", "start vector", "stop head")
_PART_OF = {"to_backbone": "adapters", "from_backbone": "adapters", "vector_norm": "adapters"}
_PART_OF |= {"output_norm": "adapters", "start": "start vector", "lower": "lower layers"}
_PART_OF |= {"upper": "upper layers", "final_norm": "upper layers"}


def utilisation(multiply_adds: float, seconds: float, device: torch.device) -> float | None:
    """Share of the device's bf16 peak, MFU for the multiply-adds that the model needs; None if the peak is
    unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for key, flops in _BF16_PEAK.items() if key in name), None)
    return peak and 2 * multiply_adds / seconds / peak


def part_of(model: nn.Module) -> dict[str, str]:
    """The part of `PARTS` that each named module of a model belongs to ("" is the model itself)."""
    kind = model_kind(model)
    inner: Any = model.model if isinstance(model, TokenLM) else model
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
        else:
            parts[name] = _PART_OF.get(first, first.replace("_", " "))
    return parts


class Core(NamedTuple):
    """The attention cores of one part: `layers` times q·k and weights·v, width heads · d_head.

    needed: pairs of rows that are needed. shown: those that the attention path computes for real rows, some
    of them masked. computed: the same with padding.
    """

    part: str
    layers: int
    width: int
    needed: int
    shown: int
    computed: int


@dataclass
class Operations:
    """Multiply-adds of one forward pass by part.

    linear: linear layers, by the rows that reached them. attention: cores, needed pairs (a causal row's
    past). masked: pairs in a row's future or before its window, which a kernel may skip or not, and pairs of
    unused queries (`ContextSpans`). padding: pairs with a padded slot.
    """

    linear: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)
    masked: int = 0
    padding: int = 0

    @property
    def needed(self) -> int:
        """Multiply-adds that no implementation can skip."""
        return sum(self.linear.values()) + sum(self.attention.values())

    @property
    def padding_share(self) -> float:
        """Padding's share of all that is computed: needed, masked and padding."""
        return self.padding / (self.needed + self.masked + self.padding)

    def by_part(self) -> dict[str, int]:
        """Needed multiply-adds of every part with any, in the order of `PARTS`."""
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

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in linear_weights(model)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def linear_weights(model: nn.Module) -> dict[str, int]:
    """Elements of the weight of every linear layer, by module name."""
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
    return {name: module.weight.numel() for name, module in linear}


def count_operations(model: nn.Module, rows: dict[str, int], cores: list[Core]) -> Operations:
    """Sum up `counted_rows` and attention cores."""
    parts, operations, weights = part_of(model), Operations(), linear_weights(model)
    for name, count in rows.items():
        part = parts[name]
        operations.linear[part] = operations.linear.get(part, 0) + weights[name] * count
    for core in cores:
        each = 2 * core.width * core.layers  # q·k and weights·v
        operations.attention[core.part] = operations.attention.get(core.part, 0) + each * core.needed
        operations.masked += each * (core.shown - core.needed)
        operations.padding += each * (core.computed - core.shown)
    return operations


def batch_cores(model: nn.Module, batch: Batch) -> list[Core]:
    """The attention cores of one of our models on one of our batches."""
    batch = _as_read(model, batch)
    kind, config = model_kind(model), model_config(model)
    dtype = next(model.parameters()).dtype

    def core(
        part: str,
        layers: int,
        width: int,
        heads: int,
        layout: SegmentLayout,
        causal: bool,
        dropout: float,
        window: int | None = None,
    ) -> Core:
        dropout = dropout if model.training else 0.0  # of attention weights: not all kernels support it
        path = choose_path(layout, dtype, width // heads, requires_grad=True, dropout=dropout)
        shown, computed = layout.computed_pairs(path, window)
        return Core(part, layers, width, layout.needed_pairs(causal, window), shown, computed)

    def backbone(config: Any, layout: SegmentLayout) -> list[Core]:
        width, heads = _attention_width(config)
        dropout = getattr(config, "attention_dropout", 0.0)
        return [
            core("backbone", layers, width, heads, layout, True, dropout, window)
            for window, layers in _windows(config).items()
        ]

    if isinstance(model, AnchorLM):
        return backbone(config.backbone, model.rows(batch))
    if kind == "lm":
        return backbone(config, batch.token_model_layout)
    if isinstance(config, StackConfig):
        rows, sizes = batch.stack_rows(config.by_rule), (config.hidden_size, config.heads)
        settings = *sizes, rows.layout, True, 0.0, config.attention_window
        cores = [
            core("lower layers", config.lower_layers, *settings),
            core("upper layers", config.upper_layers, *settings),
            *backbone(config.backbone, batch.backbone_layout),
        ]
        if config.memory:
            band = rows.memory(config.memory)
            pairs = band.needed, *band.computed_pairs(forced_path() == "masked")
            cores.append(Core("memory", config.upper_layers, config.hidden_size, *pairs))
        return cores
    vae = config.vae if kind == "sllm" else config
    dropout = vae.dropout if vae.layout == "paper" else 0.0
    slots, context = decoder_context(model)
    spans = batch.context_spans(slots, context)
    decoder_layout = spans.layout if spans else batch.slotted_layout(slots)
    sizes, published = (vae.hidden_size, vae.heads), vae.published_inputs
    encoder_layout = batch.decoder_layout if published else batch.sentence_layout
    backbone_layout = batch.apart_layout if published else batch.backbone_layout
    decoder = core("decoder", vae.layers, *sizes, decoder_layout, True, dropout)
    cores = [
        core("encoder", vae.encoder_layers, *sizes, encoder_layout, False, dropout),
        decoder._replace(needed=spans.needed) if spans else decoder,
    ]
    return cores + (backbone(config.backbone, backbone_layout) if kind == "sllm" else [])


def _as_read(model: nn.Module, batch: Batch) -> Batch:
    return model.as_read(batch) if isinstance(model, TokenLM) else batch


def decoder_context(model: nn.Module) -> tuple[int, int]:
    """(slots, context sentences) of a model's sentence decoder; 0 and 0 without one."""
    kind, config = model_kind(model), model_config(model)
    if kind == "lm" or isinstance(config, StackConfig):
        return 0, 0
    vae = config.vae if kind == "sllm" else config
    return vae.slots, vae.context_sentences if kind == "sllm" else 0


def row_cores(model: nn.Module, rows: int, length: int) -> list[Core]:
    """The attention cores of a token-level model on `rows` full rows of `length` tokens."""
    config, layout = model_config(model), SegmentLayout(np.full(rows, length))
    width, _ = _attention_width(config)
    return [
        Core("backbone", layers, width, layout.needed_pairs(True, window), layout.pairs, layout.pairs)
        for window, layers in _windows(config).items()
    ]


def _attention_width(config) -> tuple[int, int]:
    """(heads · d_head, heads) of a Hugging Face decoder."""
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads), heads


def _windows(config) -> Counter[int | None]:
    """How many layers of a Hugging Face decoder have which attention window."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return Counter({window: config.num_hidden_layers})
    return Counter(window if kind == "sliding_attention" else None for kind in kinds)


class StepArithmetic:
    """Counts multiply-adds of one forward pass of `model` (`SentenceVAE`, `SLLM`, `TokenLM`) without hooks in
    it. Make it before DeepSpeed partitions the weights."""

    def __init__(self, model: nn.Module):
        self._model, (self._slots, _) = model, decoder_context(model)
        self._weights: dict[str, int] = {}  # kind of row → weights of the linear layers that such rows reach
        # A batch with a different number of rows of each kind shows which kind reaches a layer.
        sizes = np.asarray([2, 2])
        probe = build_batch([Span(np.zeros(4), sizes, True), Span(np.zeros(2), sizes[:1], False)])
        kinds = {count: kind for kind, count in self._rows(probe).items()}
        weights = linear_weights(model)
        # The random numbers of the run must not change. `bucketed` works on every device.
        with torch.random.fork_rng([]), torch.no_grad(), attention_path("bucketed"):
            with counted_rows(model) as rows:
                model(probe.to(next(model.parameters()).device))
        for name, count in rows.items():
            self._weights[kinds[count]] = self._weights.get(kinds[count], 0) + weights[name]

    def _rows(self, batch: Batch) -> dict[str, int]:
        rows = _rows(_as_read(self._model, batch), self._slots)
        anchored = self._model.rows(batch).rows if isinstance(self._model, AnchorLM) else None
        # Its other layers have no rows of their own that a probe could confuse with these.
        return rows if anchored is None else {"lm target": rows["lm target"], "anchored": anchored}

    def _linear(self, batch: Batch) -> int:
        rows = self._rows(batch)
        return sum(weights * rows[row] for row, weights in self._weights.items())

    def needed(self, batch: Batch) -> int:
        """Multiply-adds that no implementation can skip: linear layers, and needed pairs of attention."""
        cores = batch_cores(self._model, batch)
        return self._linear(batch) + sum(2 * core.width * core.layers * core.needed for core in cores)

    def count(self, batch: Batch) -> tuple[int, int]:
        """(padding, everything computed), in multiply-adds.

        everything = Σ over linear layers: weights · rows that reach the layer
                   + Σ over attention layers: 2 · width · pairs that the attention path computes
        padding    = Σ over attention layers: 2 · width · (pairs computed − pairs of real rows)

        A pair is a query slot and a key slot; 2 · width are q·k and weight·v over all heads. Linear layers,
        norms and losses run on real rows only, so only the attention core has padding. A training step does
        three times as much of both, so the share is the same.
        """
        padding = computed = 0
        for core in batch_cores(self._model, batch):
            each = 2 * core.width * core.layers
            computed += each * core.computed
            padding += each * (core.computed - core.shown)
        return padding, self._linear(batch) + computed


def _rows(batch: Batch, slots: int) -> dict[str, int]:
    """How many rows of each kind a batch has."""
    return {
        "token": batch.tokens,
        "decoder row": batch.slotted_layout(slots).rows,
        "symbol": batch.decoder_layout.rows,
        "sentence": batch.sentences,
        "position": batch.backbone_layout.rows,
        "lm position": batch.token_model_layout.rows,
        "stack row": batch.tokens + batch.sentences + batch.documents,
        "lm target": batch.tokens + int(batch.document_end_D.sum()),
    }
