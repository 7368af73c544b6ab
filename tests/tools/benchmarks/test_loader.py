"""The loader's benchmark and the planning simulation: they run, and they measure what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import REPOSITORY

from data_prep.common.errors import UserError
from pipeline.data.plan import BinPlan
from tools.benchmarks import loader
from tools.benchmarks.loader import SyntheticShardSet

pytestmark = pytest.mark.launch


def test_the_loader_is_measured(tiny_shards: Path, tmp_path: Path) -> None:
    asked = {"shards": str(tiny_shards), "bins": 5, "runs": 2}
    result = loader.loader(**asked, output=str(tmp_path / "loader.json"))
    assert result == json.loads((tmp_path / "loader.json").read_text())
    assert list(result["windows"]) == ["1024", "128"] and result["cpu"]
    for measured in result["windows"].values():
        assert len(measured["tokens_per_second"]["values"]) == 2
        assert measured["tokens_per_second"]["median"] > 0
    with pytest.raises(UserError, match="its folder does not exist"):
        loader.loader(**asked, output=str(tmp_path / "nowhere" / "x.json"))


@pytest.mark.parametrize("at", ["start", "late"])
def test_planning_reads_one_group_of_the_index(at: str) -> None:
    result = loader.plan_at(at, 1024, 200_000, 1000, 4)
    assert result["indexes_read"] == 16
    assert 7000 < result["first_batch_tokens"] <= 8192


def test_the_command_prints_its_figures_as_json() -> None:
    sizes = ["--documents", "2000", "--shards", "10", "--ranks", "2"]
    command = [sys.executable, "-m", "tools.benchmarks.loader", "planning", *sizes]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    result = json.loads(printed)
    assert (result["documents"], result["ranks"]) == (2000, 2)
    assert result["windows"]["128"]["late"]["peak_memory_bytes"] > 1e7


def test_simulated_sentences_are_those_of_the_index(tmp_path: Path) -> None:
    shard_set = SyntheticShardSet(tmp_path, 3000, 3)
    shard = shard_set.shard(1)
    documents = np.array([0, 5, 6, 999])
    lengths = shard.sentence_lengths_of(documents)
    assert lengths.min() >= 1 and len(lengths) == shard.index["sentences"][documents].sum()
    assert lengths.sum() == shard.index["tokens"][documents].sum()
    assert np.array_equal(shard_set.shard(1).index, shard.index) and not list(tmp_path.iterdir())
    bins = list(BinPlan([shard_set], 128, 1024, seed=1).epoch())
    totals = sum(int(shard_set.shard(i).index["tokens"].sum(dtype=np.int64)) for i in range(3))
    assert sum(bin_.tokens for bin_ in bins) == totals


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(UserError, match="cannot fill 100 shards"):
        loader.planning(documents=9, shards=100)
