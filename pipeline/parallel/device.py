"""Which device a process computes on, and in which precision."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Literal

from data_prep.common.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.parallel.ranks import Ranks

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "fp32", "bf16"]


def uses_gpu() -> bool:
    """Whether there is a GPU, and DS_ACCELERATOR (DeepSpeed's own variable) does not rule it out."""
    import torch

    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def claim_gpu(ranks: Ranks, visible: int, env: MutableMapping[str, str] = os.environ) -> int:
    """The index of this rank's GPU among the `visible` ones; DeepSpeed reads it from LOCAL_RANK.

    With one visible GPU per task (`--gpus-per-task`) the local rank is not an index.
    Raises: UserError for a rank without a GPU.
    """
    index = 0 if visible == 1 else ranks.local
    if index >= visible:
        raise UserError(
            f"rank {ranks.rank} is number {ranks.local} of its machine, which has {visible} GPUs: start "
            "as many ranks as there are GPUs, or set DS_ACCELERATOR=cpu"
        )
    env["LOCAL_RANK"] = str(index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in env:  # DeepSpeed requires the two to be equal
        env["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
    return index


def require_own_gpu(store: Any, ranks: Ranks, gpu: str) -> None:
    """Refuse a GPU, by its UUID, that another rank of this store has: the one that is visible may be every
    rank's, and NCCL ends at it without this reason."""
    if store.add(f"gpu/{gpu}", 1) > 1:
        raise UserError(
            f"rank {ranks.rank} has the same GPU as another rank: start as many ranks as there are GPUs, "
            "or set DS_ACCELERATOR=cpu"
        )


def choose_device(
    device: DeviceName = "auto", dtype: DtypeName = "auto", int8: bool = False
) -> tuple[torch.device, torch.dtype]:
    """The device and precision of a model that is evaluated or generates: a GPU in bf16 if there is one that
    computes in it, else fp32 (the CPU always for int8).

    Raises: UserError for a GPU that is not there, and for int8 with another device or precision than its own.
    """
    import torch

    if int8 and (device == "cuda" or dtype == "bf16"):
        raise UserError("--int8 computes on the CPU from fp32 weights: leave out --device and --dtype")
    if device == "cuda" and not uses_gpu():
        raise UserError("--device cuda: PyTorch finds no CUDA device here, or DS_ACCELERATOR=cpu is set")
    on_gpu = device == "cuda" or (device == "auto" and not int8 and uses_gpu())
    if dtype == "auto":
        dtype = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    return torch.device("cuda" if on_gpu else "cpu"), {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
