"""Damaged input to `data-prep shard`: only verified text enters, and everything else is reported."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from helpers import tokenizer_folders
from helpers.data_prep_command import call, contents, refused
from helpers.paths import REPOSITORY
from helpers.reading import PACKERS, ZSTD, read

from data_prep.corpus.documents import RawDocument
from data_prep.shards.layout import INDEX_DTYPE, MARKED_DTYPE, read_index
from data_prep.shards.reader import ShardSet

packings = pytest.mark.parametrize("ending", [".gz", ".zst"])
BARE = zstandard.ZstdCompressor().compress  # without a checksum, as the Python package packs by default


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.byte_level(tmp_path_factory.mktemp("tokenizer") / "bytes")


def lines(*numbers: int) -> bytes:
    texts = {n: f"{n}: " + " ".join(f"{word * n % 977}" for word in range(99)) + "." for n in numbers}
    records = ({"id": str(n), "content": texts[n]} for n in numbers)
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def flipped(data: bytes, place: float = 0.5) -> bytes:
    """One bit of the data flipped so that the decoder fails."""
    at = int(len(data) * place)
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def ids(folder: Path) -> list[str]:
    return [document.id for document in ShardSet.open(folder).documents()]


def shard(folder: Path, output: Path, tokenizer: Path, *more: str) -> int:
    return call("shard", "--input", folder, "--output", output, "--tokenizer", tokenizer, *more)


@packings
def test_a_damaged_member_is_left_out_and_reported(
    tmp_path: Path, tokenizer: Path, ending: str, capsys: pytest.CaptureFixture
):
    members = [PACKERS[ending](lines(*range(n, n + 50))) for n in (0, 50, 100)]
    start, end = len(members[0]), len(members[0] + members[1])
    (tmp_path / "news").mkdir()
    path = tmp_path / f"news/x.jsonl{ending}"
    path.write_bytes(members[0] + flipped(members[1]) + members[2])
    (tmp_path / "news/y.jsonl").write_bytes(lines(*range(200, 230)))
    for workers in (1, 2):
        output = tmp_path / f"shards{workers}"
        more = "--unit-mb", "0.001", "--workers", str(workers)
        assert shard(tmp_path / "news", output, tokenizer, *more) == 3
        assert f"news/x.jsonl{ending}: " in capsys.readouterr().err
    assert contents(tmp_path / "shards1") == contents(tmp_path / "shards2")
    assert ids(output) == [str(n) for n in (*range(50), *range(100, 150), *range(200, 230))]
    manifest = ShardSet.open(output).manifest
    (damage,) = manifest["damaged"]
    assert (damage["file"], damage["offset"], damage["bytes"]) == (
        f"news/x.jsonl{ending}",
        start,
        end - start,
    )
    assert (manifest["rejected"], manifest["marked"]) == ({"damaged input": 1}, {})
    (line,) = (output / "quarantine.jsonl").read_text().splitlines()
    expected = {"file": f"news/x.jsonl{ending}", "offset": start, "line": 0, "reason": "damaged input"}
    assert json.loads(line) == expected
    assert call("verify", output, "--deep", "--input", tmp_path / "news") == 0
    # The same command finds the set, and says the same of it; `--strict` refuses both.
    assert shard(tmp_path / "news", output, tokenizer, "--unit-mb", "0.001") == 3
    more = "--unit-mb", "0.001", "--strict"
    for place in (output, tmp_path / "strict"):
        arguments = "--input", tmp_path / "news", "--output", place, "--tokenizer", tokenizer
        assert "--strict stops there" in refused(capsys, "shard", *arguments, *more)
    # A stopped strict run can be finished without it.
    assert shard(tmp_path / "news", tmp_path / "strict", tokenizer, "--unit-mb", "0.001") == 3
    assert contents(tmp_path / "strict") == contents(output)


@packings
def test_salvaged_documents_are_marked(
    tmp_path: Path, tokenizer: Path, ending: str, capsys: pytest.CaptureFixture
):
    members = [PACKERS[ending](lines(*range(n, n + 900))) for n in (0, 1000)]
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(flipped(members[0], 0.98) + members[1])
    assert shard(path, tmp_path / "shards", tokenizer, "--salvage") == 3
    assert "documents were salvaged" in capsys.readouterr().err
    found = {document.id: document.mark for document in ShardSet.open(tmp_path / "shards").documents()}
    marked = [key for key, mark in found.items() if mark == 2]
    assert len(marked) > 300 and [key for key in found if key not in marked] == [
        str(n) for n in range(1000, 1900)
    ]
    manifest = ShardSet.open(tmp_path / "shards").manifest
    assert manifest["marked"] == {"salvaged": len(marked)} and manifest["format_version"] == 4
    assert call("verify", tmp_path / "shards", "--deep", "--input", path) == 0
    # Marks go along into the parts of a split, and a wrong one is found.
    parts = "--parts", "a=0.5", "b=0.5"
    assert call("split", tmp_path / "shards", "--output", tmp_path / "parts", *parts) == 0
    counts = [ShardSet.open(tmp_path / "parts" / name).manifest["marked"]["salvaged"] for name in "ab"]
    assert sum(counts) == len(marked) and call("verify", tmp_path / "parts/a") == 0
    # Without the flag, these settings are others.
    arguments = "--input", path, "--output", tmp_path / "shards", "--tokenizer", tokenizer
    assert "other settings" in refused(capsys, "shard", *arguments)


def test_frames_without_a_checksum_are_marked_and_counted(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(ZSTD(lines(1, 2)) + BARE(lines(3, 4, 5)) + ZSTD(lines(6)))
    assert shard(path, tmp_path / "shards", tokenizer) == 0
    assert "3 documents from 1 file cannot be verified" in capsys.readouterr().err
    shards = ShardSet.open(tmp_path / "shards")
    assert [document.mark for document in shards.documents()] == [0, 0, 1, 1, 1, 0]
    assert shards.manifest["marked"] == {"unverified": 3} and shards.manifest["inputs"][0]["unverified"] == 1
    index = read_index(tmp_path / "shards/shard-000000.index.npy")
    assert index.dtype == MARKED_DTYPE
    assert call("verify", tmp_path / "shards", "--deep", "--input", path) == 0
    for command, said in (("stats", "3 documents are unverified"), ("show", "")):
        assert call(command, tmp_path / "shards") == 0 and said in capsys.readouterr().out
    assert call("show", tmp_path / "shards", "--id", "4") == 0 and ", unverified)" in capsys.readouterr().out
    for place in (tmp_path / "shards", tmp_path / "strict"):
        arguments = "--input", path, "--output", place, "--tokenizer", tokenizer, "--strict"
        assert "no checksum" in refused(capsys, "shard", *arguments)
    # With checksums, all but the marks is the same, and the index has the layout of earlier versions.
    path.write_bytes(ZSTD(lines(1, 2, 3, 4, 5, 6)))
    assert shard(path, tmp_path / "checked", tokenizer, "--strict") == 0
    assert (tmp_path / "checked/shard-000000.tar").read_bytes() == (
        tmp_path / "shards/shard-000000.tar"
    ).read_bytes()
    checked = read_index(tmp_path / "checked/shard-000000.index.npy")
    assert (
        checked.dtype == INDEX_DTYPE and ShardSet.open(tmp_path / "checked").manifest["format_version"] == 3
    )
    assert all(np.array_equal(checked[name], index[name]) for name in INDEX_DTYPE.names)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.jsonl.gz", lines(1), "not gzip data but plain text: give it the name"),
        ("x.jsonl.zst", gzip.compress(lines(1), mtime=0), "not zstd data but gzip data: give it the name"),
        ("x.jsonl", gzip.compress(lines(1), mtime=0), "not text but gzip data: give it the name"),
        ("x.txt", ZSTD(b"words"), "not text but zstd data: give it the name"),
        ("x.tar", gzip.compress(lines(1), mtime=0), "not a tar archive but gzip data: give it the name"),
        ("x.tar.gz", gzip.compress(lines(1), mtime=0), "not a tar archive but plain text: give it the name"),
        ("x.jsonl.gz", b"", "the file is empty, which no gzip file is"),
        ("x.jsonl.zst", b"", "the file is empty, which no zstd file is"),
        ("x.tar", b"", "not a tar archive but empty"),
        ("x.jsonl.zst", ZSTD(lines(1))[:-1] + b"\0", "the checksum of a zstd member differs"),
        (
            "x.jsonl.gz",
            gzip.compress(lines(1), mtime=0)[:-8] + bytes(8),
            "the checksum of a gzip member differs",
        ),
        ("x.jsonl.gz", gzip.compress(lines(1), mtime=0)[:-9], "the gzip file ends too early"),
        ("x.txt.gz", flipped(gzip.compress(b"words " * 99, mtime=0)), "gzip"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "the files are empty"),
    ],
)
def test_the_only_file_holds_nothing_to_use(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture, name: str, data: bytes, said: str
):
    (tmp_path / name).write_bytes(data)
    arguments = "--input", tmp_path / name, "--output", tmp_path / "shards", "--tokenizer", tokenizer
    line = refused(capsys, "shard", *arguments)
    assert said in line and ("empty" in said) == ("empty" in line)
    assert ("--salvage" in line) == (name != "x.jsonl.gz" or "the files are empty" not in said)
    assert not (tmp_path / "shards").exists()


def test_a_copy_in_a_damaged_member_is_no_duplicate(tmp_path: Path, tokenizer: Path):
    (tmp_path / "in").mkdir()
    stored = gzip.compress(lines(*range(300)), mtime=0)
    (tmp_path / "in/a.jsonl.gz").write_bytes(flipped(stored, 0.9))
    (tmp_path / "in/b.jsonl").write_bytes(lines(5, 6, 5))
    assert shard(tmp_path / "in", tmp_path / "shards", tokenizer, "--deduplicate") == 3
    assert ids(tmp_path / "shards") == ["5", "6"]
    manifest = ShardSet.open(tmp_path / "shards").manifest
    assert manifest["rejected"] == {"damaged input": 1, "duplicate": 1}
    assert call("verify", tmp_path / "shards", "--deep", "--input", tmp_path / "in") == 0


def test_max_rejected(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(*range(8)) + b"{}\nbroken\n")
    arguments = "--input", path, "--tokenizer", tokenizer
    line = refused(capsys, "shard", *arguments, "--output", tmp_path / "no", "--max-rejected", "0.1")
    assert "2 of 10 records are rejected (1 × invalid JSON, 1 × no content)" in line
    assert shard(path, tmp_path / "yes", tokenizer, "--max-rejected", "0.2") == 0
    assert shard(path, tmp_path / "no", tokenizer, "--max-rejected", "0.3") == 0
    line = refused(capsys, "shard", *arguments, "--output", tmp_path / "yes", "--max-rejected", "0.1")
    assert "2 of 10" in line
    # What a filter leaves out was not wanted, and does not count.
    path.write_bytes(lines(*range(8)) + b'{"content": "short"}\n')
    more = "--min-chars", "150", "--max-rejected", "0"
    assert shard(path, tmp_path / "filtered", tokenizer, *more) == 0
    # Garbage of a damaged member is left out before the share is judged.
    (tmp_path / "t").mkdir()
    garbage = b"\n".join(random.Random(n).randbytes(300).hex().encode() for n in range(3000))
    (tmp_path / "t/x.jsonl.zst").write_bytes(ZSTD(garbage)[:-1] + b"\0")
    (tmp_path / "t/y.jsonl").write_bytes(lines(*range(100)))
    assert shard(tmp_path / "t", tmp_path / "torn", tokenizer, "--max-rejected", "0.01") == 3
    # It stops long before the end of the unit.
    path.write_bytes(b"{}\n" * 1_000_000)
    line = refused(capsys, "shard", *arguments, "--output", tmp_path / "early", "--max-rejected", "0.5")
    assert "1,000 of 1,000 records are rejected" in line
    assert "Must be <= 1" in refused(capsys, "shard", *arguments, "--output", tmp_path, "--max-rejected", "2")


def test_strict_and_salvage_exclude_each_other(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture
):
    arguments = "--input", tmp_path, "--output", tmp_path / "shards", "--tokenizer", tokenizer
    assert "give one of them" in refused(capsys, "shard", *arguments, "--strict", "--salvage")


@packings
@pytest.mark.parametrize("flips", [60, pytest.param(500, marks=pytest.mark.long)])
def test_no_altered_document_enters(tmp_path: Path, ending: str, flips: int):
    """Single-bit flips anywhere in a packed file of real text."""
    data = gzip.decompress((REPOSITORY / "tests/data/golden/corpus/train.jsonl.gz").read_bytes())
    good = {(item.id, item.content) for item in read(tmp_path / "plain.jsonl", data)[0]}
    members = data.splitlines(keepends=True)
    middle = len(members) // 2
    whole = b"".join(PACKERS[ending](b"".join(part)) for part in (members[:middle], members[middle:]))
    chance = random.Random(zlib.crc32(ending.encode()))
    kept = unharmed = 0
    for _ in range(flips):
        torn = bytearray(whole)
        torn[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        items, reader = read(tmp_path / f"x.jsonl{ending}", bytes(torn))
        assert {(item.id, item.content) for item in items if isinstance(item, RawDocument)} <= good
        assert len(items) == len(good) or reader.damage
        kept += len(items)
        unharmed += not reader.damage
    assert unharmed < flips * 0.1 and kept > flips * len(good) * 0.3
