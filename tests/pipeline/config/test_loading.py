"""Overrides that a training takes from its environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.recipes import write_recipe

from data_prep.common.errors import UserError
from pipeline.config.loading import TRAIN_ARGS, environment_overrides
from pipeline.config.schema import load_recipe


def test_they_win_over_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRAIN_ARGS, "--training.max_steps 3 --output_dir 'a b'")
    typed = ["--training.max_steps", "7", "--seed", "5"]
    recipe = load_recipe(write_recipe(tmp_path), [*typed, *environment_overrides()])
    assert (recipe.training.max_steps, recipe.seed, recipe.output_dir) == (3, 5, "a b")


def test_nothing_is_added_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRAIN_ARGS, raising=False)
    assert environment_overrides() == []


def test_a_quotation_without_its_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRAIN_ARGS, "--seed '1")
    with pytest.raises(UserError, match=TRAIN_ARGS):
        environment_overrides()
