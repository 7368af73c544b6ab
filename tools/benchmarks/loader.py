"""Benchmarks of the path from shards to batches.

loader    packed batches per second from real shards, on the trainer's one loader thread: planning, reading,
          checking and packing. Every run opens the shards again, so the figures include all checksums.
planning  the first bins of one rank of a large run, planned from an index of any size, at the start and late
          in an epoch, each in a new process: seconds and peak memory (with Python and torch). Only index
          files that are opened exist: each is made on demand, outside the measured time, then read normally.
          Reading the bins' content is not included.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_prep.common.command_line import Positive
from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, log
from data_prep.common.measuring import alternate, in_new_process, memory_field, spread
from data_prep.shards.layout import INDEX_DTYPE, npy_bytes, read_index
from data_prep.shards.reader import ShardSet
from pipeline.data.loader import StepLoader, assign
from pipeline.data.plan import PART_WINDOWS, BinPlan, Place, Position, count
from pipeline.parallel.ranks import Ranks
from tools.benchmarks.sharding import PACKAGES
from tools.commands import Output, console

WINDOWS = (1024, 128)
BIN_TOKENS = 8192
TOKENS_PER_SENTENCE = 10.9
LATE = 0.9  # of an epoch
STEPS = 5  # planned after the first one, to measure the rate


def loader(*, shards: str, bins: Positive = 500, runs: Positive = 5, output: Output = None) -> dict[str, Any]:
    """Real tokens per second of packed batches, as the trainer's loader makes them on one thread.

    Args:
        shards: shard folder
        bins: bins of a run
        runs: runs of each window length
    """
    require_folder(output)
    byte_lengths = ShardSet.open(shards).tokenizer().byte_lengths
    taken = alternate(
        runs, {str(window): partial(_load, shards, window, bins, byte_lengths) for window in WINDOWS}
    )
    rates = {
        window: {
            rate: spread([run[rate] for run in of]) for rate in ("tokens_per_second", "tokens_per_cpu_second")
        }
        | {"first_seconds": [run["first_seconds"] for run in of]}
        for window, of in taken.items()
    }
    asked = {"shards": shards, "bins": bins, "bin_tokens": BIN_TOKENS}
    result = {"benchmark": "loader", **header(PACKAGES), **asked, "windows": rates}
    write_result(result, output)
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
    log(f"window {window}: {tokens / seconds:,.0f} tokens/s")
    return {
        "first_seconds": first - start,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
    }


def planning(
    *,
    documents: Positive = 500_000_000,
    shards: Positive = 10_000,
    ranks: Positive = 4096,
    output: Output = None,
) -> dict[str, Any]:
    """Seconds and memory to plan the first batch of a rank from an index of any size (simulated)."""
    require_folder(output)
    if documents < shards:
        raise UserError(f"{documents} documents cannot fill {shards} shards")
    measured: dict[str, Any] = {}
    for window, at in itertools.product(WINDOWS, ("start", "late")):
        found = in_new_process(plan_at, at, window, documents, shards, ranks)
        measured.setdefault(str(window), {})[at] = found
        log(f"window {window}, {at}: {found}")
    asked = {"documents": documents, "shards": shards, "ranks": ranks, "bin_tokens": BIN_TOKENS}
    result = {"benchmark": "planning", **header(PACKAGES), **asked, "windows": measured}
    write_result(result, output)
    return result


def plan_at(at: str, window: int, documents: int, shards: int, ranks: int) -> dict[str, Any]:
    """The first step of the last rank, then some more steps, a bin for every rank in each, in this process.

    Args:
        at: where in an epoch, "start" or "late".
    """
    with tempfile.TemporaryDirectory() as folder:
        shard_set = SyntheticShardSet(Path(folder), documents, shards)
        start, cpu_start = time.perf_counter(), time.process_time()
        plan = BinPlan([cast(ShardSet, shard_set)], window, BIN_TOKENS, seed=1)
        position = plan.start()
        if at == "late":
            groups = -(-shards // plan.shards_at_once)
            part = int(LATE * documents / shards * plan.shards_at_once) // PART_WINDOWS
            position = Position((0,), (Place(0, int(LATE * groups), part, 100),))
        stream = plan.bins(position)
        bins = list(itertools.islice(stream, ranks))
        (mine,) = assign(bins, Ranks(ranks - 1, ranks, 0))
        count(bins, "sllm")
        seconds = time.perf_counter() - start - shard_set.making_seconds
        cpu_seconds = time.process_time() - cpu_start - shard_set.making_cpu_seconds
        opened = shard_set.opened
        making, before, tokens = shard_set.making_cpu_seconds, time.process_time(), 0
        for _ in range(STEPS):
            bins = list(itertools.islice(stream, ranks))
            tokens += count(bins, "sllm")[0]
            position = position.after(bins)
        rate = tokens / (time.process_time() - before - (shard_set.making_cpu_seconds - making))
    return {
        "first_batch_seconds": seconds,
        "first_batch_cpu_seconds": cpu_seconds,
        "first_batch_tokens": mine.tokens,
        "peak_memory_bytes": memory_field("VmHWM"),
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


if __name__ == "__main__":
    example = "python -m tools.benchmarks.loader planning --documents 500000000 --shards 10000 --ranks 4096"
    raise SystemExit(console("benchmarks.loader", loader, planning, example=example))
