"""What `sllm doctor` measures of ranks: how fast each computes; all-reduce and every pair of machines, by the
real backend."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from data_prep.common.errors import first_line
from pipeline.parallel.device import claim_gpu, uses_gpu
from pipeline.parallel.ranks import Ranks

if TYPE_CHECKING:
    import torch

REPEATS = 3
BYTES = {"gloo": 8 << 20, "nccl": 256 << 20}  # of one tensor
COMPUTE_SECONDS = 0.5  # of products of matrices


def measure(ranks: Ranks, hosts: list[str], leaders: list[int], port: int, timeout: float) -> dict[str, Any]:
    """Every rank calls this. Errors of the backend become lines in `problems`.

    Args:
        leaders: the first rank of every machine.
        port: a free one on rank 0.
        timeout: seconds for each operation.
    Returns: {"backend", "gflops", "gbps" of the all-reduce (bus bandwidth), "pairs": {peer: gbps},
        "problems"}.
    """
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a time-out is an exception, not an abort
    import torch
    import torch.distributed as dist

    on_gpu = uses_gpu()
    backend, device = ("nccl", torch.device("cuda")) if on_gpu else ("gloo", torch.device("cpu"))
    facts: dict[str, Any] = {"backend": backend, "gflops": None, "gbps": None, "pairs": {}, "problems": []}
    doing = "joining the process group"
    try:
        if on_gpu:
            torch.cuda.set_device(claim_gpu(ranks, torch.cuda.device_count()))
        dist.init_process_group(
            backend,
            init_method=f"tcp://{os.environ['MASTER_ADDR']}:{port}",
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=timeout),
        )
        doing = "computing"
        facts["gflops"] = compute_speed(device)
        doing = "all-reduce"
        base = torch.arange(BYTES[backend] // 4, device=device).remainder_(251).float()
        facts["gbps"] = _all_reduce(base, ranks, facts["problems"])
        for peer in schedule(leaders, ranks.rank):
            doing = f"exchange with {hosts[peer]}"
            facts["pairs"][str(peer)], wrong = _exchange(base, ranks.rank, peer)
            if wrong:
                facts["problems"].append(f"receives wrong data from {hosts[peer]}: {wrong} values")
    except Exception as error:  # torch raises many kinds
        facts["problems"].append(f"{doing} fails: {first_line(error)[:300]}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return facts


def compute_speed(device: torch.device) -> float:
    """10⁹ floating-point operations a second of products of matrices; the fastest, because the moments in
    which something else ran say nothing about the processor. On CPUs these do not count at all."""
    import torch

    from pipeline.parallel.waiting import clock

    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    one = torch.ones(size, size, dtype=kind, device=device)
    now = clock if device.type == "cpu" else lambda: _now(one)
    fastest, end = float("inf"), now() + COMPUTE_SECONDS
    while (began := now()) < end:
        torch.mm(one, one)
        fastest = min(fastest, now() - began)
    return 2 * size**3 / 1e9 / fastest


def weight(rank: int) -> int:
    """The factor of a rank's data: small, so that fp32 sums are exact on thousands of ranks."""
    return rank % 7 + 1


def schedule(leaders: list[int], rank: int) -> Iterator[int]:
    """The peer of `rank` in each round of a round-robin tournament of `leaders`: every pair meets once, and
    the pairs of a round are disjoint. Empty for a rank that is no leader."""
    seats: list[int | None] = list(leaders)
    if len(seats) % 2:
        seats.append(None)
    for _ in range(len(seats) - 1):
        for one, other in zip(seats[: len(seats) // 2], reversed(seats), strict=False):
            if rank in (one, other) and None not in (one, other):
                yield other if rank == one else one  # type: ignore[misc]
        seats[1:] = [seats[-1], *seats[1:-1]]


def _all_reduce(base: torch.Tensor, ranks: Ranks, problems: list[str]) -> float:
    import torch.distributed as dist

    expected = base * sum(weight(rank) for rank in range(ranks.world))
    own, fastest = base, float("inf")
    for _ in range(REPEATS):
        own = base * weight(ranks.rank)
        dist.barrier()
        began = _now(base)
        dist.all_reduce(own)
        fastest = min(fastest, _now(base) - began)
    if wrong := int((own != expected).sum()):
        problems.append(f"all-reduce gives wrong sums: {wrong} of {own.numel()} values")
    return _gbps(2 * (ranks.world - 1) / ranks.world * base.nbytes, fastest)


def _exchange(base: torch.Tensor, rank: int, peer: int) -> tuple[float, int]:
    """Both send and receive at once: Gbit/s of one direction, and how many values arrive wrong."""
    import torch
    import torch.distributed as dist

    own, theirs, fastest = base * weight(rank), torch.empty_like(base), float("inf")
    for _ in range(REPEATS):
        theirs.zero_()
        began = _now(base)
        transfers = [dist.P2POp(dist.isend, own, peer), dist.P2POp(dist.irecv, theirs, peer)]
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
        fastest = min(fastest, _now(base) - began)
    return _gbps(base.nbytes, fastest), int((theirs != base * weight(peer)).sum())


def _now(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _gbps(count: float, seconds: float) -> float:
    return count * 8 / 1e9 / seconds
