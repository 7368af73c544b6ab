"""Which steps are skipped, and which rank is slow. All ranks have the same figures and decide alike.

A step whose loss or gradient norm is not finite is never applied, under any ZeRO stage. Spikes (above
`health.loss_spike` or `health.norm_spike` times the median of the last accepted steps) are skipped only on
request: clipping bounds the effect of a large gradient, and the model does not learn from a skipped step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.schema import HealthRecipe
from pipeline.training.records import StepSums

MEMORY = 50  # accepted steps that a spike is measured against
FEWEST = 10  # accepted steps before a median is meaningful
SPEEDS = ("own_seconds", "own_operations", "communication_seconds")  # of a rank's step
SPEED_STEPS = 20  # steps over which a rank must be slow
SLOW = 1.25  # times the median: one that takes 1.3 times as long is named in spite of noise
NOTABLE_WAIT = 0.1  # share of its time that a slow rank waits for data


@dataclass
class Guard:
    """Skipped steps, and the recent figures that define a spike. Part of every checkpoint, so that a resumed
    run decides like an uninterrupted one.

    skips: of the whole run. in_row: consecutive ones up to the last step. losses, norms: of the last accepted
    steps; empty without a spike guard.
    """

    skips: int = 0
    in_row: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def bad_loss(self, loss: float, recipe: HealthRecipe) -> str | None:
        """Why a step with this loss (nats per target) must not be applied; None when it may be."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = _limit(self.losses, recipe.loss_spike)
        if loss > limit:
            return f"the loss {loss:.4g} is above {limit:.4g}, {recipe.loss_spike:g} times the median"
        return None

    def norm_limit(self, recipe: HealthRecipe) -> float:
        """The largest gradient norm that is applied; infinity without a spike guard."""
        return _limit(self.norms, recipe.norm_spike)

    def record(self, loss: float, norm: float, skipped: str | None, recipe: HealthRecipe) -> None:
        """Record one step. skipped: why it was not applied, if so."""
        if skipped:
            self.skips += 1
            self.in_row += 1
            return
        self.in_row = 0
        for values, value, factor in (
            (self.losses, loss, recipe.loss_spike),
            (self.norms, norm, recipe.norm_spike),
        ):
            values[:] = [*values, value][-MEMORY:] if factor is not None else []


def _limit(recent: list[float], factor: float | None) -> float:
    if factor is None or len(recent) < FEWEST:
        return math.inf
    return factor * statistics.median(recent)


class Speeds:
    """Finds a rank that is consistently slower than the others.

    It compares each rank's own time, which excludes waiting for others, both as it is and per multiply-add,
    and takes the smaller ratio: ranks may hold different numbers of bins, and part of the time is the same
    for any number.
    """

    def __init__(self, hosts: list[str]):
        self._hosts = hosts
        self._recent: list[deque[float]] = [deque(maxlen=SPEED_STEPS) for _ in hosts]
        self._data_waits: list[deque[float]] = [deque(maxlen=SPEED_STEPS) for _ in hosts]
        self._steps_to_silence = 0

    def note(
        self, seconds: list[float], operations: list[float], data_waits: list[float]
    ) -> tuple[int, float] | None:
        """Record one step: by rank its own seconds, its multiply-adds (0: it had none), and the seconds of
        those that it waited for data. Returns the slowest rank and its time divided by the median, with two
        ranks by the other's; None when fewer than two are known."""
        known = [rank for rank, count in enumerate(operations) if count > 0 and seconds[rank] > 0]
        if len(known) < 2:
            return None
        middle = statistics.median_low(seconds[rank] for rank in known)
        middle_rate = statistics.median_low(seconds[rank] / operations[rank] for rank in known)
        ratios = {}
        for rank in known:
            rate = seconds[rank] / operations[rank]
            ratios[rank] = min(seconds[rank] / middle, rate / middle_rate)
            self._recent[rank].append(ratios[rank])
            self._data_waits[rank].append(data_waits[rank] / seconds[rank])
        slowest = max(known, key=ratios.__getitem__)
        return slowest, ratios[slowest]

    def figures(self, sums: StepSums) -> dict[str, Any]:
        """Record one step; what is known of it by the names of `StepRecord`."""
        own, communication = sums.own_seconds, sums.communication_seconds
        found = self.note(own, sums.own_operations, sums.wait_seconds)
        if found is None:
            return {}
        slowest, ratio = found
        return {
            "own_seconds": statistics.median(own),
            "slowest_rank": slowest,
            "slowest_seconds": own[slowest],
            "slowest_ratio": ratio,
            "slow": self.warning(),
            "communication_seconds": statistics.median(communication),
            "communication_max_seconds": max(communication),
            "communication_rank": communication.index(max(communication)),
        }

    def warning(self) -> str | None:
        """A line about the slowest rank when it has been slow for `SPEED_STEPS` steps; rarely repeated."""
        if self._steps_to_silence:
            self._steps_to_silence -= 1
            return None
        usual = [statistics.median_low(r) if len(r) == SPEED_STEPS else 0.0 for r in self._recent]
        slowest = max(range(len(usual)), key=usual.__getitem__)
        if usual[slowest] < SLOW:
            return None
        self._steps_to_silence = 10 * SPEED_STEPS
        waits = statistics.median(self._data_waits[slowest])
        data = f", {waits:.0%} of it waiting for data" if waits >= NOTABLE_WAIT else ""
        return (
            f"rank {slowest} ({self._hosts[slowest]}) takes {usual[slowest]:.1f} times the median rank's "
            f"time for the same work{data}, over the last {SPEED_STEPS} steps: all others wait for it"
        )
