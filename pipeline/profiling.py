"""A trace of chosen steps, for `chrome://tracing` or Perfetto: where the time of a step goes.

In: `log.profile` (steps a–b) and `log.profile_ranks`. Out: `RUN_DIR/profile/rank-N.steps-a-b.json.gz`,
written by torch.profiler: operators on the host, and kernels where there is a GPU; each step is one named
span. Called by `training_run.py`; nothing is imported, and no step costs more, while it is off.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any


class StepProfiler:
    """Profiles steps `first` to `last`, both included. Use as a context manager: what was begun is written at
    the end, also when a run stops in between."""

    def __init__(self, steps: tuple[int, int], folder: Path, rank: int):
        self._first, self._last = steps
        self._folder, self._rank = folder, rank
        self._profile: Any = None
        self._span = ExitStack()
        self._done = 0  # the last step that ended inside

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """Call it before a step's data is asked for; the first step has the number 1."""
        if not self._first <= step <= self._last:
            return
        import torch
        from torch.profiler import ProfilerActivity, profile, record_function

        if self._profile is None:
            self._first = step  # a resumed run may begin in between
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
        self._span.enter_context(record_function(f"step {step}"))

    def end(self, step: int) -> None:
        """Call it when the step has been applied."""
        if self._profile is not None:
            self._span.close()
            self._done = step
            if step >= self._last:
                self._stop()

    def _stop(self) -> None:
        if self._profile is None:
            return
        self._span.close()
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank}.steps-{self._first}-{max(self._first, self._done)}.json.gz"
        aside = path.with_name(f".tmp-{path.name}")
        self._profile.export_chrome_trace(str(aside))
        os.replace(aside, path)
        self._profile = None
