"""`data-prep split` where it is stopped, resumes, or cannot resume. What it computes: test_sharding.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import tokenizer_folders
from helpers.data_prep_command import contents

from data_prep.common.errors import UserError
from data_prep.jobs.job import ShardSettings
from data_prep.jobs.run import make_shards
from data_prep.shards import split as splitting
from data_prep.shards.layout import MANIFEST
from data_prep.shards.reader import ShardSet
from data_prep.shards.split import UNFINISHED, parse_parts, split
from data_prep.shards.verify import verify
from data_prep.shards.writer import ShardWriter
from data_prep.text.sentences import SentenceSettings

PARTS = {"train": 0.6, "valid": 0.2, "test": 0.2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    lines = [json.dumps({"id": str(n), "content": f"Text {n}, the same."}) for n in range(200)]
    (folder / "x.jsonl").write_text("\n".join(lines))
    tokenizer = tokenizer_folders.byte_level(folder / "bytes")
    settings = ShardSettings(SentenceSettings("clause", "en", 64), shard_documents=30)
    make_shards([folder / "x.jsonl"], folder / "shards", tokenizer, settings)
    return folder / "shards"


class Killed(BaseException):
    """A kill, as far as files go: the clean-up does not come about either."""


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_split_killed_while_it_moves_parts_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
):
    expected = split(shards, tmp_path / "whole", PARTS)
    rename, moved = os.rename, []

    def rename_some(source: Path, target: Path) -> None:
        if len(moved) == done:
            raise Killed
        moved.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(splitting.os, "rename", rename_some)
        patch.setattr(splitting.shutil, "rmtree", lambda *_, **__: None)
        if done < 3:
            with pytest.raises(Killed):
                split(shards, tmp_path / "out", PARTS)
        else:
            split(shards, tmp_path / "out", PARTS)  # killed before the work folder is removed
    assert (tmp_path / "out" / UNFINISHED).is_dir() and len(moved) == done
    before = {path: path.stat().st_mtime_ns for path in (target / MANIFEST for target in moved)}
    assert split(shards, tmp_path / "out", PARTS) == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / UNFINISHED).exists()
    assert before == {path: path.stat().st_mtime_ns for path in before}  # not made again
    assert list(split(shards, tmp_path / "out", PARTS)) == list(PARTS)  # all there


def test_parts_keep_the_limits_of_the_set(shards: Path, tmp_path: Path):
    totals = split(shards, tmp_path / "out", PARTS)
    for name, counts in totals.items():
        found = [entry["documents"] for entry in ShardSet.open(tmp_path / "out" / name).manifest["shards"]]
        whole, rest = divmod(counts["documents"], 30)  # --shard-documents of the set
        assert found == [30] * whole + [rest] * (rest > 0)


def test_parts_of_another_split_are_not_taken(shards: Path, tmp_path: Path):
    split(shards, tmp_path / "out", PARTS)
    shutil.rmtree(tmp_path / "out/test")
    for parts, by, seed in (
        (PARTS, "text", 1),
        (PARTS, "id", 0),
        ({"train": 0.5, "valid": 0.3, "test": 0.2}, "text", 0),
        ({"valid": 0.2, "train": 0.6, "test": 0.2}, "text", 0),
    ):
        with pytest.raises(UserError, match="is a part of another split"):
            split(shards, tmp_path / "out", parts, by, seed)
    with pytest.raises(UserError, match="is not empty"):
        split(shards, tmp_path / "out", {"other": 1.0})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "valid"]
    manifest = tmp_path / "out/valid" / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"documents"', b'"dokuments"', 1))
    with pytest.raises(UserError, match="is damaged"):
        split(shards, tmp_path / "out", PARTS)


def test_an_error_leaves_nothing(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="'few' would be empty"):
        split(shards, tmp_path / "out", {"many": 1 - 1e-10, "few": 1e-10})
    assert not (tmp_path / "out").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", full)
        with pytest.raises(OSError, match="No space"):
            split(shards, tmp_path / "out", PARTS)
    assert not (tmp_path / "out").exists()


def test_the_work_of_a_shard_run_is_left_alone(shards: Path, tmp_path: Path):
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "plan.json").write_bytes(b"{}")
    with pytest.raises(UserError, match="holds an unfinished run of `data-prep shard`"):
        split(shards, tmp_path, PARTS)
    assert (tmp_path / UNFINISHED / "plan.json").is_file()


def test_shares_and_seeds_of_any_size(shards: Path, tmp_path: Path):
    for text in ("a=1 b=1e-10", "b=1e-10 a=1"):
        with pytest.raises(UserError, match="'b' would be empty"):
            split(shards, tmp_path / "a", parse_parts(text.split()))
    found = []
    for seed in (10**20, -(10**20), 10**20 + 1):
        split(shards, tmp_path / str(seed), PARTS, seed=seed)
        assert verify(tmp_path / str(seed) / "train")["ok"]
        found.append({d.id for d in ShardSet.open(tmp_path / str(seed) / "train").documents()})
    assert found[0] != found[1] != found[2] != found[0]
    assert splitting._mix(5, 7) == splitting.hash64(bytes([5, *[0] * 7, 7, *[0] * 7]))  # as it always was
