"""Predictions of `sllm inspect` beside real training steps on CPUs.

`traffic-and-time` runs each rank in a network namespace, whose link `tc` limits. It needs root. gloo runs an
all-reduce for a reduce-scatter, which sends twice as much: `wire_bytes` counts it so. A step's time is
predicted from that without a limit: its collectives take as long as there, or as long as the link needs for
their bytes and Ethernet's headers, if that is more.

`memory` compares the highest resident memory of a step with the prediction, above what the process had before
the model was made and after a step of a tiny one, which loads the code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.common.command_line import Many, Positive
from data_prep.common.environment import header, write_result
from data_prep.common.errors import UserError, log
from pipeline.costs.benchmark import PACKAGES
from pipeline.costs.inspect import DryRun
from pipeline.costs.sized_recipe import sized_recipe
from pipeline.costs.zero import Strategy, gathered_weights, peak_memory, states_memory, traffic
from pipeline.parallel.ranks import free_port
from tools.benchmarks.measured_steps import Job
from tools.benchmarks.strategies import run_ranks
from tools.commands import Output, console

# Ethernet, IP and TCP (with its timestamps) add 66 bytes to 1448, and tc counts them.
HEADERS = 1514 / 1448
# Measured alone on a link: 1.50 to 1.66; three ranks: 1.09, or 1.04 without headers. Probably requests for
# data wait on the connection that sends it, so that between two ranks three halves follow each other.
TWO_RANKS_GATHER = 1.5
WARM_UP = 2  # steps of a start that are not counted: stage 3 learns the order of use in them
# Freed memory leaves the process at once.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# DeepSpeed allocates its buffers whole. Only what is touched is resident on a CPU: here all of it.
SMALL_BUCKETS = {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}


@contextmanager
def namespaces(count: int, limit: str | None) -> Iterator[list[list[str]]]:
    """The start of a command in each of `count` network namespaces, joined by a bridge in one more.

    limit: of what each may send, as tc writes rates (`100mbit`). Raises: UserError where the kernel refuses.
    """
    names = [f"foretold{os.getpid()}n{number}" for number in range(count)]
    hub = f"foretold{os.getpid()}hub"
    made = []
    try:
        for name in (hub, *names):
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            peer = f"to{number}"
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", peer, "netns", hub)
            _ip("-n", hub, "link", "set", peer, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", name, "link", "set", device, "up")
            if limit:
                shape = ["root", "tbf", "rate", limit, "burst", "256kb", "latency", "100ms"]
                _call(["tc", "-n", name, "qdisc", "replace", "dev", "eth0", *shape])
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*words: str) -> None:
    _call(["ip", *words])


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()} (network namespaces need root and tc)")


def run_job(job: Job, world: int, prefixes: list[list[str]] | None = None) -> list[list[dict[str, Any]]]:
    """The steps of each rank (`measured_steps.measure`). prefixes: the start of each rank's command."""
    with tempfile.TemporaryDirectory(prefix="foretold-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
        program = [sys.executable, "-m", "tools.benchmarks.measured_steps", str(folder / "job.json")]
        outs = [folder / f"steps-{rank}.json" for rank in range(world)]
        commands = [[*(prefixes[n] if prefixes else []), *program, str(out)] for n, out in enumerate(outs)]
        environment = os.environ | ALLOCATOR | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        if prefixes:
            environment |= {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
        run_ranks(job.strategy[0], commands, folder, environment)
        return [json.loads(out.read_text()) for out in outs]


def traffic_and_time(
    *,
    recipe: str,
    strategies: Many = ("zero0", "zero1", "zero2", "zero3"),
    ranks: Positive = 2,
    accumulation: Positive = 2,
    tokens: Positive = 512,
    vocab_size: Positive | None = None,
    limits: Many = ("100mbit", "1gbit"),
    steps: Positive = 5,
    output: Output = None,
) -> dict[str, Any]:
    """Bytes and seconds of a step between network namespaces, measured and predicted.

    Args:
        recipe: recipe file, or the name of one in the package
        strategies: files of ds_configs/
        ranks: network namespaces with one rank each
        accumulation: micro-batches of a step
        tokens: tokens of a micro-batch
        vocab_size: vocabulary (default: what the recipe says)
        limits: what each rank may send per second, as tc writes it
        steps: of which the fastest counts; the first two are not among them
    """
    rows, weights = [], None
    for strategy in strategies:
        job = Job(recipe, [strategy], accumulation, tokens=tokens, vocab_size=vocab_size)
        job.steps = WARM_UP + steps
        dry = DryRun(sized_recipe(recipe), vocab_size, job.dtype)
        model, _, step = dry.step(tokens, False)
        plan = Strategy.read(strategy)
        weights = gathered_weights(model, step.calls, plan, accumulation)
        sent = traffic(plan, weights, ranks, accumulation, job.dtype)
        wire = sent.weights + sent.gradients * (2 if plan.stage == 3 else 1)
        gathers = sent.weights * (TWO_RANKS_GATHER if ranks == 2 else 1)
        on_link = (wire - sent.weights + gathers) * HEADERS
        alone = collectives = math.nan
        for limit in (None, *limits):
            with namespaces(ranks, limit) as prefixes:
                taken = run_job(job, ranks, prefixes)[0][WARM_UP:]
            # Other programs only lengthen a step.
            fastest = min(taken, key=lambda one: one["seconds"])
            seconds, waits = fastest["seconds"], fastest["collectives"]
            if not limit:
                alone, collectives = seconds, waits
            row: dict[str, Any] = {
                "strategy": strategy,
                "limit": limit,
                "ring_bytes": {"predicted": round(sent.sent), "counted": sum(taken[-1]["sent"].values())},
                "wire_bytes": {"predicted": round(wire), "counted": taken[-1]["wire"]},
                "seconds": {"measured": seconds, "collectives": waits},
            }
            if limit:
                slower = max(0.0, on_link * 8 / _bits(limit) - collectives)
                row["seconds"]["predicted"] = alone + slower
            log(json.dumps(row))
            rows.append(row)
    result = {**header(PACKAGES), "recipe": Path(recipe).stem, "ranks": ranks, "accumulation": accumulation}
    result |= {"tokens": tokens, "weights": weights.all, "dtype": "fp32", "rows": rows}
    write_result(result, output)
    return result


def _bits(limit: str) -> float:
    """Bits per second of tc's `100mbit`."""
    number = limit.rstrip("kmgbit")
    return float(number) * {"k": 1e3, "m": 1e6, "g": 1e9}[limit[len(number)]]


def memory(
    *,
    recipes: Many = ("small-vae", "small-sllm", "small-lm", "svae-768-h1", "sllm-125m-h1", "lm-125m"),
    strategies: Many = ("zero0", "zero1", "zero2", "zero3"),
    ranks: Positive = 1,
    tokens: Positive = 2048,
    vocab_size: Positive | None = None,
    checkpointing: bool = False,
    output: Output = None,
) -> dict[str, Any]:
    """Peak memory of a training step in a process of its own, measured and predicted; fp32.

    Args:
        recipes: recipe files, or names in the package; the strategies take turns
        strategies: files of ds_configs/
        ranks: processes that share the model's states
        tokens: tokens of a micro-batch
        vocab_size: vocabulary (default: what each recipe says)
        checkpointing: recompute activations
    """
    rows = []
    for number, recipe in enumerate(recipes):
        name = strategies[number % len(strategies)]
        job = Job(recipe, [name], 1, "fp32", tokens, 2, vocab_size, checkpointing)
        job.zero = SMALL_BUCKETS
        sized = sized_recipe(recipe)
        model, _, step = DryRun(sized, vocab_size, "fp32").step(tokens, checkpointing)
        plan = dataclasses.replace(
            Strategy.read(name), bucket=SMALL_BUCKETS["reduce_bucket_size"], prefetch=1_000_000
        )
        weights = gathered_weights(model, step.calls, plan, 1)
        states = states_memory(weights, plan, ranks, "fp32", sized.training.ema is not None)
        predicted = peak_memory(states, step.alive, step.gradients, 1)
        measured = max(steps[-1]["peak"] for steps in run_job(job, ranks))
        row = {"recipe": recipe, "strategy": name, "ranks": ranks, **states, "activations": step.activations}
        row |= {"predicted": predicted, "measured": measured, "ratio": predicted / measured}
        log(json.dumps(row))
        rows.append(row)
    result = {**header(PACKAGES), "tokens": tokens, "checkpointing": checkpointing, "rows": rows}
    write_result(result, output)
    return result


if __name__ == "__main__":
    raise SystemExit(
        console(
            "benchmarks.foretold",
            traffic_and_time,
            memory,
            example="python -m tools.benchmarks.foretold memory",
        )
    )
