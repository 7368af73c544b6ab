"""The simulation of a large corpus runs the steps on what it says, and they agree with each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.shards.reader import ShardSet
from tools.benchmarks import plan_scale
from tools.benchmarks.plan_scale import PARTS, Size

SIZE = Size(256_000)


@pytest.fixture
def parts(tmp_path: Path) -> dict:
    found = {}
    for part in PARTS[:-1]:
        folder = tmp_path / ("merge" if part == "open" else part)
        folder.mkdir(exist_ok=True)
        if make := plan_scale.MAKERS[part][0]:
            make(folder, SIZE)
        found[part] = plan_scale.measured(part, folder, SIZE)
    return found


def test_the_steps_work_on_all_of_the_corpus(parts: dict, tmp_path: Path) -> None:
    manifest = ShardSet.open(tmp_path / "merge" / "set").manifest
    records = manifest["totals"]["documents"] + sum(manifest["rejected"].values())
    assert records == pytest.approx(SIZE.documents, rel=0.05)
    assert parts["plan"]["files"] == SIZE.files == len(manifest["inputs"])
    assert parts["merge"]["units"] == parts["plan"]["units"]
    assert parts["open"]["shards"] == len(manifest["shards"])
    quarantine = (tmp_path / "merge" / "set" / "quarantine.jsonl").read_text().splitlines()
    assert len(quarantine) == sum(manifest["rejected"].values()) and json.loads(quarantine[0])["line"] == 1
    # A copy of a copy is found too; a document may be chosen as its own copy.
    assert parts["exact"]["found"] == pytest.approx(plan_scale.REPEATED * SIZE.documents, rel=0.1)
    assert parts["near"]["found"] == pytest.approx(plan_scale.ALIKE * SIZE.documents * 3 / 4, rel=0.1)
    assert all(one["peak_memory_bytes"] > one["seconds"] > 0 for one in parts.values())
