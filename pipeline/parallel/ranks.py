"""From a launcher's environment variables to a process group (gloo on CPUs, NCCL on CUDA).

Launchers are `deepspeed`, `torchrun`, plain `srun`, `mpirun`, or none (one process). torch is imported only
when the group is made, so that a wrong recipe is refused before the slow imports.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from data_prep.common.errors import UserError, first_line, log

if TYPE_CHECKING:
    import torch

LAST_PORT = 65535
SILENT_WAIT, LONGEST_WAIT = 3.0, 600.0  # seconds for which a rank waits for others

# Launchers that set no RANK, and their names for rank, world size and local rank.
_LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world`, `local` on its machine."""

    rank: int
    world: int
    local: int


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this machine that was free just now; `address` "": on all of its addresses."""
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process as one of its ranks."""
    return "RANK" in env or _launcher(env) is not None


def _launcher(env: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The names by which a launcher that sets no RANK gives rank, world size and local rank."""
    for names in _LAUNCHERS:
        # A batch script has the variables too; only the processes of a step are ranks.
        in_batch_script = names[0] == "SLURM_PROCID" and "SLURM_STEP_ID" not in env
        if names[0] in env and names[1] in env and not in_batch_script:
            return names
    return None


def find_ranks(env: MutableMapping[str, str] = os.environ) -> Ranks:
    """Complete RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in `env` and return this process's
    place.

    Variables that a launcher has set are kept. Slurm's variables count only inside a job step
    (SLURM_STEP_ID), not in the batch script. Raises UserError for variables that contradict each other or
    that an earlier launcher has left, and when no machine is known to hold rank 0.
    """
    if "RANK" not in env and (theirs := _launcher(env)):
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (env.get(name, "0") for name in theirs)
        _find_master(env)
    alone = "unset it to run alone, or start all ranks by one launcher"
    if "RANK" in env and "WORLD_SIZE" not in env:
        raise UserError(f"RANK={env['RANK']} is set and WORLD_SIZE is not: {alone}")
    if "RANK" not in env and env.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"WORLD_SIZE={env['WORLD_SIZE']} is set and RANK is not: {alone}")
    has_port = "MASTER_PORT" in env
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    for name, default in {**defaults, "MASTER_ADDR": "127.0.0.1"}.items():
        env.setdefault(name, default)
    if wrong := [name for name in defaults if not env[name].isdecimal()]:
        raise UserError(f"{wrong[0]}={env[wrong[0]]}: it must be a whole number; unset it to run alone")
    rank, world, local, port = (int(env[name]) for name in defaults)
    for name, value in (("RANK", rank), ("LOCAL_RANK", local)):
        if value >= world:
            raise UserError(f"{name}={value} is not below WORLD_SIZE={world}: {alone}")
    if world > 1 and not has_port:
        raise UserError("MASTER_PORT is not set: every rank needs the address and port of rank 0")
    # One process takes any free port.
    if port > LAST_PORT or (world > 1 and port == 0):
        raise UserError(f"MASTER_PORT={port}: a port is from 1 to {LAST_PORT}")
    return Ranks(rank, world, local)


def _find_master(env: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT, the same on every rank, from Slurm's or MPI's variables."""
    job = env.get("SLURM_JOB_ID", "0") + env.get("SLURM_STEP_ID", "")
    env.setdefault("MASTER_PORT", str(20000 + int(job if job.isdigit() else 0) % 12000))
    if "MASTER_ADDR" in env:
        return
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    one_machine = (
        int(env.get("SLURM_STEP_NUM_NODES", "1")) == 1
        if nodes
        else (env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == env["WORLD_SIZE"])
    )
    if one_machine:
        env["MASTER_ADDR"] = "127.0.0.1"
    elif nodes:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if listed.returncode or not listed.stdout.split():
            raise UserError(f"cannot find the first host of {nodes}: export MASTER_ADDR in the job script")
        env["MASTER_ADDR"] = listed.stdout.split()[0]
    else:
        raise UserError(
            "several machines and no MASTER_ADDR: export MASTER_ADDR=<host of rank 0> to every rank"
        )


def join(ranks: Ranks, hang_seconds: float | None = None) -> torch.device:
    """Join the process group of all ranks and return this rank's device. Call `leave` at the end.

    Python's signal handlers run while it waits for other ranks, and after a few seconds it says for whom.
    hang_seconds: a collective waits for longer, so that the watchdog acts first.
    Raises: UserError for a port in use, when not all ranks come, or for a rank without a GPU.
    """
    import deepspeed
    import torch
    from deepspeed.constants import default_pg_timeout

    from pipeline.parallel.deepspeed_compat import set_timeout, skip_shared_memory_op
    from pipeline.parallel.device import claim_gpu, require_own_gpu, uses_gpu

    _silence(deepspeed.utils.logger)
    deepspeed.utils.logger.setLevel(os.environ.get("DS_LOG_LEVEL", "WARNING").upper())
    skip_shared_memory_op()
    timeout = max(default_pg_timeout, timedelta(seconds=2 * (hang_seconds or 0)))
    set_timeout(timeout)
    on_gpu = uses_gpu()
    if on_gpu:
        device = torch.device("cuda", claim_gpu(ranks, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend, store = "nccl" if on_gpu else "gloo", _meet(ranks)
    if on_gpu:
        require_own_gpu(store, ranks, str(torch.cuda.get_device_properties(device).uuid))
    torch.distributed.init_process_group(
        backend,
        store=store,
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=timeout,
        # As DeepSpeed does: it lets NCCL connect at once.
        device_id=device if on_gpu and ranks.world > 1 else None,
    )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


def _meet(ranks: Ranks) -> Any:
    """A store that all ranks share, once all have come. Rank 0 is its server, or torchrun's agent is."""
    from torch.distributed import HashStore, PrefixStore, TCPStore

    if ranks.world == 1:
        return HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    wait = _Waiting(ranks, f"{address}:{port}")
    if not serves:
        wait.until(lambda: _reaches(address, port), lambda: _rank_0(address))
    try:
        server = TCPStore("127.0.0.1" if serves else address, port, None, serves, wait_for_workers=False)
    except RuntimeError as error:
        used = f"port {port} is in use: give another one (MASTER_PORT, or the launcher's --master_port)"
        raise UserError(used if "EADDRINUSE" in str(error) else first_line(error)) from None
    env, names = (
        os.environ,
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID"),
    )
    store = PrefixStore("/".join(env.get(name, "") for name in names), server)  # of this launch
    if store.add(f"here/{ranks.rank}", 1) > 1:
        raise UserError(f"{address}:{port} has a rank {ranks.rank} already: is it the port of another run?")
    if store.add("count", 1) == ranks.world:
        store.set("all", "")

    def missing() -> str:
        absent = [str(rank) for rank in range(ranks.world) if not store.check([f"here/{rank}"])]
        return f"rank {', '.join(absent)}"

    try:
        wait.until(lambda: store.check(["all"]), missing)
    except RuntimeError:
        raise UserError(f"rank 0 at {address}:{port} has ended: see its message") from None
    return PrefixStore("group", store)


def _reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _rank_0(address: str) -> str:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        return f"rank 0 (MASTER_ADDR={address}: {error.strerror})"
    return "rank 0"


class _Waiting:
    """Waits for other ranks in short steps, at most `LONGEST_WAIT` in all, and says for whom."""

    def __init__(self, ranks: Ranks, where: str):
        self._ranks, self._where, self._began, self._said = ranks, where, time.monotonic(), ""

    def until(self, done: Callable[[], bool], whom: Callable[[], str]) -> None:
        pause = 0.02
        while not done():
            pause = min(1.0, 1.2 * pause)
            waited = time.monotonic() - self._began
            if waited > SILENT_WAIT:
                self._say(whom(), waited)
            time.sleep(pause)

    def _say(self, whom: str, waited: float) -> None:
        message = f"rank {self._ranks.rank} of {self._ranks.world} waits for {whom} at {self._where}"
        if waited > LONGEST_WAIT:
            raise UserError(f"{message}, for {waited:.0f} s now: is it started?")
        if message != self._said:
            self._said = message
            log(message)


def _silence(logger: logging.Logger) -> None:
    """Drop warnings that every run prints and that need no action."""
    # Models return a LossSums, in which ZeRO-3 finds no tensors; it need not: the outermost module has no
    # weights of its own. The optimizer is torch's AdamW with a veto.
    unwanted = ("module has unknown inputs or outputs type", "using ZeRO with an untested optimizer")
    logger.addFilter(lambda record: not any(words in record.getMessage() for words in unwanted))
    # DeepSpeed calls collectives by names that torch has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def leave() -> None:
    """Leave the process group, so that this rank's exit does not look like a crash to the others."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
