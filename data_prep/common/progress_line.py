"""The display of a long job's progress."""

from __future__ import annotations

import os
import time
from typing import Any, TextIO

from data_prep.common.errors import counted

LOG_SECONDS = 10.0
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class ProgressLine:
    """A bar on a terminal, a plain line every ten seconds in a log; called with the counts so far."""

    def __init__(self, stream: TextIO, label: str = "data-prep shard"):
        self._stream, self._label = stream, label
        self._bar: Any = None
        self._printed = time.monotonic()

    def __call__(self, progress: Any) -> None:
        live = self._stream.isatty()
        if self._bar is None:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread: processes with one thread can be forked

            self._bar = tqdm(
                desc=self._label,
                total=progress.total,
                initial=progress.done,
                unit="B",
                unit_scale=True,
                smoothing=0,
                file=self._stream if live else open(os.devnull, "w"),
                bar_format=None if live else LOG_FORMAT,
            )
        self._bar.total = progress.total
        counts = f"{counted(progress.documents, 'document')} ({progress.documents_rate:,.0f}/s)"
        self._bar.set_postfix_str(f"{counts}, {progress.rejected:,} rejected", refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if not live and time.monotonic() - self._printed >= LOG_SECONDS:
            self._printed = time.monotonic()
            print(self._bar, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
