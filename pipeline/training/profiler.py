"""A trace of chosen steps (`log.profile`, `log.profile_ranks`) for `chrome://tracing` or Perfetto."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any


class StepProfiler:
    """A context manager that writes `folder/rank-N.steps-a-b.json.gz` of the `steps` a to b, both included,
    or of those that were done when the run ends.

    error: the OSError met while writing. The ranks share it with the next step's figures; leaving the context
    raises it.
    """

    def __init__(self, steps: tuple[int, int], folder: Path, rank: int):
        self._first, self._last = steps
        self._folder, self._rank = folder, rank
        self.error: OSError | None = None
        self._profile: Any = None
        self._span = ExitStack()
        self._started, self._done = False, 0

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._span.close()
        if self._profile is not None:
            self._profile.stop()
        if self.error is not None and kind is None:
            raise self.error

    def begin(self, step: int) -> None:
        """Call it before a step's data is asked for; the first step of a run has the number 1."""
        from torch.profiler import profile, record_function, schedule

        if self._profile is None and step <= self._last:
            self._first = max(self._first, step)
            ahead, active = self._first - step, self._last - self._first + 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no step is left to warm up in
                plan = schedule(wait=max(0, ahead - 1), warmup=min(1, ahead), active=active, repeat=1)
            self._profile = profile(schedule=plan, on_trace_ready=self._write)
            self._profile.start()
        if self._first <= step <= self._last:
            self._started = True
            self._span.enter_context(record_function(f"step {step}"))

    def end(self, step: int) -> None:
        """Call it when the step has been applied."""
        self._span.close()
        self._done = step
        if self._profile is not None:
            self._profile.step()

    def _write(self, profile: Any) -> None:
        if not self._started:  # the run ends just before the first of the steps
            return
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
