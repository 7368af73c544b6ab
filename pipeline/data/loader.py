"""The bins of each step for this rank, as batches built ahead in a background thread.

Step k is bins [k·G, (k+1)·G) of the stream for every world size. Micro-batch m of rank r is bin
k·G + m·world + r, or an empty batch if the step has no such bin, so that every rank calls every submodule
equally often.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config.deepspeed_config import micro_batches
from pipeline.data.batch import Batch, build_batch, empty_batch
from pipeline.data.plan import Bin, BinPlan, Position, count
from pipeline.data.upload import Uploader
from pipeline.parallel.ranks import Ranks


@dataclass
class Step:
    """One optimizer step. Counts named `*_all` are over all ranks' bins, known from the plan.

    batches: `micro_batches` of them; `Batch.to` brings them to the device. seeds: one per batch, a function
    of the bin alone (dropout). text_bytes: UTF-8 bytes of this rank's real tokens. digest: sum of its scored
    batches' digests. bins_all: the step's bins. position: of the stream after them.
    """

    batches: list[Batch]
    seeds: list[int]
    text_bytes: int
    digest: int
    targets_all: int
    tokens_all: int
    bins_all: list[Bin]
    position: Position
    wait_seconds: float = 0.0


def assign(bins: list[Bin], ranks: Ranks) -> list[Bin | None]:
    """This rank's bins of a step, in order; None is an empty batch."""
    count = micro_batches(len(bins), ranks.world)
    return [bins[i] if i < len(bins) else None for i in range(ranks.rank, count * ranks.world, ranks.world)]


def build(plan: BinPlan, mine: list[Bin | None], byte_lengths: np.ndarray) -> tuple[list[Batch], int]:
    """The batches of the assigned bins and their bytes of text. byte_lengths: int [vocabulary]."""
    batches, text_bytes = [], 0
    for bin_ in mine:
        batch = empty_batch() if bin_ is None else build_batch(plan.spans(bin_))
        if bin_ is not None:
            text_bytes += int(byte_lengths[batch.tokens_T.numpy()].sum(dtype=np.int64))
        batches.append(batch)
    return batches, text_bytes


class StepLoader:
    """Context manager that builds the next steps while the current one computes; `next_step()` waits for
    data."""

    def __init__(
        self,
        plan: BinPlan,
        objective: str,
        bins_per_step: int,
        ranks: Ranks,
        byte_lengths: np.ndarray,
        position: Position,
        ahead: int = 2,
        sentence_ends: bool = False,
        uploader: Uploader | None = None,
    ):
        """uploader: prepares batches for a GPU (default: they stay on the CPU)."""
        self._uploader = uploader or Uploader(torch.device("cpu"))
        self._plan, self._bins_per_step = plan, bins_per_step
        self._objective, self._sentence_ends = objective, sentence_ends
        self._ranks, self._byte_lengths, self._position = ranks, byte_lengths, position
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def __enter__(self) -> StepLoader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def next_step(self) -> Step:
        """The next step, or the exception of the background thread."""
        before = time.perf_counter()
        step = self._ready.get()
        if isinstance(step, BaseException):
            raise step
        step.wait_seconds = time.perf_counter() - before
        return step

    def _work(self) -> None:
        try:
            for step in self._steps():
                if not self._put(step):
                    return
        except BaseException as error:  # raised again in the training thread
            self._put(error)

    def _put(self, item: Step | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _steps(self) -> Iterator[Step]:
        stream, position = self._plan.bins(self._position), self._position
        while True:
            bins = list(itertools.islice(stream, self._bins_per_step))
            mine = assign(bins, self._ranks)
            batches, text_bytes = build(self._plan, mine, self._byte_lengths)
            tokens, targets = count(bins, self._objective, self._sentence_ends)
            position = position.after(bins)
            yield Step(
                batches=[self._uploader.prepare(batch) for batch in batches],
                seeds=[0 if bin_ is None else bin_seed(self._plan.seed, bin_) for bin_ in mine],
                text_bytes=text_bytes,
                digest=sum(batch.digest() for batch in batches if batch.scored),
                targets_all=targets,
                tokens_all=tokens,
                bins_all=bins,
                position=position,
            )


def bin_seed(seed: int, bin_: Bin) -> int:
    """The seed of a bin's forward pass, the same on every rank and in every run."""
    sequence = np.random.SeedSequence([seed, bin_.source, *bin_.place])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
