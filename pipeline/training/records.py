"""The records of a run: one line of metrics.jsonl, and the sums over all ranks that it is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass
class StepSums:
    """One step's sums over all ranks. The loss sums are in nats."""

    objective: float
    token_nll: float
    end_nll: float
    stop_nll: float
    kl: float
    text_bytes: float
    sentences: float
    padding: float  # multiply-adds of one forward pass on padded slots
    computed: float  # all multiply-adds of one forward pass
    bins: float  # scored batches
    bins_digest: float  # the sum of their digests; exact, because it is whole and below 2^53
    stop: float  # ranks that were asked to stop
    saving: float  # ranks whose thread still writes a checkpoint
    unwritten: float  # ranks that could not write their records or trace
    wait_seconds: list[float]  # by rank
    # By rank, of the step before: seconds without waiting for other ranks, multiply-adds of one forward pass,
    # seconds in collectives.
    own_seconds: list[float]
    own_operations: list[float]
    communication_seconds: list[float]

    @property
    def nats(self) -> float:
        """Plain cross-entropy of tokens, sentence ends and stop decisions."""
        return self.token_nll + self.end_nll + self.stop_nll


@dataclass(kw_only=True)
class StepRecord:
    """One line of metrics.jsonl. Sums are over all ranks. A field with a default is left out of the line
    while it is None."""

    step: int  # from 1
    epoch: int  # of the source that is furthest
    tokens: int  # real tokens so far
    loss: float  # objective in nats per target
    bits_per_byte: float
    token_nll: float  # nats
    end_nll: float
    stop_nll: float
    kl: float | None = None  # nats per sentence, of a variational SentenceVAE
    targets: int
    bytes: int  # UTF-8 bytes of the step's text
    bins: int
    bins_digest: int  # sum of the bins' checksums, which `sllm audit` compares
    tokens_per_second: float
    padding_share: float  # of the multiply-adds
    data_wait_seconds: float  # mean over ranks
    data_wait_max_seconds: float
    data_wait_rank: int  # the rank that waited longest
    # Of the step before, without waiting for other ranks: the median rank, and the slowest.
    own_seconds: float | None = None
    slowest_rank: int | None = None
    slowest_seconds: float | None = None
    slowest_ratio: float | None = None  # its time for the same work, divided by the median rank's
    slow: str | None = None  # a rank that has been slow for many steps
    # In collectives, in the step before: the median rank, and the one that waited longest.
    communication_seconds: float | None = None
    communication_max_seconds: float | None = None
    communication_rank: int | None = None
    grad_norm: float  # before clipping
    lr: float
    skips: int  # steps skipped so far
    skipped: str | None = None  # why this step was not applied
    memory_bytes: int  # peak of rank 0
    operations: int  # multiply-adds, forward and backward, padding included
    mfu: float | None  # null where the device's peak is not known
    seconds: float  # without evaluating and saving
    time: float  # Unix seconds at the step's end

    def to_dict(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) is not None
        }
