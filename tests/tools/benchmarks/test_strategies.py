"""`tools.benchmarks.strategies`: real starts, and figures that are what their metrics say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

from data_prep.common.errors import UserError
from tools.benchmarks.strategies import figures, run

pytestmark = pytest.mark.launch


RECIPE = str(REPOSITORY / "pipeline" / "recipes" / "demo-vae.yaml")


def test_a_start_is_a_real_training(tiny_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "strategies.json"
    small = {"strategies": ["zero0+comms-logger"], "ranks": 1, "rounds": 1, "steps": 4, "tokens": 256}
    result = run(recipe=RECIPE, shards=str(tiny_shards), **small, output=str(output))
    assert json.loads(output.read_text()) == result
    [(name, one)] = result["strategies"].items()
    assert name == "zero0+comms-logger" and one["seconds"]["median"] > 0 and one["tokens_per_second"] > 0
    assert one["ratio"] == {"median": 1.0, "values": [1.0]} and one["loss_difference"] == 0
    assert (result["ranks"], result["bins_per_step"], result["bin_tokens"]) == (1, 1, 256)


def test_figures_compare_within_a_round() -> None:
    def start(seconds: float, loss: float) -> list[dict]:
        row = {"loss": loss, "tokens_per_second": 1 / seconds, "memory_bytes": 7}
        return [row | {"seconds": 99.0}] * 2 + [row | {"seconds": seconds}] * 3

    found = figures(
        {
            "zero0": [start(1.0, 2.0), start(2.0, 2.0), start(4.0, 2.0)],
            "zero3": [start(1.5, 2.0), start(2.4, 2.25), start(8.0, 2.0)],
        }
    )
    assert found["zero3"]["ratio"] == {"median": 1.5, "values": [1.5, 1.2, 2.0]}
    assert found["zero3"]["seconds"] == {"median": 2.4, "values": [1.5, 2.4, 8.0]}
    assert found["zero3"]["loss_difference"] == 0.25
    assert found["zero0"]["ratio"]["median"] == 1.0 and found["zero0"]["tokens_per_second"] == 0.5


def test_wrong_arguments_are_refused(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="zero9 does not exist"):
        run(recipe=RECIPE, shards=str(tiny_shards), strategies=["zero9"])
    with pytest.raises(UserError, match="--steps must be more than 2"):
        run(recipe=RECIPE, shards=str(tiny_shards), steps=2)
    with pytest.raises(UserError, match="its folder does not exist"):
        run(recipe=RECIPE, shards=str(tiny_shards), output=str(tmp_path / "no" / "x.json"))
