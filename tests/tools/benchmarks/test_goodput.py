"""The simulation of long runs against one that walks through every event."""

from __future__ import annotations

import numpy as np
import pytest

from tools.benchmarks import goodput


def walk(
    gaps: list[float], days: float, interval: float, stall: float, write: float, restart: float
) -> float:
    """The same figure, second by second."""
    interval = max(interval, write - stall)
    end, now, kept = days * goodput.DAY, 0.0, 0.0
    for gap in gaps:
        fails, now = now + gap, now + restart
        trained, pending = 0.0, []  # since the start; (complete at, trained until then)
        while True:
            stop = min(fails, end)
            if now + interval > stop:
                break
            now, trained = now + interval, trained + interval
            pending.append((now + write, trained))
            now += stall
        if fails >= end:
            up = end - (fails - gap) - restart
            return (kept + max(0.0, up) * interval / (interval + stall)) / end
        kept += max((done for at, done in pending if at <= fails), default=0.0)
        now = fails
    raise AssertionError("too few gaps")


@pytest.mark.parametrize(
    ("interval", "stall", "write"), [(600, 0, 0), (600, 50, 50), (600, 2, 500), (60, 2, 500), (20_000, 9, 9)]
)
def test_a_run_keeps_what_complete_saves_hold(interval, stall, write):
    gaps = np.random.default_rng(3).exponential(9000, 400)
    found = goodput.goodput(gaps, 5, interval, stall, write, 700)
    assert found == pytest.approx(walk(list(gaps), 5, interval, stall, write, 700), abs=1e-9)
    assert 0 <= found < 1


def test_without_failures_only_saves_cost():
    assert goodput.goodput(np.array([1e9]), 30, 900, 100, 100, 0) == pytest.approx(0.9)


def test_the_same_seed_gives_the_same_figures_and_youngs_interval_is_near_the_best():
    settings = {"gpus": 2000, "days": 60, "runs": 12, "minutes": (10, 60)}
    found, again = (goodput.simulate(**settings)["rows"] for _ in range(2))
    assert found == again and found != goodput.simulate(**settings, seed=2)["rows"]
    for row in found:
        assert row["failures_per_day"] == pytest.approx(
            2000 * {"Llama 3": 419 / 16384 / 54, "OPT-175B": 2 / 1024}[row["source"]]
        )
        assert row["best_goodput"] >= max(row["goodput"].values())
        assert row["young_goodput"] == pytest.approx(row["best_goodput"], abs=0.01)
