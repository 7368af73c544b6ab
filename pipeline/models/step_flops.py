"""What share of a step's arithmetic is spent on padding: the training log's `padding_share`.

In: a model of ours, once, and every `Batch` of a step. Out: multiply-adds, of padding and of all that is
computed. Called by `training_run.py`. `arithmetic.py` counts the same with hooks, for a model that it runs
itself; here the rows of every linear layer follow from the batch, because weights that ZeRO-3 has partitioned
tell no shapes and a hook on every layer of every step would cost time.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.data.batch import Batch
from pipeline.models.factory import model_kind
from pipeline.models.flops import batch_cores, decoder_sight


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
