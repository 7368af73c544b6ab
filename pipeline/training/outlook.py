"""What is ahead of a run: how many tokens it reads, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from data_prep.common.errors import counted
from data_prep.shards.reader import ShardSet
from pipeline.common.text import duration
from pipeline.config.schema import Recipe

# Steps of this start after which the time left is said: the first has warm-up in it, so again later.
SAID_AFTER = (1, 20)


class Outlook:
    """Says how much a run reads, and after a few of its steps how long a step and the rest take."""

    def __init__(self, recipe: Recipe, shard_sets: Sequence[ShardSet], step: int, tokens: int):
        """shard_sets: those of training; step, tokens: where this start begins."""
        self._training, self._step, self._begin = (
            recipe.training,
            step,
            recipe.training.progress(step, tokens),
        )
        self._clock = time.perf_counter()
        limits = []
        if (most := recipe.training.max_tokens) is not None:
            shard_tokens = sum(one.manifest["totals"]["tokens"] for one in shard_sets)
            share = most / max(1, shard_tokens)
            limits.append(f"{counted(most, 'token')} ({share:.3g} × the shards' {shard_tokens:,})")
        if recipe.training.max_steps is not None:
            limits.append(counted(recipe.training.max_steps, "step"))
        self.amount = f"the run ends after {' or '.join(limits)}"

    def after(self, step: int, tokens: int) -> str | None:
        """The line to say after a step, if any."""
        done, passed = step - self._step, time.perf_counter() - self._clock
        progress = self._training.progress(step, tokens)
        if done not in SAID_AFTER or progress >= 1 or progress <= self._begin:
            return None
        left = passed / (progress - self._begin) * (1 - progress)
        warm = " (the first step includes warm-up)" if done == 1 else ""
        return f"a step takes about {duration(passed / done)}, the rest about {duration(left)}{warm}"
