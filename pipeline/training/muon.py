"""Muon (Jordan et al. 2024): each hidden matrix moves by its momentum made orthogonal, under any ZeRO stage.

No library's fits. torch's takes whole matrices, and ZeRO's optimizers hold flat parts of them. DeepSpeed's
replaces the gradient before its norm is taken and clipped, and changes its momentum before a step can be
vetoed. Here the momentum is a flat state like Adam's moments, and only its orthogonal form needs whole
matrices: those that lie on several ranks are summed up, shared out, and summed up again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import deepspeed.comm as dist
import torch
from torch import Tensor, nn

from data_prep.common.errors import counted
from pipeline.models.layers import Projections
from pipeline.models.vocabulary_head import VocabularyHead
from pipeline.parallel.agreement import AgreedError, agree
from pipeline.parallel.deepspeed_compat import Part

MOMENTUM = "momentum_buffer"  # the key of a matrix's momentum among the optimizer's states
STEPS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan's quintic: steepest at 0, and near 1 everywhere
MOST_ELEMENTS = 1 << 26  # of the matrices that are whole at once, 256 MB


def orthogonal(x_nab: Tensor) -> Tensor:
    """[n, a, b] → matrices with the same singular vectors and singular values near 1, by Newton and Schulz;
    in bf16 on GPUs, as published."""
    a, b, c = COEFFICIENTS
    tall = x_nab.shape[1] > x_nab.shape[2]
    x = x_nab.mT if tall else x_nab
    x = x.bfloat16() if x.is_cuda else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(x_nab.dtype)


def scale(rows: int, columns: int) -> float:
    """What an orthogonal update is multiplied by to be as large as AdamW's, so that both share a learning
    rate (Liu et al. 2025, arXiv 2502.16982)."""
    return 0.2 * math.sqrt(max(rows, columns))


def update_operations(model: nn.Module) -> int:
    """Multiply-adds of one update of all hidden matrices that are trained."""
    shapes = {id(p): p.shape for p in model.parameters() if p.requires_grad}
    total = 0
    for number, count in hidden_matrices(model).items():
        if number in shapes:
            rows, columns = shapes[number]
            short, long = sorted((rows // count, columns))
            total += count * STEPS * (2 * short**2 * long + short**3)
    return total


def hidden_matrices(model: nn.Module) -> dict[int, int]:
    """Id of each weight that Muon takes → number of matrices on top of each other in it: all matrices but
    embeddings, what is tied to one, and heads."""
    several = {id(part.weight): part.count for part in model.modules() if isinstance(part, Projections)}
    outer = {
        id(part.weight)
        for name, part in model.named_modules()
        if isinstance(part, (nn.Embedding, VocabularyHead)) or name == "stop_head"
    }
    shapes = {id(p): getattr(p, "ds_shape", p.shape) for p in model.parameters()}  # of ZeRO-3's parts
    return {
        number: several.get(number, 1)
        for number, shape in shapes.items()
        if len(shape) == 2 and min(shape) > 1 and number not in outer
    }


def place_matrices(
    parts: Sequence[Part], counts: dict[int, int], device: torch.device
) -> dict[int, Matrices]:
    """Id of each tensor of ZeRO's optimizer that Muon updates → its matrices. A collective.

    parts: `fp32_parts`. counts: id of a weight → matrices on top of each other in it.
    Raises: AgreedError when the tensors do not hold exactly these weights.
    """
    shapes = [[getattr(weight, "ds_shape", weight.shape) for weight, _, _ in pieces] for _, pieces in parts]
    mine = [
        [
            there.stop - there.start == math.prod(shape)
            for (_, _, there), shape in zip(pieces, row, strict=True)
        ]
        for (_, pieces), row in zip(parts, shapes, strict=True)
    ]
    everyone = agree(None, mine)
    found = {}
    for number, (flat, pieces) in enumerate(parts):
        kinds = {counts.get(id(weight), 0) for weight, _, _ in pieces}
        if kinds == {0}:
            continue
        if len(kinds) > 1:
            raise AgreedError("Muon: DeepSpeed has put weights of two groups into one tensor")
        matrices = found[id(flat)] = Matrices(kinds.pop(), device, len(pieces))
        for at, (_, here, there) in enumerate(pieces):
            piece = Piece(shapes[number][at], here, there)
            if not any(whole[number][at] for whole in everyone):
                matrices.shared.append(piece)
            elif mine[number][at]:
                matrices.local.append(piece)
    if (placed := sum(one.weights for one in found.values())) != len(counts):
        raise AgreedError(f"Muon would handle {placed} of {counted(len(counts), 'weight')}")
    return found


@dataclass(frozen=True)
class Piece:
    """Some values of a weight: `here` in a tensor of the optimizer on this rank, `there` in the flattened
    weight of `shape`."""

    shape: torch.Size
    here: slice
    there: slice


@dataclass
class Matrices:
    """The weights of one tensor of the optimizer, each `count` matrices on top of each other.

    device: of the products and collectives. weights: how many, on all ranks. local: whole on this rank.
    shared: on several ranks; all of them, in one order on every rank."""

    count: int
    device: torch.device
    weights: int
    local: list[Piece] = field(default_factory=list)
    shared: list[Piece] = field(default_factory=list)

    @classmethod
    def whole(cls, weight: Tensor, count: int) -> Matrices:
        """Of a tensor that is a weight, where nothing is partitioned."""
        if weight.ndim != 2:
            raise AgreedError("Muon does not know where the matrices of DeepSpeed's flat weights are")
        everything = slice(0, weight.numel())
        return cls(count, weight.device, 1, [Piece(weight.shape, everything, everything)])

    @torch.no_grad()
    def orthogonal(self, flat: Tensor) -> Tensor:
        """A tensor of the form of `flat`, where every matrix is orthogonal and scaled. A collective if one is
        shared."""
        device = self.device
        out, values = torch.zeros_like(flat).view(-1), flat.reshape(-1)
        whole = [values[piece.here].to(device) for piece in self.local]
        for piece, update in zip(self.local, self._updates(self.local, whole), strict=True):
            out[piece.here] = update
        for chunk in self._chunks():
            sizes = [math.prod(piece.shape) for piece in chunk]
            gathered = torch.zeros(sum(sizes), dtype=flat.dtype, device=device)
            for piece, matrix in zip(chunk, gathered.split(sizes), strict=True):
                matrix[piece.there] = values[piece.here].to(device)
            dist.all_reduce(gathered)
            mine = slice(dist.get_rank(), None, dist.get_world_size())
            whole, updates = list(gathered.split(sizes)), torch.zeros_like(gathered)
            answers = self._updates(chunk[mine], whole[mine])
            for place, update in zip(updates.split(sizes)[mine], answers, strict=True):
                place.copy_(update)
            dist.all_reduce(updates)
            for piece, matrix in zip(chunk, updates.split(sizes), strict=True):
                out[piece.here] = matrix[piece.there]
        return out.view_as(flat)

    def _chunks(self) -> Iterator[list[Piece]]:
        chunk: list[Piece] = []
        for piece in self.shared:
            if chunk and sum(math.prod(one.shape) for one in (*chunk, piece)) > MOST_ELEMENTS:
                yield chunk
                chunk = []
            chunk.append(piece)
        if chunk:
            yield chunk

    def _updates(self, pieces: Sequence[Piece], values: Sequence[Tensor]) -> list[Tensor]:
        """The flat update of each weight; matrices of one shape go through the products together."""
        numbers: dict[torch.Size, list[int]] = {}
        for number, piece in enumerate(pieces):
            numbers.setdefault(piece.shape, []).append(number)
        found: dict[int, Tensor] = {}
        for (rows, columns), alike in numbers.items():
            rows //= self.count
            stacked = torch.cat([values[n].view(self.count, rows, columns) for n in alike])
            updates = orthogonal(stacked) * scale(rows, columns)
            found |= dict(zip(alike, updates.reshape(len(alike), -1), strict=True))
        return [found[number] for number in range(len(pieces))]
