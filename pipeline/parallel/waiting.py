"""How long a rank computes and how long it is in collectives: the slowest rank waits least for the others."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.parallel.deepspeed_compat import wrap_collectives


@functools.cache
def _schedule(_process: int) -> int | None:
    """The kernel's figures about the main thread, as an open file; None where there are none."""
    try:
        return os.open(f"/proc/self/task/{os.getpid()}/schedstat", os.O_RDONLY)
    except OSError:
        return None


def clock() -> float:
    """Seconds, without those in which the main thread could run but the kernel ran others: a busy machine
    delays each rank at random."""
    figures = _schedule(os.getpid())
    if figures is None:
        return time.perf_counter()
    while True:
        delayed, now, again = _delayed(figures), time.perf_counter(), _delayed(figures)
        # A delay between the two readings would be in one of them only: the next call could seem earlier.
        if again == delayed:
            return now - delayed / 1e9


def _delayed(figures: int) -> int:
    return int(os.pread(figures, 100, 0).split()[1])


class Collectives:
    """Seconds that DeepSpeed's collectives take on this rank: transfers, and waiting for other ranks.

    On a GPU the time on the stream that runs them, which may be hidden behind computation.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[Any, Any]] = []
        self.seconds = 0.0  # since the last `take`, on CPUs
        wrap_collectives(self._timed)

    def take(self) -> float:
        """Seconds since the last call. On a GPU call it when the device has finished."""
        done = [pair for pair in self._events if pair[1].query()]
        seconds = self.seconds + sum(start.elapsed_time(end) for start, end in done) / 1000
        self._events.clear()
        self.seconds = 0.0
        return seconds

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                answer = function(*arguments, **options)
                end.record()
                self._events.append((start, end))
            else:
                began = clock()
                answer = function(*arguments, **options)
                self.seconds += clock() - began
            return _Handle(answer, self._timed) if hasattr(answer, "wait") else answer

        return call


class _Handle:
    """A collective that was started; its `wait` is timed."""

    def __init__(self, handle: Any, timed: Callable[..., Any]):
        self._handle = handle
        self.wait = timed(handle.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
