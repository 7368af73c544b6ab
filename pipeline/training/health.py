"""Is the run well? Which steps are skipped, when skipping ends the run, ranks that hang, ranks that differ.

In: figures that all ranks share, so that all of them decide alike. Called by `training_run.py`.

Skipping: a step whose loss or gradient norm is not finite is never applied, under any ZeRO stage. Spikes
(`health.loss_spike`, `health.norm_spike`: so many times the median of the last accepted steps) are skipped
only when asked for: clipping bounds what a large gradient does, and a skipped step is data that the model
never learns from.
"""

from __future__ import annotations

import faulthandler
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.environment import code_version
from pipeline.config.schema import HealthRecipe
from pipeline.parallel.ranks import HUNG, AgreedError, Ranks

MEMORY = 50  # accepted steps that a spike is measured against
FEWEST = 10  # before so many there is no median worth the name
SPEED_STEPS = 20  # steps over which a rank must be slow
SLOW = 1.3  # times the median
LAST_WORDS_SECONDS = 3.0  # between a hung rank's stacks and its end
STACKS = "stacks"  # folder in the run directory: what each rank was doing when it hung
STACKS_BEFORE = "stacks-before"  # the same, of the last start that hung before this one


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


class Watchdog:
    """Ends this process when nothing was finished for `seconds`: stacks of all its threads in
    RUN/stacks/rank-N.txt, one line to standard error, exit status 76 (`launch.HUNG`).

    Every rank has its own, because one that hangs makes all others wait; without `seconds` it never acts.
    Between stacks and end it waits for LAST_WORDS_SECONDS: the first rank's end breaks the collective that
    the others wait in, and they would leave with that error before they have written theirs. Use as a
    context manager, from before the ranks meet: one that never comes is waited for like one that hangs.
    `beat(what)` says what was finished.
    """

    def __init__(self, run_dir: Path, rank: int, seconds: float | None):
        self._file, self._rank, self._seconds = run_dir / STACKS / f"rank-{rank}.txt", rank, seconds
        self._ended = threading.Event()
        self._last, self._finished = time.monotonic(), ""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat("the start")
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds is not None:
            self._thread.join()

    def beat(self, finished: str) -> None:
        self._last, self._finished = time.monotonic(), finished

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._last > self._seconds:
                self._give_up()

    def _give_up(self) -> None:
        said = f"rank {self._rank}: nothing finished since {self._finished}, for {self._seconds:g} s "
        said += "(health.hang_seconds)"
        try:  # the disk may be what hangs or is full: end all the same
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            said += f": stacks in {self._file}"
        except OSError:
            pass
        print(said, file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(HUNG)


def facts(recipe: dict[str, Any], strategy: dict[str, Any], provenance: dict[str, Any]) -> dict[str, str]:
    """What all ranks must have in common, by name: settings, shards, versions and this project's code."""
    found = {"python": provenance["python"], **provenance["packages"], "code": code_version()}
    for key in ("shards", "validation"):
        for number, shard_set in enumerate(provenance[key]):
            found[f"data.{key} {number + 1}"] = shard_set["fingerprint"][:12]
    found |= _flat("recipe", recipe) | _flat("DeepSpeed config", strategy)
    return found


def _flat(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in _flat(f"{name}.{key}", one).items()}
    return {name: str(value)}


def require_agreement(ranks: Ranks, ours: dict[str, str]) -> list[str]:
    """Compare `facts` over all ranks (a collective); returns every rank's host name. AgreedError, the same on
    every rank, names the first rank and fact that differ from rank 0's."""
    import torch.distributed as dist

    everyone: list[Any] = [None] * ranks.world
    dist.all_gather_object(everyone, (platform.node(), ours))
    first_host, first = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        for name in [*first, *(name for name in theirs if name not in first)]:
            if first.get(name) != theirs.get(name):
                raise AgreedError(
                    f"rank {rank} ({host}) has {name} {theirs.get(name)}, rank 0 ({first_host}) has "
                    f"{first.get(name)}: give all ranks the same"
                )
    return [host for host, _ in everyone]


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
