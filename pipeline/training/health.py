"""Is the run well? Which steps are skipped, when skipping ends the run, ranks that hang, ranks that differ.

In: figures that all ranks share, so that all of them decide alike. Called by `training_run.py`.

Skipping: a step whose loss or gradient norm is not finite is never applied, under any ZeRO stage. Spikes
(`health.loss_spike`, `health.norm_spike`: so many times the median of the last accepted steps) are skipped
only when asked for: clipping bounds what a large gradient does, and a skipped step is data that the model
never learns from.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from pipeline.config.schema import HealthRecipe

MEMORY = 50  # accepted steps that a spike is measured against
FEWEST = 10  # before so many there is no median worth the name
SPEED_STEPS = 20  # steps over which a rank must be slow
SLOW = 1.3  # times the median


@dataclass
class Guard:
    """Skipped steps so far, and the recent figures that spikes are judged by; part of every checkpoint, so
    that a resumed run decides as an uninterrupted one.

    skips: steps skipped in the run's life. in_row: how many of them ended the last step, without a good one
    between. losses, norms: of the last accepted steps; empty while the recipe asks for no spike guard.
    """

    skips: int = 0
    in_row: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def bad_loss(self, loss: float, recipe: HealthRecipe) -> str | None:
        """Why a step with this loss (nats per target) is not to be applied; None when it is good."""
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
        """Take note of one step. skipped: why it was not applied, if so."""
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
    """Finds a rank that is slower than the others step after step.

    Compared is each rank's own time for its work (`Engine.own_seconds`: waiting for others is not in it) per
    multiply-add of its bins, because ranks may hold different numbers of them.
    """

    def __init__(self, hosts: list[str]):
        self._hosts = hosts
        self._recent: list[deque[float]] = [deque(maxlen=SPEED_STEPS) for _ in hosts]
        self._steps_to_silence = 0

    def note(self, times: list[float]) -> tuple[int, float] | None:
        """One step's time per multiply-add of every rank, 0 where it is not known. Returns the slowest rank
        and how many times the median's its time is; None when fewer than two are known."""
        known = [time for time in times if time > 0]
        if len(known) < 2:
            return None
        middle = statistics.median_low(known)
        for recent, time_ in zip(self._recent, times, strict=True):
            if time_ > 0:
                recent.append(time_ / middle)
        slowest = max(range(len(times)), key=times.__getitem__)
        return slowest, times[slowest] / middle

    def warning(self) -> str | None:
        """A line about the slowest rank when it has been slow for `SPEED_STEPS` steps; said rarely."""
        if self._steps_to_silence:
            self._steps_to_silence -= 1
            return None
        usual = [statistics.median(r) if len(r) == SPEED_STEPS else 0.0 for r in self._recent]
        slowest = max(range(len(usual)), key=usual.__getitem__)
        if usual[slowest] <= SLOW:
            return None
        self._steps_to_silence = 10 * SPEED_STEPS
        return (
            f"rank {slowest} ({self._hosts[slowest]}) takes {usual[slowest]:.1f} times the median rank's "
            f"time for the same work, over the last {SPEED_STEPS} steps: all others wait for it"
        )
