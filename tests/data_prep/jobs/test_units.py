"""What a set keeps of its units: marks, places in the input, a fingerprint; and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import zstandard
from helpers import tokenizer_folders
from helpers.data_prep_command import call, refused

from data_prep.corpus.compression import CONTAMINATED, UNVERIFIED
from data_prep.jobs import units
from data_prep.jobs.run import _array_share
from data_prep.shards.reader import ShardSet

TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.byte_level(tmp_path_factory.mktemp("tokenizer") / "bytes")


def write(path: Path, *texts: str) -> Path:
    path.write_text(
        "".join(json.dumps({"id": str(n), "content": text}) + "\n" for n, text in enumerate(texts))
    )
    return path


def words(corpus: Path, output: Path, tokenizer: Path, *more: str | Path) -> tuple[str | Path, ...]:
    return ("shard", "--input", corpus, "--output", output, "--tokenizer", tokenizer, *more)


def test_input_that_changes_between_the_passes_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    corpus = write(tmp_path / "x.jsonl", "First.", "Other.", "First.")
    real = units.find_duplicates

    def find_and_change(*arguments: object) -> None:
        real(*arguments)
        write(corpus, "First.", "First.", "Other.")  # the numbers of duplicates are of the old order

    monkeypatch.setattr(units, "find_duplicates", find_and_change)
    said = refused(capsys, *words(corpus, tmp_path / "s", tokenizer, "--deduplicate"))
    assert "x.jsonl: changed while it was read; delete" in said


def test_a_document_keeps_all_its_marks(tmp_path: Path, tokenizer: Path):
    corpus = write(tmp_path / "x.jsonl", f"It says {TEXT}.", "Something else.")
    packed = tmp_path / "x.jsonl.zst"
    packed.write_bytes(zstandard.ZstdCompressor(write_checksum=False).compress(corpus.read_bytes()))
    held_out = write(tmp_path / "test.jsonl", f"A text: {TEXT}.")
    more = ("--decontaminate", held_out, "--mark-contaminated")
    assert call(*words(packed, tmp_path / "s", tokenizer, *more)) == 0
    marks = [document.mark for document in ShardSet.open(tmp_path / "s").documents()]
    assert marks == [UNVERIFIED | CONTAMINATED, UNVERIFIED]


def test_the_fingerprint_is_of_the_texts(tmp_path: Path, tokenizer: Path):
    found = []
    for n in range(2):
        corpus = write(tmp_path / "x.jsonl", f"Text {n}.")  # of one name and size
        assert call(*words(corpus, tmp_path / str(n), tokenizer)) == 0
        found.append(ShardSet.open(tmp_path / str(n)))
    assert found[0].fingerprint != found[1].fingerprint
    assert found[0].manifest["settings_fingerprint"] == found[1].manifest["settings_fingerprint"]


def test_a_set_is_not_mended_from_other_input(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture):
    corpus = write(tmp_path / "x.jsonl", "Text 1.", "Text 2.")
    arguments = words(corpus, tmp_path / "s", tokenizer)
    assert call(*arguments) == 0
    (shard,) = (tmp_path / "s").glob("*.tar")
    shard.unlink()
    write(corpus, "Text 1.", "Text 3.")
    assert "its input gives other shards now" in refused(capsys, *arguments)
    write(corpus, "Text 1.", "Text 2.")
    os.utime(corpus, ns=(5, 5))
    assert call(*arguments) == 0 and shard.is_file()


def test_lines_of_a_file_in_pieces_are_counted_from_its_start(tmp_path: Path, tokenizer: Path):
    lines = [json.dumps({"id": str(n), "content": "Text. " * 50}) if n % 5 else "{" for n in range(200)]
    corpus = tmp_path / "x.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    assert call(*words(corpus, tmp_path / "s", tokenizer, "--unit-mb", "0.01")) == 0
    (entry,) = ShardSet.open(tmp_path / "s").manifest["inputs"]
    assert len(entry["pieces"]) >= 4
    quarantine = (tmp_path / "s/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in quarantine] == list(range(1, 201, 5))


@pytest.mark.parametrize(("first", "last", "step"), [(0, 15, 1), (3, 9, 2), (10, 40, 10)])
def test_the_tasks_of_an_array_share_the_work_without_a_gap(
    first: int, last: int, step: int, monkeypatch: pytest.MonkeyPatch
):
    tasks = range(first, last + 1, step)
    shares = []
    for task in tasks:
        array = {"ID": task, "MIN": first, "MAX": last, "STEP": step, "COUNT": len(tasks)}
        for key, value in array.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", str(value))
        shares.append(_array_share())
    assert shares == [(number, len(tasks)) for number in range(len(tasks))]
