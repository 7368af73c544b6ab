"""Loading: all ranks agree on a whole checkpoint and load it, also with another number of ranks.

With the same ranks and ZeRO stage DeepSpeed loads its own files. Otherwise each rank assembles its new part
from the old ones (`zero_shards`) and passes it to DeepSpeed as if it had saved it; nothing is converted on
disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from data_prep.common.errors import UserError, counted, first_line
from pipeline.checkpoints import store
from pipeline.checkpoints.store import Meta
from pipeline.checkpoints.zero_shards import WEIGHT, Parts
from pipeline.parallel.agreement import AgreedError, agree
from pipeline.parallel.deepspeed_compat import fp32_parts


def agree_on_newest_whole(run_dir: str | Path) -> tuple[Path, Meta, str] | None:
    """`store.newest_whole` with every byte read: the ranks divide the files among them and agree.

    Raises AgreedError when the ranks see different checkpoints.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    spoilt: dict[str, str] = {}
    while True:
        found = store.newest_whole(run_dir, spoilt)
        damaged = []
        if found:
            by_size = sorted(found[1].files, key=lambda name: (-found[1].files[name][0], name))
            damaged = store.damaged_files(*found[:2], by_size[rank::world])
        name = found[0].name if found else None
        everyone = agree(None, (name, damaged))
        for other, (theirs, _) in enumerate(everyone):
            if theirs != everyone[0][0]:
                raise AgreedError(
                    f"rank 0 sees the checkpoint {everyone[0][0]} in {run_dir}, rank {other} sees {theirs}: "
                    "put --output_dir on a disk that all machines share"
                )
        damaged = sorted(file for _, files in everyone for file in files)
        if not damaged:
            return found
        spoilt[name] = store.spoilt_message(found[0], damaged)


def restore(engine: Any, checkpoint: Path, meta: Meta, world: int, zero_stage: int) -> None:
    """Load weights and optimizer state into the engine, which runs on `world` ranks at `zero_stage`.

    The engine's own settings stay (weight decay, betas, eps, clipping): the recipe may have changed.
    Raises UserError when it does not load, though its bytes are as they were written.
    """
    as_written = zero_stage == 0 or (world, zero_stage) == (meta.world, meta.zero_stage)
    if not as_written and engine.zero_nvme_offload_optimizer():
        raise AgreedError(
            f"checkpoint {checkpoint} was written by {counted(meta.world, 'rank')} with ZeRO "
            f"{meta.zero_stage}: its "
            "optimizer state on NVMe cannot be redistributed: start with those, or without NVMe offload"
        )
    settings = [{**group, "params": ()} for group in engine.optimizer.param_groups]
    clip = getattr(engine.optimizer, "clip_grad", None)
    try:
        if as_written:
            # Without partitions every rank holds everything, so their number does not matter.
            path, _ = engine.load_checkpoint(
                str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
            )
            if path is None:
                raise ValueError("DeepSpeed finds no state in it")
        else:
            _restore_parts(engine, Parts(checkpoint, meta), zero_stage)
    except UserError:
        raise
    except Exception as error:  # torch, pickle and DeepSpeed raise many kinds for a file they cannot use
        raise UserError(
            f"checkpoint {checkpoint} does not load ({first_line(error)}), and its bytes are as they were "
            "written: is there memory enough, and are torch and DeepSpeed those that wrote it (starts.jsonl)?"
        ) from error
    # A checkpoint also holds the settings of the start that wrote it.
    for group, ours in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update({**ours, "params": group["params"]})
    if clip is not None:
        engine.optimizer.clip_grad = clip


@torch.no_grad()
def _restore_parts(engine: Any, parts: Parts, zero_stage: int) -> None:
    """Load this rank's part of a checkpoint that another number of ranks, or another stage, has written."""
    optimizer = engine.optimizer
    if zero_stage == 3:
        optimizer.checkpoint_event_prologue()
    _load_rest(engine, parts, zero_stage)

    state = optimizer.state_dict()  # in this world's form; its values are replaced
    saved = parts.optimizers[0]
    for key in ("loss_scaler", "dynamic_loss_scale", "overflow"):
        state[key] = saved[key]
    flats, moments = _filled(optimizer, parts)
    state["fp32_flat_groups" if zero_stage == 3 else "single_partition_of_fp32_groups"] = flats
    state["optimizer_state_dict" if zero_stage == 3 else "base_optimizer_state"]["state"] = moments
    world = torch.distributed.get_world_size()
    optimizer.load_state_dict([state] * world, load_optimizer_states=True, load_from_fp32_weights=True)

    if zero_stage == 3:
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, parts.common[key])


def _load_rest(engine: Any, parts: Parts, zero_stage: int) -> None:
    """What the optimizer does not hold: buffers and frozen weights."""
    for name, buffer in engine.module.named_buffers():
        if name in parts.buffers:
            buffer.copy_(parts.buffers[name])
    for name, weight in engine.module.named_parameters():
        if name not in parts.frozen:
            continue
        whole = parts.tensor(name)
        if zero_stage == 3:
            mine = weight.ds_tensor
            mine.copy_(_share(whole, mine.numel(), torch.distributed.get_rank()).view_as(mine))
        else:
            weight.copy_(whole)


def _share(whole: Tensor, numel: int, rank: int) -> Tensor:
    """ZeRO-3's piece for a rank: `numel` values, the last ones padded with zeros."""
    piece = whole.flatten()[rank * numel : (rank + 1) * numel]
    return torch.nn.functional.pad(piece, (0, numel - piece.numel()))


def _filled(optimizer: Any, parts: Parts) -> tuple[list[Tensor], dict[int, dict[str, Any]]]:
    """This rank's weights in fp32, a flat tensor for each group, and the groups' other states."""
    flats: list[Tensor] = []
    moments: dict[int, dict[str, Any]] = {}
    for number, (like, pieces) in enumerate(fp32_parts(optimizer)):
        names = [optimizer.param_names[weight] for weight, _, _ in pieces]
        filled = {key: torch.zeros_like(like) for key in (WEIGHT, *parts.keys(names[0]))}
        for name, (_, here, there) in zip(names, pieces, strict=True):
            for key, flat in filled.items() if here.start < here.stop else ():
                flat[here] = parts.state(name, key).flatten()[there]
        flats.append(filled.pop(WEIGHT))
        moments[number] = {**_copied(parts.scalars(names[0])), **filled}
    return flats, moments


def _copied(scalars: dict[str, Any]) -> dict[str, Any]:
    """A copy for each group: Adam counts its `step` in place."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in scalars.items()}
