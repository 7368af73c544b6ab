"""Every use of a private part of DeepSpeed (0.19.x).

tests/pipeline/parallel/test_deepspeed_compat.py has a test for each, which names the part that a new release
has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch.distributed.distributed_c10d as c10d
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils.timer import SynchronizedWallClockTimer
from pydantic import ValidationError
from torch import Tensor

from pipeline.parallel.agreement import AgreedError

COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
    *("broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all_single"),
)


def wrap_collectives(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace each collective of DeepSpeed's backend by `wrap` of it; a later call replaces the wrappers."""
    backend = deepspeed.comm.comm.cdb
    for name in COLLECTIVES:
        setattr(backend, name, wrap(getattr(type(backend), name).__get__(backend)))


def skip_shared_memory_op() -> None:
    """Keep `init_distributed` from compiling gloo's shared-memory op: it takes a minute and a compiler."""
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def set_timeout(timeout: timedelta) -> None:
    """How long a collective waits for other ranks, in every group made from now on: DeepSpeed makes groups of
    its own and gives them torch's default."""
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout


def require_valid(config: dict[str, Any]) -> None:
    """Raises: AgreedError with DeepSpeed's own reason when it refuses a config whose keys are right."""
    try:
        DeepSpeedConfig(dict(config))
    except Exception as error:  # assertions, pydantic's and DeepSpeed's own kinds
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise AgreedError(f"DeepSpeed refuses its config: {' '.join(reason.split())}") from None


def silence_timers() -> None:
    """Drop the timings that an engine with a FLOPS profiler prints, several lines a step."""
    SynchronizedWallClockTimer.log = lambda *_given, **_named: None


@contextlib.contextmanager
def saving_through(engine: Any, writer: Any) -> Iterator[None]:
    """Let `engine.save_checkpoint` write through `writer`, and without its recovery script: `sllm export`
    replaces it."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda _: None
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


# A flat fp32 tensor, and for each weight of its group the values that are in it: where they are in the
# tensor, and in the flattened weight. Empty slices: all are on other ranks.
Part = tuple[Tensor, list[tuple[Any, slice, slice]]]


def fp32_parts(optimizer: Any) -> list[Part]:
    """The flat tensors that this rank updates under ZeRO 1 to 3."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        groups = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
        return [(flat, [(weight, *fp32_fragment(weight)) for weight in group]) for flat, group in groups]
    rank, world = dist.get_rank(), dist.get_world_size()
    parts: list[Part] = []
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        pieces: list[tuple[Any, slice, slice]] = []
        offset = 0
        for weight in group:
            share = -(-weight.ds_numel // world)  # the last rank's is padded
            first, end = (min(share * one, weight.ds_numel) for one in (rank, rank + 1))
            pieces.append((weight, slice(offset, offset + end - first), slice(first, end)))
            offset += share
        parts.append((flat, pieces))
    return parts


def zero_padding(engine: Any) -> None:
    """Zero the padding of the parts that stage 3 divides weights into. DeepSpeed leaves it uninitialised, and
    checkpoints have it: their bytes would differ from run to run, or seem not finite."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for weight in engine.module.parameters():
        if hasattr(weight, "ds_tensor"):
            share = -(-weight.ds_numel // world)
            weight.ds_tensor.data[max(0, weight.ds_numel - rank * share) :] = 0
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        for flat, pieces in fp32_parts(engine.optimizer):
            for weight, here, _ in pieces:
                flat.data[here.stop : here.start - (-weight.ds_numel // world)] = 0


def fp32_fragment(weight: Any) -> tuple[slice, slice]:
    """Where this rank's fp32 part of a weight is under ZeRO 1 and 2: the slice of the group's flat partition,
    and the slice of the flattened weight. Both empty when the whole weight is another rank's."""
    mapping = weight._hp_mapping
    if mapping is None:
        return slice(0, 0), slice(0, 0)
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return slice(here.start, here.start + here.numel), slice(there.start, there.start + there.numel)


def take_flat_gradients(optimizer: Any) -> None:
    """Let stage 1 in bf16 compute the norm and clip on its flat gradient buffers, not weight by weight: some
    500 kernels fewer."""
    flat = getattr(optimizer, "fp32_groups_actual_gradients_flat", None)
    if flat is not None and not optimizer.has_moe_layers:
        optimizer.get_grads_for_norm = lambda for_clipping=False: flat if for_clipping else (flat, {})


def norm_before_step(optimizer: Any) -> float | None:
    """The gradient's global norm while the optimizer applies a step; None where DeepSpeed keeps none (stage
    0 in fp32)."""
    norm = getattr(optimizer, "_global_grad_norm", None)
    return None if norm is None else float(norm)
