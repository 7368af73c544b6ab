"""Ranks for tests: real processes, real gloo on the loopback address, forked from a preloaded server.

Importing torch, transformers and DeepSpeed costs about nine CPU-seconds for each process. The fork server
imports them once; every `run` forks fresh ranks from it in milliseconds, so no state of an earlier run is
left in them, and none outlives its run.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

MODULES = [
    "pipeline.train",
    "pipeline.training_run",
    "pipeline.export",
    # What DeepSpeed imports only when it needs it: the ZeRO optimizers, and by way of one of them torch's
    # compiler.
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.parameter_offload",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.zero_to_fp32",
]


class RankPool:
    """Runs functions on fresh ranks; `close` ends the server that they are forked from."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(MODULES)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank; results by rank.

        Raises RuntimeError, with the rank's own traceback, when one fails or dies.
        """
        port = free_port()
        ranks = []
        for rank in range(world):
            receive, send = self._context.Pipe(duplex=False)
            process = self._context.Process(
                target=_be_rank, args=(rank, world, port, send, function, arguments)
            )
            process.start()
            send.close()
            ranks.append((process, receive))
        try:
            return [_result(rank, *pair) for rank, pair in enumerate(ranks)]
        finally:
            for process, receive in ranks:
                receive.close()
                process.join(30)
                if process.is_alive():
                    process.kill()
                    process.join()

    def close(self) -> None:
        """End the fork server."""
        multiprocessing.forkserver._forkserver._stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _be_rank(
    rank: int, world: int, port: int, send: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        send.send((True, function(*arguments)))
    except BaseException:
        send.send((False, traceback.format_exc()))
    send.close()


def _result(rank: int, process: Any, receive: Any) -> Any:
    try:
        good, value = receive.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}") from None
    if not good:
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value


# What ranks run. Kept here, because a forked rank imports the module of the function that it is given.


def train(arguments: list[str]) -> int | str:
    """`pipeline/train.py`'s main: its exit status, or the message of a UserError."""
    from data_prep.errors import UserError
    from pipeline.train import main

    try:
        return main(arguments)
    except UserError as error:
        return str(error)


def train_and_listen(arguments: list[str]) -> tuple[int | str, str]:
    """As `train`, with what the rank wrote to standard output."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        answer = train(arguments)
    return answer, out.getvalue()


def train_as_on_gpus(arguments: list[str]) -> int | str:
    """As `train`, but nothing is dropped from the strategy for CPUs."""
    from pipeline import training_run

    complete = training_run.complete_strategy
    training_run.complete_strategy = lambda *given, on_gpu: complete(*given, on_gpu=True)
    return train(arguments)


def train_with_signal(arguments: list[str], number: int, rank: int, after_step: int) -> int | str:
    """As `train`, but `rank` sends itself a signal once metrics.jsonl has `after_step` steps."""
    import threading
    import time
    from pathlib import Path

    metrics = Path(arguments[arguments.index("--output_dir") + 1]) / "metrics.jsonl"

    def watch() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < after_step:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    if os.environ["RANK"] == str(rank):
        threading.Thread(target=watch, daemon=True).start()
    return train(arguments)


def train_with_bad_gradient(arguments: list[str], rank: int, after_calls: int) -> int | str:
    """As `train`, but on `rank` one weight's gradient becomes NaN after that many backward passes."""
    import itertools

    from pipeline import training_run

    build_model = training_run.build_model

    def build_with_fault(*settings: Any, **loss: float) -> Any:
        model = build_model(*settings, **loss)
        calls = itertools.count()
        weight = next(model.parameters())
        weight.register_hook(lambda g: g * float("nan") if next(calls) >= after_calls else g)
        return model

    if os.environ["RANK"] == str(rank):
        training_run.build_model = build_with_fault
    return train(arguments)


def train_with_wrong_bins(arguments: list[str], fault: str) -> int | str:
    """As `train`, but the loader is broken: it leaves out the stream's fifth bin (`skip`), or gives rank 1
    what is rank 0's (`twice`)."""
    from pipeline import loader

    real_bins, real_assign = loader.BinPlan.bins, loader.assign

    def bins_with_gap(plan: Any, position: Any = None) -> Any:
        for number, bin_ in enumerate(real_bins(plan, position), sum(position.taken)):
            if number != 4:
                yield bin_

    def assign_rank_0(bins: list, ranks: Any) -> list:
        return real_assign(bins, loader.Ranks(0, ranks.world, ranks.local))

    if fault == "skip":
        loader.BinPlan.bins = bins_with_gap
    else:
        loader.assign = assign_rank_0
    return train(arguments)


def train_compiled(arguments: list[str], backend: str) -> tuple[int | str, int, list[str]]:
    """As `train`, with a given backend of torch.compile: (status, graphs, reasons why one was cut).

    A function that has to be compiled too often is an error, not given up silently.
    """
    import torch

    from pipeline import engine

    engine.COMPILE_BACKEND = backend
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    status = train(arguments)
    counters = torch._dynamo.utils.counters
    return status, counters["stats"]["unique_graphs"], [r.splitlines()[0] for r in counters["graph_break"]]


def train_without_programs(arguments: list[str]) -> int | str:
    """As `train`, on a machine where no program can be found."""
    os.environ["PATH"] = ""
    return train(arguments)


def tensors_in_checkpoints(run_dir: str) -> tuple[int, int]:
    """How many floating-point tensors stand in a run's checkpoints, optimizer states included, and how many
    of them hold a value that is not finite."""
    from pathlib import Path

    import torch

    def tensors(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, dict):
            for one in value.values():
                yield from tensors(one)
        elif isinstance(value, (list, tuple)):
            for one in value:
                yield from tensors(one)

    found = [
        bool(tensor.isfinite().all())
        for file in Path(run_dir).glob("checkpoints/*/*.pt")
        for tensor in tensors(torch.load(file, weights_only=False))
    ]
    return len(found), found.count(False)


def export_and_measure(run_dir: str, output: str, which: str) -> tuple[str, float]:
    """Export, load, and measure on the run's validation sample by plain torch: (class, bits per byte)."""
    import itertools
    import math

    import torch
    import yaml

    from data_prep.shards import ShardSet
    from pipeline.batches import build_batch
    from pipeline.bins import BinPlan
    from pipeline.export import export_run
    from pipeline.model_io import load_model, load_model_tokenizer
    from pipeline.training_run import VALIDATION_SEED

    export_run(run_dir, output, which)
    model, tokenizer = load_model(output), load_model_tokenizer(output)
    with open(os.path.join(run_dir, "recipe.yaml"), encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    data = recipe["data"]
    plan = BinPlan(
        [ShardSet.open(data["validation"])], data["window_tokens"], data["bin_tokens"], VALIDATION_SEED
    )
    nats = text_bytes = 0.0
    with torch.no_grad():
        for bin_ in itertools.islice(plan.epoch(), recipe["training"]["eval_bins"]):
            batch = build_batch(plan.spans(bin_))
            sums = model(batch)
            nats += float(sums.token_nll + sums.end_nll + sums.stop_nll)
            text_bytes += float(tokenizer.byte_lengths[batch.tokens_T.numpy()].sum())
    return type(model).__name__, nats / math.log(2) / text_bytes


def export_error(run_dir: str, output: str) -> str:
    """The message with which `export_run` refuses a run; empty when it does not."""
    from data_prep.errors import UserError
    from pipeline.export import export_run

    try:
        export_run(run_dir, output)
    except UserError as error:
        return str(error)
    return ""


def doctor(arguments: list[str], environments: list[dict[str, str]]) -> tuple[int, str, str]:
    """`sllm doctor` with the rank's own further environment (`CWD`: its working folder, `SITE`: a folder of
    packages that come before the installed ones): its status, and what it wrote to stdout and stderr."""
    import contextlib
    import io
    import sys

    from pipeline.cli import main

    os.environ.update(environments[int(os.environ["RANK"])])
    os.chdir(os.environ.get("CWD", "."))
    sys.path.insert(0, os.environ.get("SITE", ""))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(["doctor", *arguments])
    return status, out.getvalue(), err.getvalue()
