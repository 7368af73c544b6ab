"""All ranks agree, or all stop with the same message."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from data_prep.common.environment import code_version
from data_prep.common.errors import UserError, describe


class AgreedError(UserError):
    """Raised by every rank with the same message; rank 0 prints it for all."""


def agree(error: UserError | OSError | None, value: Any = None, says: str | None = None) -> list[Any]:
    """Every rank's `value`, by rank (a collective); AgreedError on every rank when one has an error.

    A rank that ends alone breaks the collectives in which the others wait, and their traces would not name
    the reason. says: the message, with {rank} and {message}; else the error's own.
    """
    import torch.distributed as dist  # here: a wrong recipe is refused before torch loads

    mine = (None if error is None else describe(error), value)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, (message, _) in enumerate(everyone):
        if message is not None:
            says = says or ("rank {rank}: {message}" if rank else "{message}")
            raise AgreedError(says.format(rank=rank, message=message))
    return [theirs for _, theirs in everyone]


def do_and_agree(work: Callable[[], Any], says: str | None = None) -> list[Any]:
    """`agree` on what `work` returns, or on the UserError or OSError that it raises."""
    error = value = None
    try:
        value = work()
    except (UserError, OSError) as failure:
        error = failure
    return agree(error, value, says)


def facts(recipe: dict[str, Any], strategy: dict[str, Any], provenance: dict[str, Any]) -> dict[str, str]:
    """What all ranks must share, by name: settings, shards, versions and this project's code."""
    found = {"python": provenance["python"], **provenance["packages"], "code": code_version()}
    for key in ("shards", "validation"):
        for number, shard_set in enumerate(provenance[key]):
            found[f"data.{key} {number + 1}"] = shard_set["fingerprint"][:12]
    found |= _flat("recipe", recipe) | _flat("DeepSpeed config", strategy)
    return found


def _flat(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in _flat(f"{name}.{key}", one).items()}
    return {name: str(value)}


def require_agreement(ours: dict[str, str]) -> list[str]:
    """Compare `facts` over all ranks (a collective); returns every rank's host name. AgreedError names the
    first rank and fact that differ from rank 0's."""
    everyone = agree(None, (platform.node(), ours))
    first_host, first = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        for name in [*first, *(name for name in theirs if name not in first)]:
            if first.get(name) != theirs.get(name):
                raise AgreedError(
                    f"rank {rank} ({host}) has {name} {theirs.get(name)}, rank 0 ({first_host}) has "
                    f"{first.get(name)}: give all ranks the same"
                )
    return [host for host, _ in everyone]
