"""Benchmarks of the path from shards to batches.

loader    packed batches per second from real shards, on the trainer's one loader thread: planning, reading,
          checking and packing. Every run opens the shards again, so the figures include all checksums.
planning  the first bins of one rank of a large run, planned from an index of any size, at the start and late
          in an epoch, each in a new process: seconds and peak memory (with Python and torch). Only index
          files that are opened exist: each is made on demand, outside the measured time, then read normally.
          Reading the bins' content is not included.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, log, run_main
from data_prep.common.processes import run_command
from data_prep.shards.layout import INDEX_DTYPE, npy_bytes, read_index
from data_prep.shards.reader import ShardSet
from pipeline.data.loader import StepLoader, assign
from pipeline.data.plan import PART_WINDOWS, BinPlan, Place, Position, count
from pipeline.parallel.ranks import Ranks
from tools.benchmarks.arguments import answer, positive
from tools.benchmarks.sharding import PACKAGES

WINDOWS = (1024, 128)
BIN_TOKENS = 8192
TOKENS_PER_SENTENCE = 10.9
LATE = 0.9  # of an epoch
STEPS = 5  # planned after the first one, to measure the rate


def loader(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the loader."""
    require_folder(arguments.output)
    byte_lengths = ShardSet.open(arguments.shards).tokenizer().byte_lengths
    runs: dict[int, list[dict[str, float]]] = {window: [] for window in WINDOWS}
    for _ in range(arguments.runs):
        for window in WINDOWS:  # alternating, so that a slow moment of the machine affects both
            runs[window].append(_load(arguments.shards, window, arguments.bins, byte_lengths))
            log(f"window {window}: {runs[window][-1]['tokens_per_second']:,.0f} tokens/s")
    rates = {
        str(window): {
            rate: {"median": statistics.median(run[rate] for run in of), "values": [run[rate] for run in of]}
            for rate in ("tokens_per_second", "tokens_per_cpu_second")
        }
        | {"first_seconds": [run["first_seconds"] for run in of]}
        for window, of in runs.items()
    }
    result = {
        "benchmark": "loader",
        **header(PACKAGES),
        "shards": arguments.shards,
        "bins": arguments.bins,
        "bin_tokens": BIN_TOKENS,
        "windows": rates,
    }
    write_result(result, arguments.output)
    return result


def _load(folder: str, window: int, bins: int, byte_lengths: np.ndarray) -> dict[str, float]:
    """One run: the time to the first batch, which waits for a plan, and the rate of the following ones."""
    plan = BinPlan([ShardSet.open(folder)], window, BIN_TOKENS, seed=1)
    start = time.perf_counter()
    with StepLoader(plan, "sllm", 1, Ranks(0, 1, 0), byte_lengths, plan.start()) as steps:
        steps.next_step()
        first, cpu_first = time.perf_counter(), time.process_time()
        tokens = sum(steps.next_step().tokens_all for _ in range(bins))
        seconds, cpu_seconds = time.perf_counter() - first, time.process_time() - cpu_first
    return {
        "first_seconds": first - start,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
    }


def planning(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure planning; with `at`, only that measurement, in this process."""
    require_folder(arguments.output)
    if arguments.documents < arguments.shards:
        raise UserError(f"{arguments.documents} documents cannot fill {arguments.shards} shards")
    if arguments.at:
        return _plan(arguments, arguments.at, arguments.window_tokens)
    measured: dict[str, Any] = {}
    for window, at in itertools.product(WINDOWS, ("start", "late")):
        command = [sys.executable, "-m", "tools.benchmarks.loader", "planning", "--json"]
        for name in ("documents", "shards", "ranks"):
            command += [f"--{name}", str(getattr(arguments, name))]
        command += ["--at", at, "--window-tokens", str(window)]
        measured.setdefault(str(window), {})[at] = json.loads(run_command(command, f"planning at {at}"))
        log(f"window {window}, {at}: {measured[str(window)][at]}")
    result = {
        "benchmark": "planning",
        **header(PACKAGES),
        **{name: getattr(arguments, name) for name in ("documents", "shards", "ranks")},
        "bin_tokens": BIN_TOKENS,
        "windows": measured,
    }
    write_result(result, arguments.output)
    return result


def _plan(arguments: argparse.Namespace, at: str, window: int) -> dict[str, Any]:
    """The first step of the last rank, then some more steps, a bin for every rank in each."""
    with tempfile.TemporaryDirectory() as folder:
        shard_set = SyntheticShardSet(Path(folder), arguments.documents, arguments.shards)
        start, cpu_start = time.perf_counter(), time.process_time()
        plan = BinPlan([cast(ShardSet, shard_set)], window, BIN_TOKENS, seed=1)
        position = plan.start()
        if at == "late":
            groups = -(-arguments.shards // plan.shards_at_once)
            part = int(LATE * arguments.documents / arguments.shards * plan.shards_at_once) // PART_WINDOWS
            position = Position((0,), (Place(0, int(LATE * groups), part, 100),))
        stream = plan.bins(position)
        bins = list(itertools.islice(stream, arguments.ranks))
        (mine,) = assign(bins, Ranks(arguments.ranks - 1, arguments.ranks, 0))
        count(bins, "sllm")
        seconds = time.perf_counter() - start - shard_set.making_seconds
        cpu_seconds = time.process_time() - cpu_start - shard_set.making_cpu_seconds
        opened = shard_set.opened
        making, before, tokens = shard_set.making_cpu_seconds, time.process_time(), 0
        for _ in range(STEPS):
            bins = list(itertools.islice(stream, arguments.ranks))
            tokens += count(bins, "sllm")[0]
            position = position.after(bins)
        rate = tokens / (time.process_time() - before - (shard_set.making_cpu_seconds - making))
    return {
        "first_batch_seconds": seconds,
        "first_batch_cpu_seconds": cpu_seconds,
        "first_batch_tokens": mine.tokens,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "indexes_read": opened,
        "planned_tokens_per_cpu_second": rate,
    }


@dataclass(frozen=True)
class SyntheticShard:
    """The part of `Shard` that planning reads; the sentences of a document have equal lengths."""

    index: np.ndarray

    def sentence_lengths_of(self, documents: np.ndarray) -> np.ndarray:
        tokens, sentences = (self.index[name][documents].astype(np.int64) for name in ("tokens", "sentences"))
        first = np.cumsum(sentences) - sentences
        within = np.arange(sentences.sum()) - np.repeat(first, sentences)
        longer = within < np.repeat(tokens % sentences, sentences)
        return (np.repeat(tokens // sentences, sentences) + longer).astype(np.uint16)


class SyntheticShardSet:
    """The part of `ShardSet` that planning reads; a shard's index is made when it is opened.

    Document lengths are log-normal with a mean of about 490 tokens (documents of 2 kB).
    """

    def __init__(self, folder: Path, documents: int, shards: int):
        self.folder, self._documents = folder, documents // shards
        self.tokens_per_shard = 493 * self._documents
        self.manifest = {"shards": [{"tokens": self.tokens_per_shard}] * shards}
        self.making_seconds = self.making_cpu_seconds = 0.0
        self.opened = 0

    def shard(self, i: int) -> SyntheticShard:
        path = self.folder / f"shard-{i:06d}.index.npy"
        before, cpu_before = time.perf_counter(), time.process_time()
        rng = np.random.default_rng([7, i])
        index = np.zeros(self._documents, INDEX_DTYPE)
        index["tokens"] = np.clip(rng.lognormal(5.7, 1.0, self._documents), 1, 1 << 18)
        index["sentences"] = np.maximum(1, index["tokens"] // TOKENS_PER_SENTENCE)
        data = npy_bytes(index)
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        del index, data
        self.making_seconds += time.perf_counter() - before
        self.making_cpu_seconds += time.process_time() - cpu_before
        self.opened += 1
        shard = SyntheticShard(read_index(path, sha256))
        path.unlink()
        return shard


def format_loader(result: dict[str, Any]) -> str:
    """The result of `loader` as text."""
    return "\n".join(
        f"window {window:>5}: {of['tokens_per_second']['median'] / 1e6:6.2f} M tokens/s "
        f"({of['tokens_per_cpu_second']['median'] / 1e6:.2f} per CPU-second) in bins of "
        f"{result['bin_tokens']:,}; the first after {statistics.median(of['first_seconds']):.2f} s"
        for window, of in result["windows"].items()
    )


def format_planning(result: dict[str, Any]) -> str:
    """The result of `planning` as text."""
    if "windows" not in result:
        return json.dumps(result)
    lines = [
        f"{result['documents']:,} documents in {result['shards']:,} shards, {result['ranks']:,} ranks: "
        "the first batch of a rank"
    ]
    lines += [
        f"  window {window:>5}, {at:<5}: {one['first_batch_seconds']:6.2f} s "
        f"({one['first_batch_cpu_seconds']:.2f} CPU-s), "
        f"{one['peak_memory_bytes'] / 1e9:.2f} GB, {one['indexes_read']} indexes read; then "
        f"{one['planned_tokens_per_cpu_second'] / 1e6:,.0f} M tokens per CPU-second"
        for window, measured in result["windows"].items()
        for at, one in measured.items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmarks.loader", description="Speed of the loader, and of planning."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    summary = "Real tokens per second of packed batches, as the trainer's loader makes them on one thread."
    add = (one := kinds.add_parser("loader", help=summary, description=summary)).add_argument
    one.set_defaults(run=loader, text=format_loader)
    add("--shards", required=True, metavar="DIR", help="shard folder")
    add("--bins", type=positive, default=500, metavar="N", help="bins of a run (default 500)")
    add("--runs", type=positive, default=5, metavar="N", help="runs of each (default 5)")

    summary = "Seconds and memory to plan the first batch of a rank from an index of any size (simulated)."
    add = (one := kinds.add_parser("planning", help=summary, description=summary)).add_argument
    one.set_defaults(run=planning, text=format_planning)
    add("--documents", type=positive, default=500_000_000, metavar="N")
    add("--shards", type=positive, default=10_000, metavar="N")
    add("--ranks", type=positive, default=4096, metavar="N")
    add("--at", choices=["start", "late"], help=argparse.SUPPRESS)
    add("--window-tokens", type=positive, default=1024, help=argparse.SUPPRESS)
    for one in kinds.choices.values():
        one.add_argument("--output", metavar="FILE", help="also write the figures to FILE as JSON")
        one.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    answer(arguments, arguments.run(arguments), arguments.text)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main("loader", main))
