"""What one rank holds and sends in a step under DeepSpeed's ZeRO, and the time that sending takes.

Bytes sent are those of one rank of a ring of N: of a tensor of n bytes, 2n·(N-1)/N in an all-reduce,
n·(N-1)/N in a reduce-scatter or all-gather. What DeepSpeed 0.19 calls, in steady state (the first step of
stage 3 gathers more):

stage 0, 1  one all-reduce of the gradients per step
stage 2     one all-reduce of the gradients per micro-batch
stage 1, 2  one all-gather of the updated weights per step
stage 3     one reduce-scatter of the gradients per micro-batch; gathers as `gathered_weights` counts them

Latencies, the trainer's own sums (a few hundred bytes) and padding to equal shares are left out.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from data_prep.common.errors import UserError
from pipeline.config.deepspeed_config import read_strategy, zero_stage

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a number
Calls = list[tuple[nn.Module, bool]]  # a module is entered (True) or left


@dataclass(frozen=True)
class Strategy:
    """What costs depend on in a file of `ds_configs/`. Counts of elements; the defaults are DeepSpeed's.

    bucket: of a communication buffer. live: that stage 3 may gather ahead in all, prefetch: at once. reuse: a
    weight is kept if it is used again before so many others. persistent: of the largest weight never split.
    """

    name: str
    stage: int
    offload: bool = False
    bucket: float = 500_000_000
    live: float = 1_000_000_000
    reuse: float = 1_000_000_000
    prefetch: float = 50_000_000
    persistent: float = 100_000
    overlap: bool = False
    scatter: bool = True
    width: int | None = None  # bytes of a gradient's element on the way; None: those of a weight

    @classmethod
    def read(cls, name: str) -> Strategy:
        """Read the DeepSpeed config of that name or path (`zero2+fp16`: two of them).

        Raises: UserError for ZeRO++, whose traffic depends on places in the cluster.
        """
        config = read_strategy(*name.split("+"))
        zero: dict[str, Any] = config.get("zero_optimization", {})
        if zero.get("zero_hpz_partition_size", 1) > 1 or any(
            zero.get(f"zero_quantized_{what}") for what in ("weights", "gradients", "nontrainable_weights")
        ):
            raise UserError(f"--strategy {name}: ZeRO++ has no estimate: choose zero3 for an upper limit")
        stage = zero_stage(config)
        keys = {"bucket": "reduce_bucket_size", "live": "stage3_max_live_parameters"}
        keys |= {"reuse": "stage3_max_reuse_distance", "prefetch": "stage3_prefetch_bucket_size"}
        keys |= {"persistent": "stage3_param_persistence_threshold", "scatter": "reduce_scatter"}
        given = {field: zero[key] for field, key in keys.items() if key in zero}
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        overlap = zero.get("overlap_comm")
        overlap = (stage == 3 if overlap is None else overlap) and stage >= 2
        width = WIDTHS.get(config.get("communication_data_type", ""))
        return cls(name, stage, offload, overlap=overlap, width=width, **given)


# Weights that stage 3 gathers -----------------------------------------------------------------------------


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[Calls]:
    """Inside the `with` block: every call of a submodule in a forward pass, in order."""
    calls: Calls = []
    hooks = [m.register_forward_pre_hook(lambda m, _: calls.append((m, True))) for m in model.modules()]
    hooks += [m.register_forward_hook(lambda m, *_: calls.append((m, False))) for m in model.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def with_backward(forward: Calls, again: Calls, recomputed: Sequence[nn.Module]) -> Calls:
    """The calls of a forward pass and of the backward pass after it.

    again: those that the backward pass makes to recompute the layers `recomputed`. torch stops each of them
    early, inside of the last module that is needed.
    """
    backward, left = [], deque(again)
    for module, entered in reversed(forward):
        if not entered and module in recomputed:
            inside = set(module.modules())
            while left and left[0][0] in inside:
                backward.append(left.popleft())
        backward.append((module, not entered))
    return forward + backward


class Weights(NamedTuple):
    """Elements of a model: all; those that are trained; those that stage 3 gathers once a step (`persistent`)
    and in each micro-batch (`gathered`, every time counts); the most it holds gathered (`live`)."""

    all: int
    trained: int
    persistent: int = 0
    gathered: int = 0
    live: int = 0


def gathered_weights(model: nn.Module, calls: Calls, strategy: Strategy, accumulation: int) -> Weights:
    """Count what stage 3 gathers in one micro-batch of a model with these calls (`with_backward`).

    Follows DeepSpeed's `PartitionedParameterCoordinator`: a module's weights are gathered when it is entered,
    with the next ones of the known order, and freed when it is left, unless a use of them is near. It decides
    that once, in the second micro-batch. Persistent weights are there by then if a step has ended.
    """
    weights = {id(p): p.numel() for p in model.parameters()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if strategy.stage != 3:
        return Weights(sum(weights.values()), trained)
    split = {key for key, count in weights.items() if count > strategy.persistent}
    own = {module: [id(p) for p in module.parameters(recurse=False)] for module, _ in calls}
    order = [own[module] for module, entered in calls if entered]
    ahead = deque((key, step) for step, keys in enumerate(order) for key in keys)
    seen: dict[int, int] = defaultdict(lambda: -1)  # step of the last use that was looked at
    held = set() if accumulation > 1 else set(weights) - split
    gathered = live = most = 0
    step = -1

    def gather(keys: Sequence[int]) -> int:
        nonlocal gathered, live, most
        new = set(keys) - held
        count = sum(weights[key] for key in new)
        held.update(new)
        gathered += sum(weights[key] for key in new & split)
        live += count
        most = max(most, live)
        return count

    for module, entered in calls:
        if entered:
            step += 1
            gather(own[module])
            for _ in range(min(len(ahead), sum(seen[key] < step for key in own[module]))):
                key, use = ahead.popleft()
                seen[key] = use
            room = min(strategy.live - live, strategy.prefetch)
            while ahead and room > 0:
                key, use = ahead.popleft()
                seen[key] = max(seen[key], use)
                room -= gather([key])
            continue
        free = {key for key in own[module] if key in held & split and seen[key] <= step + 1}
        traversed = 0
        for keys in itertools.islice(order, step + 1, None):
            if not free or traversed >= strategy.reuse:
                break
            free -= set(keys)
            traversed += sum(weights[key] for key in keys)
        held -= free
        live -= sum(weights[key] for key in free)
    kept = sum(count for key, count in weights.items() if key not in split)
    return Weights(sum(weights.values()), trained, kept, gathered, most)


# Memory of a rank ------------------------------------------------------------------------------------------


def states_memory(
    weights: Weights, strategy: Strategy, world: int, dtype: str, ema: bool = False
) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW on one rank.

    Per parameter: weights 4 (bf16 2), optimizer 8 for the two moments, 4 for a running average (`ema`), and 4
    for fp32 master weights, which ZeRO keeps in fp32 too. Gradients 4; bf16: 2 as torch makes them, and from
    stage 1 on 4 for their sum in fp32. Stage 1 divides the optimizer by `world`, 2 also the summed gradients,
    3 also the weights. Frozen weights have neither gradients nor optimizer.

    gathered: the most that stage 3 holds gathered. buckets: communication buffers of fixed size. update:
    temporary memory of the update, after the activations are freed (copies of the gradients: stages 1 and 2
    make two; on GPUs PyTorch's AdamW takes 4 more per parameter). host: host memory under offloading. copy:
    host memory of a save's copy on rank 0, which has the weights too unless they are divided.
    """
    low, trained, average = WIDTHS[dtype], weights.trained, 4 if ema else 0
    share = -(-trained // world)
    bucket = int(strategy.bucket) * low
    held = {
        "weights": low * weights.all,
        "gathered": 0,
        "gradients": low * trained,
        "optimizer": (12 + average) * share,
    }
    held |= {"buckets": 0, "update": 8 * share, "host": 0}
    if strategy.stage == 0:
        master = 4 if low == 2 else 0
        held |= {"optimizer": (8 + average + master) * trained, "update": (4 + master) * trained}
    elif strategy.stage == 1 and low == 2:
        held |= {"gradients": 6 * trained, "update": 4 * share}
    elif strategy.stage == 2:
        held |= {"gradients": 4 * share, "buckets": 2 * bucket}
    elif strategy.stage == 3:
        # One rank reads its own part in place.
        gathered = low * (weights.live + weights.persistent) if world > 1 else 0
        held |= {"weights": low * -(-weights.all // world), "gathered": gathered, "update": 4 * share}
        held |= {"gradients": 4 * share, "buckets": bucket}
    held["copy"] = held["optimizer"] + (held["weights"] if strategy.stage < 3 else 0)
    if strategy.offload:
        moved = ["gradients", "optimizer", *(["weights"] if strategy.stage == 3 else [])]
        held["host"] = sum(held[what] for what in moved)
        held |= dict.fromkeys([*moved, "update"], 0)
    return held


def peak_memory(
    states: dict[str, int], alive: Callable[[float], int], gradients: int, accumulation: int
) -> int:
    """Bytes that a rank's accelerator holds at the peak: the update runs after the activations are freed.

    Args:
        alive: the peak of the activations and a share of the gradients (`DryStep.alive`), which come while
            activations go. With accumulation all gradients of the micro-batch before are there.
        gradients: bytes of the weights' gradients as torch makes them.
    """
    held = sum(states.values()) - sum(states[name] for name in ("host", "copy", "update", "gradients"))
    ours = states["gradients"]
    passes = ours + alive(0) if accumulation > 1 else alive(ours / max(1, gradients))
    return held + max(ours + states["update"], passes)


# Bytes and seconds of a step ------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Bytes that a rank sends in one step: of gradients, and of weights."""

    gradients: float
    weights: float

    @property
    def sent(self) -> float:
        return self.gradients + self.weights


def traffic(strategy: Strategy, weights: Weights, world: int, accumulation: int, dtype: str) -> Traffic:
    """What a rank of `world` sends in a step of `accumulation` micro-batches with weights of a dtype."""
    share, width = (world - 1) / world, WIDTHS[dtype]
    passes = accumulation if strategy.stage >= 2 else 1
    times = 1 if strategy.stage == 3 and strategy.scatter else 2
    gradients = share * times * passes * (strategy.width or width) * weights.trained
    if strategy.stage == 3:
        return Traffic(gradients, share * width * (weights.persistent + accumulation * weights.gathered))
    return Traffic(gradients, share * width * weights.trained if strategy.stage else 0)


def exposed_seconds(
    sent: Traffic, strategy: Strategy, weights: Weights, compute: float, gigabits: float
) -> float:
    """Seconds of a step in which a rank only waits for the network.

    With `overlap_comm`, gradients travel during the backward pass (two thirds of `compute`), but for the last
    bucket, and stage 3 gathers during the forward pass, but for the first weights. All else waits.

    Args:
        compute: seconds of the step without a network. gigabits: per second, of the ring's slowest link.
    """
    rate = gigabits * 1e9 / 8
    gradients, gathers = sent.gradients / rate, sent.weights / rate
    if not strategy.overlap:
        return gradients + gathers
    bucket = weights.trained - (-(-weights.trained // strategy.bucket) - 1) * strategy.bucket
    last = gradients * bucket / weights.trained
    exposed = last + max(0.0, gradients - last - 2 / 3 * compute)
    if strategy.stage == 3:
        first = gathers * min(1.0, strategy.prefetch / max(1, weights.persistent + weights.gathered))
        return exposed + first + max(0.0, gathers - first - compute / 3)
    return exposed + gathers
