"""Named figures summed over all ranks in one all-reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from pipeline.parallel.ranks import Ranks


def sum_over_ranks(
    ranks: Ranks,
    names: Sequence[str],
    sums: Tensor,
    figures: Mapping[str, float],
    by_rank: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """One all-reduce (a collective); returns every figure by its name.

    Args:
        names, sums: figures that are on the device: float64 [len(names)].
        figures: figures on the host.
        by_rank: figures that are not added up: each is returned as a list with every rank's value.
    """
    own = [
        value if rank == ranks.rank else 0.0
        for value in (by_rank or {}).values()
        for rank in range(ranks.world)
    ]
    host = torch.tensor([*figures.values(), *own], dtype=torch.float64, device=sums.device)
    everything = torch.cat([sums, host])
    dist.all_reduce(everything)
    values = iter(everything.tolist())
    named: dict[str, Any] = {name: next(values) for name in (*names, *figures)}
    return named | {name: [next(values) for _ in range(ranks.world)] for name in by_rank or {}}
