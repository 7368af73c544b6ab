"""A checkpoint's ZeRO parts as whole tensors by name, for any number of ranks that wrote them.

They are the weights in fp32 and the optimizer's states of each weight (Adam's moments and any other of its
shape). Files are memory-mapped and a tensor is assembled when it is read, so that no process holds the model
twice.

DeepSpeed's files are pickles: read only those of your own runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.common.errors import UserError, first_line
from pipeline.checkpoints.store import DamagedCheckpoint, Meta

WEIGHT = "weight"  # the key of the fp32 weight itself, beside "exp_avg", "exp_avg_sq", …


class Parts:
    """One checkpoint, mapped into memory.

    weights: name → shape of everything that is trained. frozen: name → shape of weights that are not.
    """

    def __init__(self, checkpoint: Path, meta: Meta):
        self.checkpoint, self._stage, self._world = checkpoint, meta.zero_stage, meta.world
        try:
            self._open()
        except Exception as error:  # torch and pickle raise many kinds for a damaged file
            raise DamagedCheckpoint(
                f"checkpoint {checkpoint} is damaged, a file of it does not load ({first_line(error)})"
            ) from error

    def _open(self) -> None:
        prefix = "zero_pp_rank_0_" if self._stage == 3 else ""
        self.common = self._load(f"{prefix}mp_rank_00_model_states.pt")
        module = self.common["module"]
        buffers = set(self.common["buffer_names"])
        self.buffers: dict[str, Tensor] = {name: module[name] for name in buffers}
        if self._stage == 0:
            self.weights = {name: tensor.shape for name, tensor in module.items() if name not in buffers}
            self.frozen: dict[str, torch.Size] = {}
            self._same: dict[str, str] = {}
            return
        groups = self.common["param_shapes"]
        self.weights = {name: shape for group in groups for name, shape in group.items()}
        same = dict(self.common.get("shared_params") or {})
        self._same = {name: first for name, first in same.items() if first in self.weights}
        self.optimizers = [self._load(self._optimizer_file(rank)) for rank in range(self._world)]
        self.optimizers = [one["optimizer_state_dict"] for one in self.optimizers]
        if self._stage == 3:
            self.frozen = dict(self.common.get("frozen_param_shapes") or {})
            self._frozen_parts = [
                self._load(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")["frozen_param_fragments"]
                for rank in range(self._world if self.frozen else 0)
            ]
            self._places = {}  # name → (sub-group, offset in every rank's flat tensor)
            for number, group in enumerate(groups):
                offset = 0
                for name, shape in group.items():
                    self._places[name] = (number, offset)
                    offset += -(-math.prod(shape) // self._world)
        else:
            trained = {*self.weights, *self._same, *buffers}
            self.frozen = {name: tensor.shape for name, tensor in module.items() if name not in trained}

    def _load(self, name: str) -> dict[str, Any]:
        return torch.load(self.checkpoint / name, map_location="cpu", mmap=True, weights_only=False)

    def _optimizer_file(self, rank: int) -> str:
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        half = f"bf16_{name}"
        return half if (self.checkpoint / half).is_file() else name

    def shapes(self) -> dict[str, torch.Size]:
        """Name → shape of the model's whole state dict, tied weights under each of their names."""
        found = {**self.weights, **self.frozen, **{n: t.shape for n, t in self.buffers.items()}}
        return found | {name: found[first] for name, first in self._same.items()}

    def tensor(self, name: str) -> Tensor:
        """A weight (fp32) or a buffer of the model, whole; tied ones under each of their names."""
        name = self._same.get(name, name)
        if name in self.buffers:
            return self.buffers[name]
        if self._stage == 0:
            return self.common["module"][name].float()
        if name in self.frozen:
            if self._stage < 3:
                return self.common["module"][name].float()
            pieces = [part[name].flatten() for part in self._frozen_parts]
            return _joined(pieces, self.frozen[name]).float()
        return self.state(name, WEIGHT)

    def state(self, name: str, key: str) -> Tensor:
        """A weight's fp32 copy (`WEIGHT`) or one of its optimizer states, whole. ZeRO stages 1, 2 and 3."""
        name = self._same.get(name, name)
        return _joined([self._piece(rank, name, key) for rank in range(self._world)], self.weights[name])

    def keys(self, name: str) -> list[str]:
        """What the optimizer keeps for a weight and of its shape: `exp_avg`, …; alike in all of a group."""
        state = self._state_of(name)
        longest = max(t.numel() for t in state.values() if isinstance(t, Tensor)) if state else 0
        return sorted(k for k, t in state.items() if isinstance(t, Tensor) and t.numel() == longest > 1)

    def scalars(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps for a weight's whole group: Adam's `step`."""
        keys = self.keys(name)
        return {key: value for key, value in self._state_of(name).items() if key not in keys}

    def _state_of(self, name: str) -> dict[str, Any]:
        name = self._same.get(name, name)
        for rank in range(self._world):
            if (place := self._place(rank, name)) is not None:
                return self._state(rank, place[0])
        raise KeyError(name)

    def _base(self, rank: int) -> dict[str, Any]:
        key = "optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"
        return self.optimizers[rank][key]

    def _state(self, rank: int, group: int) -> dict[str, Any]:
        return self._base(rank)["state"].get(group, {})

    def _piece(self, rank: int, name: str, key: str) -> Tensor:
        """Rank `rank`'s piece of a tensor: flat, in order, perhaps empty, padded at the very end."""
        place = self._place(rank, name)
        if place is None:
            return torch.empty(0)
        group, start, numel = place
        weights = "fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"
        flat = self.optimizers[rank][weights][group] if key == WEIGHT else self._state(rank, group)[key]
        return flat.detach().flatten()[start : start + numel]

    def _place(self, rank: int, name: str) -> tuple[int, int, int] | None:
        """Group, start and number of values of a rank's piece in its flat tensors; None if it has none."""
        if self._stage == 3:
            return *self._places[name], -(-math.prod(self.weights[name]) // self._world)
        for group, places in enumerate(self.optimizers[rank]["param_slice_mappings"]):
            if name in places:
                return group, places[name].start, places[name].numel
        return None


def _joined(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    numel = math.prod(shape)
    whole = pieces[0] if pieces[0].numel() >= numel else torch.cat(pieces)
    if whole.numel() < numel:
        raise UserError(f"a weight of shape {list(shape)} has only {whole.numel()} values in the checkpoint")
    return whole[:numel].view(shape)
