"""What a run says about its length and the time that is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.recipes import write_recipe

from pipeline.config.schema import load_recipe
from pipeline.training import outlook
from pipeline.training.outlook import Outlook


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in its first entry."""
    now = [100.0]
    monkeypatch.setattr(outlook.time, "perf_counter", lambda: now[0])
    return now


def make(tmp_path: Path, step: int = 0, tokens: int = 0, **training: int) -> Outlook:
    words = [word for key, value in training.items() for word in (f"--training.{key}", str(value))]
    sets: list = [SimpleNamespace(manifest={"totals": {"tokens": count}}) for count in (1_500, 500)]
    return Outlook(load_recipe(write_recipe(tmp_path), words), sets, step, tokens)


def test_the_amount_is_in_tokens_and_in_passes_over_the_shards(tmp_path: Path) -> None:
    found = make(tmp_path, max_tokens=5_000, max_steps=40)
    assert found.amount == "the run ends after 5,000 tokens (2.5 × the shards' 2,000) or 40 steps"
    assert make(tmp_path, max_steps=1).amount == "the run ends after 1 step"


def test_the_rest_is_estimated_after_the_first_step_and_the_twentieth(tmp_path: Path, clock: list) -> None:
    found, lines = make(tmp_path, max_steps=101), {}
    for step in range(1, 41):
        clock[0] += 2
        if line := found.after(step, 0):
            lines[step] = line
    assert lines == {
        1: "a step takes about 2 s, the rest about 3 min 20 s (the first step includes warm-up)",
        20: "a step takes about 2 s, the rest about 2 min 42 s",
    }


def test_a_resumed_run_counts_from_where_it_resumes(tmp_path: Path, clock: list) -> None:
    found = make(tmp_path, step=50, tokens=5_000, max_tokens=10_000, max_steps=1000)
    clock[0] += 3
    assert found.after(51, 5_100) == (
        "a step takes about 3 s, the rest about 2 min 27 s (the first step includes warm-up)"
    )


def test_nothing_is_said_at_the_end(tmp_path: Path, clock: list) -> None:
    clock[0] += 3
    assert make(tmp_path, max_steps=1).after(1, 0) is None
