"""Which steps are skipped, and which rank is slow. All ranks have the same figures and decide alike.

A step whose loss or gradient norm is not finite is never applied, under any ZeRO stage. Spikes (above
`health.loss_spike` or `health.norm_spike` times the median of the last accepted steps) are skipped only on
request: clipping bounds the effect of a large gradient, and the model does not learn from a skipped step.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config.schema import HealthRecipe
from pipeline.training.records import StepSums

MEMORY = 50  # accepted steps that a spike is measured against
FEWEST = 10  # accepted steps before a median is meaningful
SPEEDS = ("own_seconds", "own_operations", "communication_seconds")  # of a rank's step
SPEED_STEPS = 20  # steps over which a rank must be slow
SLOW = 1.2  # times the median: one that takes 1.3 times as long is named in spite of noise
SLOW_STEPS = 10  # steps in a row for which the last `SPEED_STEPS` must be that slow
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
        # [kind, step, rank] of the last steps; kinds: seconds, seconds per multiply-add, share of data waits
        self._recent = np.zeros((3, SPEED_STEPS, len(hosts)))
        self._steps, self._slow_steps = np.zeros((2, len(hosts)), dtype=int)
        self._steps_to_silence = 0

    def note(
        self, seconds: list[float], operations: list[float], data_waits: list[float]
    ) -> tuple[int, float] | None:
        """Record one step: by rank its own seconds, its multiply-adds (0: it had none), and the seconds of
        those that it waited for data. Returns the slowest rank and its time divided by the median, with two
        ranks by the other's; None when fewer than two are known."""
        times, counts, waits = np.array([seconds, operations, data_waits])
        known = np.flatnonzero((counts > 0) & (times > 0))
        if len(known) < 2:
            return None
        kinds = np.stack([times, times / np.maximum(counts, 1e-300), waits / np.maximum(times, 1e-300)])
        self._recent[:, self._steps[known] % SPEED_STEPS, known] = kinds[:, known]
        self._steps[known] += 1
        ratios = _ratios(kinds[:2, known])
        slowest = int(ratios.argmax())
        return int(known[slowest]), float(ratios[slowest])

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
        """A line about the slowest rank when it has been slow for `SLOW_STEPS` steps; rarely repeated.

        A rank's usual time is the lower quartile of its last `SPEED_STEPS`: a few slow steps say nothing.
        """
        self._steps_to_silence = max(0, self._steps_to_silence - 1)
        known = np.flatnonzero(self._steps >= SPEED_STEPS)
        if len(known) < 2:
            return None
        quartile = SPEED_STEPS // 4
        ratios = _ratios(np.partition(self._recent[:2, :, known], quartile, axis=1)[:, quartile])
        self._slow_steps[known] = np.where(ratios >= SLOW, self._slow_steps[known] + 1, 0)
        ratios[self._slow_steps[known] < SLOW_STEPS] = 0.0
        slowest = int(ratios.argmax())
        if not ratios[slowest] or self._steps_to_silence:
            return None
        self._steps_to_silence = 10 * SPEED_STEPS
        rank = int(known[slowest])
        waits = float(np.median(self._recent[2, :, rank]))
        data = f", {waits:.0%} of it waiting for data" if waits >= NOTABLE_WAIT else ""
        return (
            f"rank {rank} ({self._hosts[rank]}) takes {ratios[slowest]:.1f} times the median rank's time "
            f"for the same work{data}, over the last {SPEED_STEPS} steps: all others wait for it"
        )


def _ratios(times: np.ndarray) -> np.ndarray:
    """[kind, rank] by the lower median rank, then the smaller ratio of the kinds."""
    middle = np.sort(times, axis=1)[:, (times.shape[1] - 1) // 2]
    return (times / middle[:, None]).min(axis=0)
