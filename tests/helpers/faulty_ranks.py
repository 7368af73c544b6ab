"""Functions for ranks (`helpers.ranks`) that train on a slow disk, a dead network or a slow processor."""

from __future__ import annotations

import os
from typing import Any

from helpers.ranks import _patch, train, train_and_listen, train_into_log, train_with_signal


def _slow_down_writes(seconds: float) -> None:
    import time

    from pipeline.checkpoints import saving

    write_file = saving._Writer._write_file

    def write_slowly(writer: Any, state_dict: Any, path: str) -> None:
        time.sleep(seconds)
        write_file(writer, state_dict, path)

    _patch(saving._Writer, "_write_file", write_slowly)


def train_with_slow_writes(arguments: list[str], seconds: float) -> int | str:
    """As `train`, with a disk that takes `seconds` more for every file of a checkpoint, and NaN in
    uninitialised memory."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    _slow_down_writes(seconds)
    return train(arguments)


def train_slowly_with_signal(arguments: list[str], seconds: float, *signal: int) -> int | str:
    """As `train_with_signal`, with the disk of `train_with_slow_writes`."""
    _slow_down_writes(seconds)
    return train_with_signal(arguments, *signal)


def train_into_log_slowly(arguments: list[str], folder: str, seconds: float) -> Any:
    """As `train_into_log`, with the disk of `train_with_slow_writes`."""
    _slow_down_writes(seconds)
    return train_into_log(arguments, folder)


def train_with_dead_network(arguments: list[str], after_step: int) -> tuple[int | str, str]:
    """As `train_and_listen`, with a store behind file:// that cannot be reached from a step's save on."""
    from fsspec.implementations.local import LocalFileSystem

    from data_prep.common import remote
    from pipeline.checkpoints.mirror import Mirror

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    def cut(*_: Any) -> None:
        for name in ("put_file", "pipe_file", "ls", "rm", "cat_file", "info"):
            _patch(LocalFileSystem, name, fail)

    add = Mirror.add

    def add_and_cut(mirror: Any, name: str) -> None:
        if int(name.removeprefix("step-")) >= after_step:
            cut()
        add(mirror, name)

    _patch(remote, "WAITS", (0.01, 0.01))
    _patch(Mirror, "add", add_and_cut)
    if not after_step:
        cut()
    return train_and_listen(arguments)


def train_slowed(arguments: list[str], rank: int, more: float, where: str) -> tuple[int | str, str]:
    """As `train_and_listen`, but `rank` sleeps `more` times its usual own time of a step, in the forward pass
    or while it waits for data."""
    import statistics
    import time

    from pipeline.data.loader import StepLoader
    from pipeline.training.engine import Engine

    compute, next_step, usual, slept = Engine.compute, StepLoader.next_step, [], [0.0]

    def sleep() -> None:
        slept[0] = more * statistics.median(usual[-15:] or [0.0])
        time.sleep(slept[0])

    def compute_slowly(engine: Any, step: Any) -> Any:
        hook = engine.deepspeed.module.register_forward_pre_hook(lambda *_: sleep())
        nats = compute(engine, step)
        hook.remove()
        usual.append(engine.own_seconds() - slept[0])
        return nats

    def compute_and_look(engine: Any, step: Any) -> Any:
        nats = compute(engine, step)
        usual.append(engine.own_seconds())
        return nats

    def wait_longer(loader: Any) -> Any:
        step = next_step(loader)
        sleep()
        step.wait_seconds += slept[0]
        return step

    if os.environ["RANK"] == str(rank):
        _patch(Engine, "compute", compute_slowly if where == "forward" else compute_and_look)
        if where == "data":
            _patch(StepLoader, "next_step", wait_longer)
    return train_and_listen(arguments)


def train_with_forgotten_matrices(arguments: list[str]) -> int | str:
    """As `train`, but the optimizer does not see the last of its tensors."""
    from pipeline.training import engine

    parts: Any = engine.fp32_parts
    _patch(engine, "fp32_parts", lambda optimizer: parts(optimizer)[:-1])
    return train(arguments)
