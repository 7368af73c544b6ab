"""Runs that several tests of training compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ranks
from helpers.runs import MODELS, arguments, losses


@pytest.fixture(scope="session")
def reference(
    pool: ranks.RankPool, recipes: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Each objective trained by one process without partitioning."""
    runs = {}
    for objective in MODELS:
        runs[objective] = tmp_path_factory.mktemp("reference") / objective
        assert pool.run(1, ranks.train, arguments(recipes, objective, "zero0", runs[objective])) == [0]
        learned = losses(runs[objective])
        assert learned[-1] < learned[0] - 0.2, "the run learns nothing: comparing losses would say nothing"
    return runs
