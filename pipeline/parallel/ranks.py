"""From a launcher's environment to a working process group, and from signals to one agreed stop.

In: the variables of `deepspeed`, `torchrun`, plain `srun` or `mpirun` (or none: one process). Out: `Ranks`, a
torch process group (gloo on CPUs, NCCL on CUDA) and a `StopSignals` flag. Called by `train.py`; torch is
imported only when the group is made, so a wrong recipe is refused, and signals are caught, before the slow
imports.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.common.errors import UserError

if TYPE_CHECKING:
    import torch


# Launchers that set no RANK, and what they call rank, world size and local rank.
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
    """A port of this machine that was free a moment ago; `address` "": on all of its addresses."""
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def find_ranks(env: MutableMapping[str, str] = os.environ) -> Ranks:
    """Complete RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in `env` and return this process's
    place.

    What a launcher has set stays. Slurm's variables count only inside a job step (SLURM_STEP_ID), not in the
    batch script itself. Raises UserError when several machines take part and nobody says where rank 0 is.
    """
    if "RANK" not in env:
        for rank, world, local in _LAUNCHERS:
            in_batch_script = rank == "SLURM_PROCID" and "SLURM_STEP_ID" not in env
            if rank in env and world in env and not in_batch_script:
                env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env[rank], env[world], env.get(local, "0")
                _find_master(env)
                break
    for name, alone in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        env.setdefault(name, alone)
    if "MASTER_PORT" not in env:
        if env["WORLD_SIZE"] != "1":
            raise UserError("MASTER_PORT is not set: every rank needs the address and port of rank 0")
        env["MASTER_PORT"] = "0"  # one process: any free port
    return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))


def _find_master(env: MutableMapping[str, str]) -> None:
    """MASTER_ADDR and MASTER_PORT, the same on every rank, from what Slurm or MPI tells each of them."""
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


def join(ranks: Ranks) -> torch.device:
    """Join the process group of all ranks and return this rank's device. Call `leave` at the end."""
    import deepspeed
    import torch

    _silence(deepspeed.utils.logger)
    deepspeed.utils.logger.setLevel(os.environ.get("DS_LOG_LEVEL", "WARNING").upper())
    # DeepSpeed would compile a shared-memory op for gloo first, for about a minute, and needs a compiler for
    # it.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if on_gpu:
        # With one visible GPU per task (`--gpus-per-task`) the local rank is not an index.
        device = torch.device("cuda", ranks.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return device


def _silence(logger: logging.Logger) -> None:
    """Drop lines that call for nothing and come with every run."""
    # Models return a LossSums; ZeRO-3 does not look for tensors in it and need not: no weight belongs to the
    # outermost module.
    # The optimizer is torch's AdamW with a veto.
    unwanted = ("module has unknown inputs or outputs type", "using ZeRO with an untested optimizer")
    logger.addFilter(lambda record: not any(words in record.getMessage() for words in unwanted))
    # DeepSpeed calls collectives by names that torch has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def leave() -> None:
    """Leave the process group, so that no rank's exit looks like a crash to the others."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
