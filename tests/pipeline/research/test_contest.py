"""The contest of two sides, settled on rows whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.common.errors import UserError
from pipeline.research import contest
from tools.docs.tables import refresh

BYTES = [8000] * 40
ALPHA = {"sllm": 0.06, "lm": 0.05}
BUDGETS = (6e12, 18e12, 60e12)


def row(side: str, name: str, budget: float, seed: int, bits: float, **changed: Any) -> dict[str, Any]:
    """A run: documents differ by much more than models do, and each run by a little noise."""
    hard = np.random.default_rng(0).normal(0, 0.3, len(BYTES))
    noise = np.random.default_rng(sum(map(ord, f"{name} {budget} {seed}"))).normal(0, 0.01, len(BYTES))
    noise -= noise.mean()
    nats = (bits + hard - hard.mean() + noise) * np.array(BYTES) * math.log(2)
    found = {"bits_per_byte": bits, "by_document": {"nats": nats.tolist(), "bytes": BYTES}}
    return {
        "objective": side,
        "name": name,
        "seed": seed,
        "budget": budget,
        "needed_operations": budget,
        "tokens": 1_000_000,
        "window_tokens": 512,
        "bits_per_byte": bits,
        "shuffle_gain": 0.01 if side == "sllm" else None,
        "evaluation": {"data_fingerprint": "a"},
        "recipe": {"seed": seed, "output_dir": f"{name}{seed}", "model": {"vae": {}}, "optimizer": name},
        "new_token": {"multiply_adds": 1e6},
        "held_out": found,
        **changed,
    }


def bits(side: str, budget: float, worse: float = 0.0) -> float:
    """Lines in log and log that meet at 1e13."""
    return 2 * (budget / 1e13) ** -ALPHA[side] + worse


def rows() -> list[dict[str, Any]]:
    return [
        row(side, f"{side}{worse}", budget, seed, bits(side, budget, worse))
        for side in contest.SIDES
        for budget in BUDGETS
        for worse in (0.0, 0.02)
        for seed in (1, 2)
    ]


def test_the_best_of_each_side_and_every_try_is_counted() -> None:
    again = [row("lm", "lm0.0", BUDGETS[0], 1, bits("lm", BUDGETS[0]))]  # the same setting in a second sweep
    vae = row("vae", "vae", BUDGETS[0], 1, 0.5)
    result = contest.settle([*rows(), *again, vae])
    assert result["tries"] == {"sllm": 6, "lm": 6} and len(result["points"]) == 12
    for entry, budget in zip(result["budgets"], BUDGETS, strict=True):
        assert entry["tries"] == {"sllm": 2, "lm": 2}
        assert {one["name"] for one in entry["best"].values()} == {"sllm0.0", "lm0.0"}
        truth = bits("sllm", budget) - bits("lm", budget)
        low, high = entry["difference"]["value_interval"]
        assert entry["difference"]["value"] == pytest.approx(truth, abs=1e-9) and low < truth < high
        assert high - low < 0.02, "documents are paired: their own spread is 0.3"
        assert entry["difference"]["seeds"] == [2, 2]
    table = contest.table(result)
    assert len(table.rows) == 6 and contest.notes(result)[0].endswith("): 6 of SLLMs, 6 of token models.")
    assert sum(entry["tries"]["sllm"] for entry in result["budgets"]) == 6, "in all as many as at the budgets"
    quality, speed = contest.plots(result)
    assert len(quality.lines) == len(speed.lines) == 4 and "6 tries" in quality.lines[0].name


def test_what_is_compared_is_not_what_was_chosen_on() -> None:
    lucky = row("lm", "lucky", BUDGETS[0], 1, 1.0)
    lucky["held_out"] = row("lm", "lucky", BUDGETS[0], 1, 3.0)["held_out"]
    entry = contest.settle([*rows(), lucky])["budgets"][0]
    assert entry["best"]["lm"]["name"] == "lucky" and entry["best"]["lm"]["held_out"] == 3.0
    assert entry["difference"]["value"] == pytest.approx(bits("sllm", BUDGETS[0]) - 3.0)


def test_the_fits_and_where_they_meet() -> None:
    result = contest.settle(rows())
    for side in contest.SIDES:
        assert result["fits"][side]["alpha"] == pytest.approx(ALPHA[side], abs=1e-6)
    assert result["crossing"]["log10_operations"] == pytest.approx(13, abs=1e-3)
    assert result["crossing"]["share"] == 1
    draw = np.random.default_rng(2)
    noisy = [
        row(side, side, budget, seed, bits(side, budget) * (1 + draw.normal(0, 0.003)))
        for side in contest.SIDES
        for budget in BUDGETS
        for seed in range(4)
    ]
    low, high = contest.settle(noisy)["crossing"]["log10_operations_interval"]
    assert low < 13 < high and high - low > 0.1
    # Errors that happen to be alike on both sides do not cancel: they are not one error.
    alike = [
        row(side, side, budget, seed, bits(side, budget) * (1 + bend))
        for side in contest.SIDES
        for budget, bend in zip(BUDGETS, (0.003, -0.006, 0.003), strict=True)
        for seed in (1, 2)
    ]
    low, high = contest.settle(alike)["crossing"]["log10_operations_interval"]
    assert high - low > 0.1


def test_equal_time_is_more_or_fewer_operations() -> None:
    slow = contest.settle(rows(), {"sllm": 10.0, "lm": 20.0})["budgets"]
    for entry, budget in zip(slow, BUDGETS, strict=True):
        truth = bits("sllm", budget / 2) - bits("lm", budget)
        assert entry["at_equal_time"]["value"] == pytest.approx(truth, abs=1e-6)
        assert entry["at_equal_time"]["rate"] == 0.5
    assert "at_equal_time" not in contest.settle(rows())["budgets"][0]


def test_a_sentence_vae_is_paid_for() -> None:
    paid = [{**one, "needed_operations_with_vae": one["budget"] + 1e12} for one in rows()]
    assert {point["operations"] for point in contest.settle(paid)["points"]} == {b + 1e12 for b in BUDGETS}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"evaluation": {"data_fingerprint": "b"}}, "measured on different texts or windows"),
        ({"window_tokens": 1024}, "measured on different texts or windows"),
        (
            {"held_out": {"bits_per_byte": 1, "by_document": {"nats": [1.0], "bytes": [1]}}},
            "documents of these",
        ),
    ],
)
def test_rows_of_other_texts_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        contest.settle([*rows(), row("lm", "best", BUDGETS[0], 1, 1.0, **changed)])


def test_a_contest_needs_both_sides() -> None:
    with pytest.raises(UserError, match="of objective sllm and of objective lm"):
        contest.settle([one for one in rows() if one["objective"] == "lm"])


def test_the_docs_have_a_table_of_it_and_its_frontier(tmp_path: Path) -> None:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("Words.\n", encoding="utf-8")
    page = tmp_path / "docs" / "log.md"
    page.write_text("<!-- table: contest dials.json rates.json -->\n<!-- end -->\n", encoding="utf-8")
    rates = {"model": {"multiply_adds_per_second": 2.0}, "against": {"multiply_adds_per_second": 1.0}}
    for file, result in (("dials", {"rows": rows()}), ("rates", rates)):
        (tmp_path / "docs" / "results" / f"{file}.json").write_text(json.dumps(result), encoding="utf-8")
    refresh(tmp_path)
    lines = page.read_text(encoding="utf-8").splitlines()
    [ours] = [line for line in lines if line.startswith("| 60 | sllm0.0 | 2 | 2 |")]
    difference, at_equal_time = (float(cell.split()[0]) for cell in ours.strip(" |").split("|")[-2:])
    # Twice the operations in the same time.
    assert difference == pytest.approx(bits("sllm", 60e12) - bits("lm", 60e12), abs=6e-4)
    assert at_equal_time == pytest.approx(bits("sllm", 120e12) - bits("lm", 60e12), abs=6e-4)
    assert "- Tries (a setting at a budget each): 6 of SLLMs, 6 of token models." in lines
    assert (tmp_path / "docs" / "results" / "dials-frontier.svg").is_file()
    page.write_text(
        "<!-- table: contest dials.json rates.json rates.json -->\n<!-- end -->\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="2 of dials.json, rates.json, rates.json are files of rates"):
        refresh(tmp_path)
