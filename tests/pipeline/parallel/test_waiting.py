"""The clock without the moments in which the kernel ran others."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from pipeline.parallel import waiting


@pytest.mark.parametrize("place", range(8))
def test_a_delay_never_counts_wherever_it_falls(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs others for 5 s before one of the readings, each of which takes 1 ms."""
    now, delayed, readings = 100.0, 7.0, 0

    def read(value: Any) -> Any:
        nonlocal now, delayed, readings
        if readings == place:
            now, delayed = now + 5, delayed + 5
        now, readings = now + 0.001, readings + 1
        return value()

    monkeypatch.setattr(waiting, "_schedule", lambda _process: 0)
    monkeypatch.setattr(os, "pread", lambda *_: read(lambda: f"1 {round(delayed * 1e9)} 2\n".encode()))
    monkeypatch.setattr(time, "perf_counter", lambda: read(lambda: now))
    began = waiting.clock()
    ended = waiting.clock()
    assert 0 < ended - began < 0.02
    assert began == pytest.approx(93, abs=0.02)
