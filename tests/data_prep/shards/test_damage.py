"""A byte that changes in a shard set is noticed before anything is computed with it."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.data_prep_command import data_prep

from data_prep.common.errors import UserError
from data_prep.shards.layout import COMPRESSIONS, _npy_array, tar_members
from data_prep.shards.reader import ShardSet
from data_prep.shards.verify import verify
from pipeline.data.batch import build_batch
from pipeline.data.plan import BinPlan

FLIPS = 200


@pytest.fixture(scope="module", params=COMPRESSIONS)
def shards(
    request: pytest.FixtureRequest,
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Three shards, documents of one window and of several, and a line in the quarantine."""
    folder = tmp_path_factory.mktemp("damage")
    with open(tiny_corpus / "train.jsonl", encoding="utf-8") as lines:
        (folder / "part.jsonl").write_text("".join(itertools.islice(lines, 50)) + "{\n", encoding="utf-8")
    settings = ["--tokenizer", tiny_tokenizer, "--segmenter", "clause", "--lang", "en", "--workers", "1"]
    settings += ["--shard-documents", "20", "--compression", request.param]
    data_prep("shard", "--input", folder / "part.jsonl", "--output", folder / "shards", *settings)
    return folder / "shards"


def read_as_training_does(folder: Path) -> list[int]:
    """The digests of an epoch's batches. Raises UserError."""
    shard_set = ShardSet.open(folder)
    shard_set.tokenizer()
    plan = BinPlan([shard_set], 256, 1024, seed=1)
    return [build_batch(plan.spans(bin_)).digest() for bin_ in plan.epoch()]


def places(folder: Path, rng: np.random.Generator) -> Iterator[tuple[Path, int, bool]]:
    """Files and bytes to change, and whether training reads them: every kind of file equally often."""
    tokenizer = sorted((folder / "tokenizer").iterdir())
    tars, indexes = sorted(folder.glob("*.tar")), sorted(folder.glob("*.index.npy"))
    read_bytes = {tar: bytes_that_are_read(folder, number) for number, tar in enumerate(tars)}
    kinds = [[folder / "manifest.json"], tokenizer, indexes, tars, [folder / "quarantine.jsonl"]]
    for n in range(FLIPS):
        files = kinds[n % len(kinds)]
        path = files[rng.integers(len(files))]
        at = int(rng.integers(path.stat().st_size))
        yield path, at, bool(read_bytes[path][at]) if path in read_bytes else path.name != "quarantine.jsonl"


def bytes_that_are_read(folder: Path, number: int) -> np.ndarray:
    """bool [bytes of the tar]: not ids and padding; without compression, not the tar's headers either."""
    shard_set = ShardSet.open(folder)
    shard = shard_set.shard(number)
    read = np.zeros(shard.path.stat().st_size, bool)
    if shard_set.compression == "none":
        for row in shard.index:
            for at, size in (("tokens_at", 2 * row["tokens"]), ("sentences_at", 2 * row["sentences"])):
                read[int(row[at]) : int(row[at]) + int(size)] = True
    else:
        for member in tar_members(shard.path):
            read[member.data_at - 512 : member.data_at] = True
            if "tokens" in member.name or "lengths" in member.name:
                read[member.data_at : member.data_at + member.size] = True
        read[member.data_at + -(-member.size // 512) * 512 :][:512] = True  # the end's first block
    return read


def test_every_changed_byte_is_noticed(shards: Path) -> None:
    rng = np.random.default_rng(5)
    good = read_as_training_does(shards)
    noticed = 0
    for path, at, is_read in places(shards, rng):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[at] ^= rng.integers(1, 256)
        path.write_bytes(data)
        try:
            if is_read:
                with pytest.raises(UserError) as refused:
                    read_as_training_does(shards)
                message = str(refused.value)
                assert (path.name in message or "/tokenizer" in message) and "\n" not in message
                noticed += 1
            else:  # training reads what it would have read
                assert read_as_training_does(shards) == good, f"{path.name}, byte {at}"
                with pytest.raises(UserError):
                    verify(shards)
        finally:
            path.write_bytes(whole)
    assert 0.6 * FLIPS < noticed < 0.8 * FLIPS + 1
    verify(shards)


def test_a_document_is_checked_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.shards import reader as module

    checked = []
    real = module._checksum
    monkeypatch.setattr(module, "_checksum", lambda *arrays: checked.append(1) or real(*arrays))
    plan = BinPlan([ShardSet.open(shards)], 256, 1024, seed=1)
    bins = [bin_ for epoch in range(2) for bin_ in plan.epoch(epoch)]
    for bin_ in bins:
        plan.spans(bin_)
    assert len(checked) == 50 < sum(len(bin_.windows) for bin_ in bins) // 2


def test_the_quarantine_is_what_training_does_not_need(shards: Path) -> None:
    good = read_as_training_does(shards)
    path = shards / "quarantine.jsonl"
    whole = path.read_bytes()
    assert whole
    path.unlink()
    assert read_as_training_does(shards) == good
    path.write_bytes(whole)


def test_an_array_is_as_long_as_its_header_says() -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.arange(3), version=(1, 0))
    data = stream.getvalue()
    assert _npy_array(data).tolist() == [0, 1, 2]
    for damaged in (data[:-1], data + b"\0", data + bytes(8)):
        with pytest.raises(ValueError, match="another size or kind than its header says"):
            _npy_array(damaged)
