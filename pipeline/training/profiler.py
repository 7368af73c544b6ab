"""A trace of chosen steps, for `chrome://tracing` or Perfetto: where the time of a step goes.

In: `log.profile` (steps a–b) and `log.profile_ranks`. Out: `RUN_DIR/profile/rank-N.steps-a-b.json.gz`,
written by torch.profiler: operators on the host, and kernels where there is a GPU; each step is one named
span. Called by `training_run.py`; nothing is imported, and no step costs more, while it is off.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any


class StepProfiler:
    """Profiles steps `first` to `last`, both included. Use as a context manager: what was begun is written at
    the end, also when a run stops in between.

    error: the OSError met while writing the trace. The ranks share it with the next step's figures; at the
    very end leaving the context raises it.
    """

    def __init__(self, steps: tuple[int, int], folder: Path, rank: int):
        self._first, self._last = steps
        self._folder, self._rank = folder, rank
        self.error: OSError | None = None
        self._profile: Any = None
        self._span = ExitStack()
        self._done = 0  # the last step that ended inside

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop()
        if self.error is not None and kind is None:
            raise self.error

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
        profile, self._profile = self._profile, None
        profile.stop()
        path = self._folder / f"rank-{self._rank}.steps-{self._first}-{max(self._first, self._done)}.json.gz"
        aside = path.with_name(f".tmp-{path.name}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(aside))
            os.replace(aside, path)
        except OSError as error:
            self.error = error
            with suppress(OSError):
                aside.unlink()
