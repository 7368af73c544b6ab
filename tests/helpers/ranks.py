"""Ranks for tests: real processes with gloo on the loopback address, forked from a preloaded server.

Importing torch, transformers and DeepSpeed takes about nine CPU-seconds per process. The fork server imports
them once; every `run` forks fresh ranks in milliseconds, so no state of an earlier run remains.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from collections.abc import Callable
from typing import Any

from pipeline.parallel.ranks import free_port

MODULES = [
    "pipeline.training.main",
    "pipeline.training.run",
    "pipeline.export.model_folder",
    # DeepSpeed imports these on use: the ZeRO optimizers, and through one of them torch's compiler.
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.parameter_offload",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


class RankPool:
    """Runs functions on fresh ranks; `close` ends the fork server."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(MODULES)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank; results by rank.

        Raises RuntimeError with the rank's traceback when one fails or dies.
        """
        started = self.start(world, function, *arguments)
        try:
            return [_result(rank, *pair) for rank, pair in enumerate(started)]
        finally:
            self.finish(started, 30)

    def start(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, Any]]:
        """Start `function(*arguments)` on every rank: (process, pipe that receives its result)."""
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
        return ranks

    def finish(self, started: list[tuple[Any, Any]], seconds: float) -> bool:
        """Wait for each rank, then kill it. Returns whether all ended by themselves."""
        alone = True
        for process, receive in started:
            receive.close()
            process.join(seconds)
            if process.is_alive():
                alone = False
                process.kill()
                process.join()
        return alone

    def close(self) -> None:
        """End the fork server."""
        server: Any = multiprocessing.forkserver._forkserver
        server._stop()


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


# Functions for ranks. In a module, because a forked rank imports its function by name.


def _patch(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute; the rank ends with the test."""
    setattr(owner, name, value)


def train(arguments: list[str]) -> int | str:
    """`pipeline/train.py`'s main: its exit status, or the message of a UserError."""
    from data_prep.common.errors import UserError
    from pipeline.training.main import main

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


def train_without_reader(arguments: list[str]) -> int:
    """As `train`, but no process reads standard output; the exit status."""
    from data_prep.common.errors import run_main
    from pipeline.training.main import main

    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    return run_main("train.py", lambda: main(arguments))


def train_as_on_gpus(arguments: list[str]) -> int | str:
    """As `train`, with the DeepSpeed config for GPUs."""
    from pipeline.training import run as training_run

    complete: Any = training_run.complete_strategy
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


def train_into_log(arguments: list[str], folder: str, absent: int | None = None) -> int | str | None:
    """As `train_unless`, with everything the rank writes appended to FOLDER/rank-N.log."""
    log = os.open(
        os.path.join(folder, f"rank-{os.environ['RANK']}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )
    for stream in (1, 2):
        os.dup2(log, stream)
    return train_unless(arguments, absent)


def train_with_file_limit(arguments: list[str], rank: int, limit: int) -> int | str:
    """As `train`, but `rank` cannot write more than `limit` bytes into a file."""
    import resource

    if os.environ["RANK"] == str(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return train(arguments)


def train_with_full_log(arguments: list[str], after_save: int) -> int | str:
    """As `train`, but after the checkpoint of one step the disk of rank 0 is full half a line later."""
    import resource

    from pipeline.training.run_log import RunLog

    save = RunLog.save

    def save_and_fill(log: Any, record: dict[str, Any]) -> None:
        save(log, record)
        if record["step"] == after_save and os.environ["RANK"] == "0":
            limit = log._files["metrics.jsonl"].tell() + 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    _patch(RunLog, "save", save_and_fill)
    return train(arguments)


def train_and_look(arguments: list[str]) -> tuple[int | str, bool, int]:
    """As `train`: its answer, whether this rank is in a process group afterwards, and how many bytes it
    hashed to verify checkpoints."""
    import torch.distributed

    from pipeline.checkpoints import store as checkpoints

    real = checkpoints.damaged_files
    read: list[int] = []

    def counting(checkpoint: Any, meta: Any, names: Any = None) -> list[str]:
        read.extend(meta.files[name][0] for name in (meta.files if names is None else names))
        return real(checkpoint, meta, names)

    checkpoints.damaged_files = counting
    return train(arguments), torch.distributed.is_initialized(), sum(read)


def train_in_folders(arguments: list[str], folders: list[str]) -> int | str:
    """As `train`, every rank in another working folder: with a relative --output_dir they share no disk."""
    os.chdir(folders[int(os.environ["RANK"])])
    return train(arguments)


def train_with_environment(arguments: list[str], environment: dict[str, str]) -> int | str:
    """As `train`, with more environment variables."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        return train(arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)


def train_and_watch_the_disk(arguments: list[str]) -> tuple[int | str, list[tuple[str, str, int]]]:
    """As `train`, with this rank's flushes and renames in order: ("flush", name, lines of a .jsonl) and
    ("rename", new name, 0)."""
    from pathlib import Path

    seen: list[tuple[str, str, int]] = []
    fsync, rename = os.fsync, os.rename

    def flush(handle: int) -> None:
        fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        lines = path.read_text().count("\n") if path.suffix == ".jsonl" else 0
        seen.append(("flush", path.name, lines))

    def move(source: Any, target: Any) -> None:
        rename(source, target)
        seen.append(("rename", Path(target).name, 0))

    _patch(os, "fsync", flush)
    _patch(os, "rename", move)
    return train(arguments), seen


def train_with_wrong_bins(arguments: list[str], fault: str) -> int | str:
    """As `train`, but the loader skips the fifth bin (`skip`) or gives rank 1 rank 0's bins (`twice`)."""
    from pipeline.data import loader

    real_bins, real_assign = loader.BinPlan.bins, loader.assign

    def bins_with_gap(plan: Any, position: Any = None) -> Any:
        for number, bin_ in enumerate(real_bins(plan, position), sum(position.taken)):
            if number != 4:
                yield bin_

    def assign_rank_0(bins: list, ranks: Any) -> list:
        return real_assign(bins, loader.Ranks(0, ranks.world, ranks.local))

    if fault == "skip":
        _patch(loader.BinPlan, "bins", bins_with_gap)
    else:
        loader.assign = assign_rank_0
    return train(arguments)


def train_with_bad_gradient(
    arguments: list[str], rank: int, after_calls: int, until_calls: int
) -> tuple[int | str, list[tuple[str, str]]]:
    """As `train`, but on `rank` one weight's gradient is NaN in the backward passes [after, until): status,
    and digests of weights and optimizer states before and after each update."""
    import itertools

    from pipeline.training import run as training_run

    new_model = training_run.new_model

    def build_with_fault(*settings: Any) -> Any:
        model = new_model(*settings)
        calls = itertools.count()
        weight = next(model.parameters())
        bad = range(after_calls, until_calls)
        weight.register_hook(lambda g: g * float("nan") if next(calls) in bad else g)
        return model

    if os.environ["RANK"] == str(rank):
        _patch(training_run, "new_model", build_with_fault)
    return _with_digests(arguments)


def train_with_bad_loss(
    arguments: list[str], rank: int, after_calls: int, until_calls: int
) -> tuple[int | str, list[tuple[str, str]]]:
    """As `train_with_bad_gradient`, but the reported objective is NaN and the gradient is good."""
    import itertools

    from pipeline.training import engine

    nats, calls = engine._nats, itertools.count()

    def bad_nats(losses: Any) -> Any:
        found = nats(losses)
        if losses.objective.requires_grad and next(calls) in range(after_calls, until_calls):
            found[0] = float("nan")
        return found

    if os.environ["RANK"] == str(rank):
        engine._nats = bad_nats
    return _with_digests(arguments)


def _with_digests(arguments: list[str]) -> tuple[int | str, list[tuple[str, str]]]:
    from pipeline.training.engine import Engine

    update: Any = Engine.update
    seen: list[tuple[str, str]] = []

    def watched(engine: Any, *settings: Any) -> Any:
        before = _digest(engine)
        answer = update(engine, *settings)
        seen.append((before, _digest(engine)))
        return answer

    _patch(Engine, "update", watched)
    return train(arguments), seen


def _digest(engine: Any) -> str:
    """Digest of all that an update changes on this rank: weights, master weights, moments, counters."""
    import hashlib

    digest = hashlib.sha256()
    for parameter in engine.deepspeed.module.parameters():
        digest.update(getattr(parameter, "ds_tensor", parameter).detach().numpy().tobytes())
    for parameter, state in engine.deepspeed.basic_optimizer.state.items():
        for tensor in (parameter, *(state[name] for name in sorted(state))):
            digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def train_without_update(arguments: list[str], step: int) -> int | str:
    """As `train`, but torch's AdamW does nothing in one step (one process without partitioning)."""
    import itertools

    import torch

    original, calls = torch.optim.AdamW.step, itertools.count(1)

    def step_or_not(self: Any, closure: Any = None) -> Any:
        return None if next(calls) == step else original(self, closure)

    _patch(torch.optim.AdamW, "step", step_or_not)
    return train(arguments)


def train_with_difference(arguments: list[str], fault: str) -> int | str:
    """As `train`, but rank 1 differs from rank 0 in one respect."""
    from pipeline.parallel import agreement
    from pipeline.training import run as training_run

    if os.environ["RANK"] == "1":
        if fault == "recipe":
            arguments = [*arguments, "--optimizer.lr", "0.125"]
        elif fault == "code":
            _patch(agreement, "code_version", lambda: "other")
        else:
            provenance = training_run.provenance

            def older(*settings: Any) -> dict:
                found = provenance(*settings)
                found["packages"]["torch"] = "0.1"
                return found

            _patch(training_run, "provenance", older)
    return train(arguments)


def train_with_unmeasured_weights(arguments: list[str]) -> int | str:
    """As `train`, but the first evaluation gives figures that are not finite."""
    import itertools

    from pipeline.training.validation import Validation

    run, calls = Validation.run, itertools.count(1)

    def run_badly(self: Any, engine: Any) -> dict:
        figures = run(self, engine)
        return figures | ({"bits_per_byte": float("nan")} if next(calls) == 1 else {})

    _patch(Validation, "run", run_badly)
    return train(arguments)


def train_without_a_look_at_weights(arguments: list[str]) -> int | str:
    """As `train` of a release that saved weights that are not finite."""
    from pipeline.training.engine import Engine

    _patch(Engine, "weights_are_finite", lambda engine: True)
    return train(arguments)


def train_unless(settings: list[str], absent: int | None, port: str | None = None) -> int | str | None:
    """As `train`, but the rank `absent` leaves before it joins the others. port: in place of a free one."""
    os.environ["MASTER_PORT"] = port or os.environ["MASTER_PORT"]
    return None if int(os.environ["RANK"]) == absent else train(settings)


def train_and_hang(arguments: list[str], rank: int) -> int | str:
    """As `train`, but `rank` never returns from the third forward pass."""
    import itertools
    import time

    from pipeline.training import run as training_run

    new_model, calls = training_run.new_model, itertools.count(1)

    def hang_here(*_: Any) -> None:
        if next(calls) == 3:
            time.sleep(600)

    def build_with_fault(*settings: Any) -> Any:
        model = new_model(*settings)
        model.register_forward_pre_hook(hang_here)
        return model

    if os.environ["RANK"] == str(rank):
        _patch(training_run, "new_model", build_with_fault)
    return train(arguments)


def train_with_a_slow_rank(arguments: list[str], rank: int) -> tuple[int | str, str]:
    """As `train_and_listen`, but `rank` computes 0.1 s longer in every forward pass."""
    import time

    from pipeline.training import run as training_run

    new_model = training_run.new_model

    def burn(*_: Any) -> None:
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass

    def build_slow(*settings: Any) -> Any:
        model = new_model(*settings)
        model.register_forward_pre_hook(burn)
        return model

    if os.environ["RANK"] == str(rank):
        _patch(training_run, "new_model", build_slow)
    return train_and_listen(arguments)


def signal_twice_in_a_collective(folder: str) -> None:
    """Rank 0 waits in a barrier for rank 1, which sends it TERM twice and never joins."""
    import signal
    import time
    from pathlib import Path

    pid_file, rank = Path(folder) / "pid", int(os.environ["RANK"])
    from pipeline.parallel.ranks import find_ranks, join
    from pipeline.parallel.signals import SECOND_SIGNAL_SECONDS, StopSignals

    ranks = find_ranks()
    if rank == 0:
        StopSignals()
    join(ranks)
    import torch.distributed as dist

    dist.barrier()
    if rank == 0:
        pid_file.with_name("tmp").write_text(str(os.getpid()))
        os.rename(pid_file.with_name("tmp"), pid_file)
        dist.barrier()
        return
    while not pid_file.exists():
        time.sleep(0.01)
    pid = int(pid_file.read_text())
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    time.sleep(SECOND_SIGNAL_SECONDS + 0.5)
    os.kill(pid, 0)  # still there
    (Path(folder) / "first").touch()
    for _ in range(600):  # again, in case the first one was handled late
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            os._exit(0)  # does not leave a broken group
        time.sleep(0.05)


def train_compiled(arguments: list[str], backend: str) -> tuple[int | str, int, list[str]]:
    """As `train`, with a given backend of torch.compile: (status, graphs, reasons why one was cut).

    A function that is recompiled too often is an error.
    """
    import torch

    from pipeline.training import engine

    engine.COMPILE_BACKEND = backend
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    status = train(arguments)
    counters = torch._dynamo.utils.counters
    return status, counters["stats"]["unique_graphs"], [r.splitlines()[0] for r in counters["graph_break"]]


def train_without_programs(arguments: list[str]) -> int | str:
    """As `train`, with an empty PATH."""
    os.environ["PATH"] = ""
    return train(arguments)


def sllm(arguments: list[str]) -> tuple[int | str, str]:
    """The `sllm` command: its exit status, or the message of a UserError, and its stdout."""
    import contextlib
    import io

    from data_prep.common.errors import UserError
    from pipeline.cli.main import main

    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        try:
            status: int | str = main(arguments)
        except UserError as error:
            status = str(error)
    return status, written.getvalue()


def doctor(arguments: list[str], environments: list[dict[str, str]]) -> tuple[int, str, str]:
    """`sllm doctor` with additional environment for each rank (`CWD`: working folder, `SITE`: a folder of
    packages before the installed ones): status, stdout and stderr."""
    import contextlib
    import io
    import sys

    from pipeline.cli.main import main

    os.environ.update(environments[int(os.environ["RANK"])])
    os.chdir(os.environ.get("CWD", "."))
    sys.path.insert(0, os.environ.get("SITE", ""))
    if "SPOIL" in os.environ:  # a machine whose memory or network corrupts what it sends
        from pipeline.cluster import network as doctor_network

        right = doctor_network.weight
        doctor_network.weight = lambda rank: right(rank) + (str(rank) == os.environ["RANK"])
    if "SLOW" in os.environ:  # a processor at two thirds of its speed, and a disk that is worn out
        import time

        import torch

        from pipeline.cluster import machine as doctor_machine

        multiply, write = torch.mm, doctor_machine._write_all
        _patch(torch, "mm", lambda a, b: (multiply(a[: len(a) // 2], b), multiply(a, b))[1])
        _patch(doctor_machine, "_write_all", lambda *given: (time.sleep(0.1), write(*given)))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(["doctor", *arguments])
    return status, out.getvalue(), err.getvalue()


def count_update(recipe: str, strategy: str) -> tuple[int, int, int]:
    """Kernels of gradients and of an update on one GPU, and the update's waits."""
    from pipeline.costs.counts import update
    from pipeline.costs.sized_recipe import sized_recipe

    gradients, updated = update(sized_recipe(recipe), strategy)
    return gradients.kernels, updated.kernels, updated.waits
