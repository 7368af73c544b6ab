"""Work of static shapes, which a GPU replays as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.generation.upload import upload

EAGER_CALLS = 3  # of a shape before its graph is captured: they initialise the libraries


def static_shapes(device: torch.device) -> bool:
    """Whether steps run with static shapes here, so that they can be captured."""
    return device.type == "cuda"


def bucket(rows: int, most: int) -> int:
    """The rows that a static step computes for so many: a power of two, or all."""
    return min(most, 1 << (rows - 1).bit_length())


class Replay:
    """A step of static shapes as a function of host inputs [k, n] and, if given, of `more` tensors.

    On a GPU the step is captured once for every n and replayed; what it returns is overwritten by the next
    call. Elsewhere it is called."""

    def __init__(self, step: Callable[..., Tensor], device: torch.device):
        self._step, self._device = step, device
        self._calls: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[Any, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, inputs: np.ndarray, *more: Tensor, version: Any = 0) -> Tensor:
        """version: of the storage that the step uses: with another one its graph is captured again."""
        if self._device.type != "cuda":
            return self.eager(upload(inputs, self._device), *more)
        key = inputs.shape[1], version
        self._calls[key] = calls = self._calls.get(key, 0) + 1
        if calls <= EAGER_CALLS:
            return self.eager(upload(inputs, self._device), *more)
        if key not in self._graphs:
            self._graphs = {old: one for old, one in self._graphs.items() if old[1] == version}
            static = (upload(inputs, self._device), *(x.clone() for x in more))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.eager(*static)
            self._graphs[key] = graph, static, out
        graph, static, out = self._graphs[key]
        for old, new in zip(static, (torch.from_numpy(inputs).pin_memory(), *more), strict=True):
            old.copy_(new, non_blocking=True)
        graph.replay()
        return out

    def eager(self, *given: Tensor) -> Tensor:
        """The step itself: what a graph holds."""
        return self._step(*given)
