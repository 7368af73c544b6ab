"""The bound of generation: exact where the arithmetic is easy, and wide enough at 8 and 12 layers."""

from __future__ import annotations

import json

import pytest

from data_prep.common.errors import UserError
from pipeline.cli.main import main
from pipeline.costs.generation_bound import format_bound, run

DEFAULTS = ("default-stack", "default-lm")


def test_the_token_model_costs_its_weights_and_its_context():
    result = run(*DEFAULTS, [8], [2048], 2046, 11)
    [row] = result["rows"]
    layers, d, ffn = 8, 128, 384
    weights = layers * (4 * d * d + 3 * d * ffn) + 2048 * d
    context = 2046 + 1 + 6  # BOS, and on average half of a sentence with the row itself
    full, window = row["against"]["full"], row["against"]["window 32"]
    assert full["multiply_adds"] == pytest.approx(weights + layers * 2 * d * context)
    assert window["multiply_adds"] == weights + layers * 2 * d * 32
    assert full["bytes"] == 4 * full["multiply_adds"]
    # Token layers and head run on 12 rows of 11 tokens, the backbone's five layers on one.
    token = 3 * (4 * d * d + 2 * d * ffn) + 3 * 2 * d * 32 + 2048 * d
    sentence = 5 * (4 * d * d + 3 * d * ffn + 2 * d * (2046 // 11 + 2)) + d * d + d
    assert row["model"]["multiply_adds"] == pytest.approx((12 * token + sentence) / 11)


def test_the_bound_is_as_wide_as_the_layout_promises(capsys):
    given = ["--recipe", DEFAULTS[0], "--against", DEFAULTS[1], "--vocab-size", "2048", "--json"]
    assert main(["benchmark", "bound", *given]) == 0
    shallow, deep = json.loads(capsys.readouterr().out)["rows"]
    for cost in ("multiply_adds", "bytes"):
        assert shallow["layers"] == 8 and shallow["ratios"][cost] >= 1.6
        assert deep["layers"] == 12 and deep["ratios"][cost] >= 2
    text = format_bound(run("memory-stack", "default-lm", [8], [2048], 220, 11, "bf16"))
    assert "a new token behind 220 tokens" in text and "default-lm, window 32" in text


def test_recipes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="one of objective lm"):
        run("default-stack", "default-stack", [8], [2048], 100, 11)
    with pytest.raises(UserError, match="3 token layers and a backbone"):
        run("default-stack", "default-lm", [3], [2048], 100, 11)
