"""Index arrays of a batch on their way to its device: one by one, or all of them by one transfer.

The arrays that a model reads of a batch (which rows attend to which, where rows go) are computed on the host
when first needed. A copy from unpinned memory makes the host wait for the GPU, so in training the loader's
thread makes what the batches before needed (`make`), and gathers it in pinned memory (`Upload`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 256  # bytes: fits every dtype, and kernels that read 16 bytes at once
_FIRST_BYTES = 1 << 22  # of a buffer, before the size of a batch is known
_thread = threading.local()

# Name of a property, or of a method with its arguments → what was made of its value.
Needs = dict[tuple[Any, ...], Any]


class Made:
    """Base of what is computed of a batch on the host, once, when first needed: its cached properties and
    `kept` methods. Anything computed on the device is neither."""

    @cached_property
    def _kept(self) -> dict[tuple[Any, ...], Any]:
        return {}


def kept(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a `Made` that computes its answer once for the same arguments."""

    @functools.wraps(method)
    def answer(self: Made, *arguments: Any) -> Any:
        key = (method.__name__, arguments)
        if key not in self._kept:
            self._kept[key] = method(self, *arguments)
        return self._kept[key]

    return answer


def needs(made: Made) -> Needs:
    """What has been made of an object so far."""
    found = {
        (name,): value
        for name, value in vars(made).items()
        if isinstance(value, Made) or isinstance(getattr(type(made), name, None), cached_property)
    }
    found |= found.pop(("_kept",), {})
    return {key: needs(value) if isinstance(value, Made) else {} for key, value in found.items()}


def make(made: Made, wanted: Needs) -> None:
    """Make of an object what was made of another of its kind."""
    for (name, *called), inner in wanted.items():
        value = getattr(made, name)
        value = value(*called[0]) if called else value
        if isinstance(value, Made):
            make(value, inner)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on a device; inside of `Upload.collecting` a tensor that `Upload.start` will fill."""
    upload = getattr(_thread, "upload", None)
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(device, non_blocking=True) if upload is None else upload.place(tensor)


class Upload:
    """Tensors on a device that one copy from pinned memory fills.

    Args:
        size: bytes expected; what does not fit goes into further buffers, with a copy each.
    """

    def __init__(self, device: torch.device, size: int = 0):
        self.device, self._size = device, max(size, _FIRST_BYTES)
        self._buffers: list[tuple[Tensor, Tensor]] = []  # on the host and on the device
        self._ends: list[int] = []  # of what is in them
        self.bytes = 0

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the `with` block, in this thread, `to_device` places arrays here."""
        _thread.upload = self
        try:
            yield
        finally:
            _thread.upload = None

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor's place on the device, filled by `start`."""
        count = -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        if not self._buffers or self._ends[-1] + count > len(self._buffers[-1][0]):
            size, pinned = max(self._size, count), self.device.type == "cuda"
            on_device = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._buffers.append((torch.empty(size, dtype=torch.uint8, pin_memory=pinned), on_device))
            self._ends.append(0)
        here = slice(self._ends[-1], self._ends[-1] + tensor.nbytes)
        self._ends[-1] += count
        self.bytes += count
        host, device = (x[here].view(tensor.dtype).view(tensor.shape) for x in self._buffers[-1])
        host.copy_(tensor)
        return device

    def start(self) -> int:
        """Copy, without waiting for it; the number of copies. A second call copies nothing."""
        count = len(self._buffers)
        for (host, device), end in zip(self._buffers, self._ends, strict=True):
            device[:end].copy_(host[:end], non_blocking=True)
        self._buffers, self._ends = [], []
        return count


class Uploader:
    """Makes in the loader's thread what the model has needed of earlier batches.

    device: where the batches go; on a CPU there is nothing to copy, and nothing is made ahead.
    """

    def __init__(self, device: torch.device):
        self.device, self.wanted, self._size = device, Needs(), 0

    def learn(self, batch: Made) -> None:
        """Note what the model needed of a batch."""
        if self.device.type != "cpu":
            self.wanted = _union(self.wanted, needs(batch))

    def prepare(self, batch: Any) -> Any:
        """The batch on the device; `Batch.to` starts its copy."""
        if self.device.type == "cpu":
            return batch
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread: pinned memory belongs to a device's context
        upload = Upload(self.device, self._size)
        with upload.collecting():
            moved = batch.placed(upload)
            make(moved, self.wanted)
        self._size = max(self._size, 1 << upload.bytes.bit_length())
        return moved


def _union(one: Needs, other: Needs) -> Needs:
    return one | {key: _union(one.get(key, {}), inner) for key, inner in other.items()}
