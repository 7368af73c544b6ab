"""A model laid out for generation on a CPU, optionally with int8 weights: faster, at a little likelihood.

Int8 replaces the linear layers in place: weights as int8 with one scale per output, inputs rounded to 7 bits
at each call with one scale per tensor, sums in int32 (torch's own dynamic kernels). Embeddings, norms and the
stop head stay in fp32. The model can be scored (`sllm evaluate --int8`) and can generate, but not be trained
or saved. All rows of a call share one scale, so results depend on a text's neighbours in a batch. Speed and
cost: docs/generation.md.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import Tokenizer
from pipeline.models.factory import load_model
from pipeline.models.folders import load_model_tokenizer
from pipeline.models.products import use_joined_product, use_product
from pipeline.models.sentence_lm import SentenceLM
from pipeline.models.step import BackboneStep, join, joined_layers
from pipeline.models.token_documents import TokenDocuments
from pipeline.models.token_lm import TokenLM
from pipeline.models.vocabulary_head import VocabularyHead, chunk_rows
from pipeline.parallel.device import DeviceName, DtypeName, choose_device


class Int8Linear(nn.Module):
    """`linear` with int8 weights: [..., in] → [..., out], float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float().contiguous()
        scales = weight.abs().amax(1).clamp_min(1e-12).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        # torch deprecates these tensors and names no replacement for the kernel.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self._packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, x: Tensor) -> Tensor:
        # Inputs of 7 bits: with 8, 16-bit sums would overflow on CPUs without VNNI.
        return torch.ops.quantized.linear_dynamic(x.contiguous(), self._packed, True)


class Int8Head(Int8Linear):
    """`VocabularyHead` with int8 weights: logits, or plain cross-entropy without gradients."""

    def forward(
        self,
        hidden_Nd: Tensor,
        targets_N: Tensor | None = None,
        _focal_gamma: float = 0.0,
        want_correct: bool = False,
        *_: float,
    ) -> Any:
        """As `VocabularyHead.forward`; the objective is always cross-entropy."""
        if targets_N is None:
            return super().forward(hidden_Nd)
        nll, correct = [], []
        rows = chunk_rows(self.out_features)
        for h, t in zip(hidden_Nd.split(rows), targets_N.split(rows), strict=True):
            logits = super().forward(h)
            nll.append(F.cross_entropy(logits, t, reduction="none"))
            correct.append(logits.argmax(-1) == t)
        nll_N = torch.cat(nll)
        return nll_N.sum(), nll_N, torch.cat(correct) if want_correct else None


def to_int8(model: nn.Module) -> nn.Module:
    """Replace a model's linear layers in place and return it. Raises: UserError unless it is fp32 on a
    CPU."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        raise UserError(f"int8 is for fp32 models on a CPU, not {parameter.dtype} on {parameter.device.type}")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, VocabularyHead):
                setattr(parent, name, Int8Head(child))
            elif isinstance(child, nn.Linear) and name != "stop_head":
                setattr(parent, name, Int8Linear(child))
    return model


def load_for_generation(
    folder: str | Path,
    int8: bool = False,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    batch_invariant: bool | None = False,
) -> tuple[Any, Tokenizer]:
    """The model of a folder, laid out for generation or in int8, and its tokenizer; a token-level model as
    `TokenDocuments`. batch_invariant: in fp32 on a CPU a text's numbers have the same bits in any batch;
    None: if the model can.

    Raises: UserError for a SentenceVAE, and as `choose_device`.
    """
    place, precision = choose_device(device, dtype, int8)
    if batch_invariant and (int8 or place.type != "cpu" or precision != torch.float32):
        raise UserError(
            "--batch-invariant is for fp32 on a CPU: add --device cpu --dtype fp32, without --int8"
        )
    model: nn.Module = load_model(folder)
    if not isinstance(model, SentenceLM | TokenLM):
        raise UserError(
            f"model folder {folder}: a SentenceVAE rebuilds sentences and cannot continue a text; give an "
            "SLLM or a token-level model"
        )
    tokenizer = load_model_tokenizer(folder)
    nn.Module.to(model, place, precision)
    if int8:
        to_int8(model)
    else:
        # Where it does not hold, `lay_out` leaves it out.
        lay_out(model, isinstance(model, SentenceLM) if batch_invariant is None else batch_invariant)
    return TokenDocuments(model, tokenizer) if isinstance(model, TokenLM) else model, tokenizer


def lay_out(model: nn.Module, batch_invariant: bool = False) -> nn.Module:
    """Lay out the matrices of a model for generation, in place, and return it. Values, shapes and names stay.

    In models that run by `BackboneStep`, matrices of one input become one (queries, keys and values; gate and
    up). On a CPU all are stored by columns: one row times such a matrix is up to 1.8 times as fast where
    reading the matrix is the limit. batch_invariant: `products` instead, in float32 on a CPU."""
    weight = next(model.parameters())
    columns = weight.device.type == "cpu"
    batch_invariant = batch_invariant and columns and weight.dtype == torch.float32
    if batch_invariant and isinstance(model, SentenceLM):
        model.batch_invariant = True
    backbone = getattr(model, "backbone", None)
    joined = joined_layers(model) if backbone is not None and BackboneStep.known(backbone) else []
    for group in joined:
        (use_joined_product if batch_invariant else partial(join, columns=columns))(group)
    done = {module for group in joined for module in group}
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module in done or not columns:
            continue
        if batch_invariant:
            use_product(module)
        else:
            module.weight.data = module.weight.data.t().contiguous().t()
    return model
