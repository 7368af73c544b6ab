"""Shards hold documents exactly, for us and for plain webdataset, and betray any change."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from helpers import tokenizer_folders

from data_prep.common.errors import UserError
from data_prep.common.files import file_sha256, json_bytes
from data_prep.jobs.job import ShardSettings
from data_prep.jobs.run import make_shards
from data_prep.shards.layout import (
    COMPRESSIONS,
    INDEX_DTYPE,
    Document,
    hash64,
    npy_bytes,
    seal_manifest,
    tar_members,
    token_dtype,
    unpack_zstd,
)
from data_prep.shards.reader import Shard, ShardSet, zstd_handler
from data_prep.shards.verify import verify, verify_deep
from data_prep.shards.writer import ShardSeries, ShardWriter
from data_prep.text.segmenter import get_segmenter
from data_prep.text.sentences import SentenceSettings, cut_document
from data_prep.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": tokenizer_folders.byte_level(folder / "bytes"),
        "sentencepiece": tokenizer_folders.sentence_piece(folder / "pieces"),
    }


# Shards ------------------------------------------------------------------------------------------------


def made_documents(count: int, vocab_size: int, seed: int = 0) -> list[Document]:
    random = np.random.default_rng(seed)
    documents = []
    for n in range(count):
        lengths = random.integers(1, 9, size=random.integers(1, 12)).astype(np.uint16)
        tokens = random.integers(0, vocab_size, size=lengths.sum()).astype(np.uint32)
        documents.append(Document(f"id-{n}-é", "en", "books", tokens, lengths, n + 5, hash64(b"%d" % n)))
    return documents


def write(
    folder: Path, documents: list[Document], vocab_size: int, compression: str = "none"
) -> tuple[Path, Path, dict]:
    tar, index = folder / "shard-000000.tar", folder / "shard-000000.index.npy"
    writer = ShardWriter(tar, index, token_dtype(vocab_size), compression)
    for document in documents:
        writer.add(document)
    return tar, index, writer.close()


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("vocab_size", [300, 1 << 16, (1 << 16) + 1, 250_000])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, compression: str):
    documents = made_documents(600, vocab_size)
    tar, index, entry = write(tmp_path, documents, vocab_size, compression)
    assert entry["documents"] == 600
    assert entry["tokens"] == sum(d.tokens.size for d in documents)
    assert entry["sentences"] == sum(d.sentence_lengths.size for d in documents)
    assert entry["bytes"] == sum(d.bytes for d in documents)
    assert entry["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()
    shard = Shard(tar, index, token_dtype(vocab_size), compression)
    assert shard.index.dtype == INDEX_DTYPE and len(shard) == 600
    assert shard.tokens(0).dtype == (np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    for n in (599, 0, 255, 256, 300, 511, 512):
        read = shard.document(n)
        assert (read.id, read.language, read.source, read.bytes) == (f"id-{n}-é", "en", "books", n + 5)
        assert read.text_hash == hash64(b"%d" % n) == int(shard.index["text_hash"][n])
        assert np.array_equal(read.tokens, documents[n].tokens)
        assert np.array_equal(read.sentence_lengths, documents[n].sentence_lengths)
        assert np.array_equal(np.concatenate(read.sentences()), documents[n].tokens)
        assert [s.size for s in read.sentences()] == documents[n].sentence_lengths.tolist()
    for rows in ([], [7], [0, 1, 2, 9, 254, 255, 256, 257, 599], list(range(600))):
        several = [documents[n].sentence_lengths for n in rows]
        read = shard.sentence_lengths_of(np.asarray(rows, dtype=np.int64))
        assert read.dtype == np.uint16 and np.array_equal(read, np.concatenate([*several, []]))
    assert not shard.tokens(3).flags.owndata and not shard.tokens(3).flags.writeable
    if compression == "none":
        assert np.shares_memory(shard.tokens(3), shard.tokens(3))  # a view of the file


def test_the_same_documents_give_the_same_bytes(tmp_path: Path):
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tar, index, _ = write(tmp_path / name, made_documents(300, 500), 500)
        hashes.append((file_sha256(tar), file_sha256(index)))
    assert hashes[0] == hashes[1]
    with tarfile.open(tar) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [index.name, tar.name]  # nothing partial


def test_large_documents_make_small_groups(tmp_path: Path):
    lengths = np.full(3000, 50, np.uint16)
    tokens = np.arange(150_000, dtype=np.uint32) % 500
    documents = [Document(str(n), "en", "x", tokens, lengths, 1, n) for n in range(5)]
    tar, index, _ = write(tmp_path, documents, 500)
    assert Shard(tar, index, token_dtype(500)).index["group"].tolist() == [0, 0, 1, 1, 2]  # 306 kB each


@pytest.mark.parametrize(("vocab_size", "in_each"), [(500, [5, 4]), (1 << 17, [3, 3, 3])])
def test_a_shard_is_full_by_the_bytes_that_are_stored(tmp_path: Path, vocab_size: int, in_each: list[int]):
    series = ShardSeries(tmp_path / "shard-", 6, token_dtype(vocab_size), "none", 10_000, 0)
    for n in range(9):  # 1,000 tokens of 2 or 4 bytes, 10 lengths of 2
        tokens, lengths = np.zeros(1000, np.uint32), np.full(10, 100, np.uint16)
        series.add(Document(str(n), "en", "x", tokens, lengths, 1, n))
    series.close()
    assert [entry["documents"] for entry in series.entries] == in_each


def test_a_bit_that_changes_in_a_compressed_member_gives_no_other_text(tmp_path: Path):
    documents = made_documents(20, 500)
    tar, index, _ = write(tmp_path, documents, 500, "zstd")
    member = next(member for member in tar_members(tar) if "documents.json" in member.name)
    for at in range(member.data_at, member.data_at + member.size):
        whole = tar.read_bytes()
        flip(tar, at)
        shard = Shard(tar, index, token_dtype(500), "zstd")
        try:
            assert [shard.document(n).id for n in range(20)] == [document.id for document in documents], at
        except UserError as error:
            assert "000000.documents.json.zst is damaged" in str(error)
        tar.write_bytes(whole)


def test_lengths_that_change_places_are_noticed(tmp_path: Path):
    lengths = np.array([3, 5, 2], np.uint16)
    document = Document("a", "en", "x", np.arange(10, dtype=np.uint32), lengths, 1, 1)
    tar, index, _ = write(tmp_path, [document], 500)
    at = int(np.load(index)["sentences_at"][0])
    data = bytearray(tar.read_bytes())
    data[at : at + 4] = data[at + 2 : at + 4] + data[at : at + 2]  # the sum stays
    tar.write_bytes(data)
    with pytest.raises(UserError, match="document 0 is damaged"):
        Shard(tar, index, token_dtype(500)).sentence_lengths(0)


def test_a_writer_that_is_not_closed_leaves_no_shard(tmp_path: Path):
    writer = ShardWriter(tmp_path / "s.tar", tmp_path / "s.index.npy", token_dtype(500))
    for document in made_documents(300, 500):
        writer.add(document)
    assert not (tmp_path / "s.tar").exists() and not (tmp_path / "s.index.npy").exists()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_plain_webdataset_reads_shards(tmp_path: Path, compression: str):
    documents = made_documents(300, 500)
    tar, _, _ = write(tmp_path, documents, 500, compression)
    pre = None if compression == "none" else [zstd_handler]
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode(pre=pre))
    samples = [{key.removesuffix(".zst"): value for key, value in sample.items()} for sample in samples]
    assert [sample["__key__"] for sample in samples] == ["000000", "000001"]
    tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
    assert np.array_equal(tokens, np.concatenate([d.tokens for d in documents]))
    lengths = np.concatenate([sample["sentence_lengths.npy"] for sample in samples])
    assert np.array_equal(lengths, np.concatenate([d.sentence_lengths for d in documents]))
    sizes = np.concatenate([sample["document_sizes.npy"] for sample in samples])
    assert sizes.tolist() == [d.sentence_lengths.size for d in documents]
    facts = [fact for sample in samples for fact in sample["documents.json"]]
    assert [fact["id"] for fact in facts] == [d.id for d in documents]


# Sets of shards ----------------------------------------------------------------------------------------


def write_corpus(folder: Path, files: int = 3, documents: int = 12) -> Path:
    folder.mkdir(parents=True)
    for number in range(files):
        with open(folder / f"part-{number:06d}.jsonl", "w", encoding="utf-8") as out:
            for n in range(documents):
                text = (
                    tokenizer_folders.ENGLISH * (1 + n % 3)
                    + f"Document {number}/{n}.\n"
                    + tokenizer_folders.CHINESE
                )
                out.write(json.dumps({"id": f"{number}-{n}", "content": text}) + "\n")
    return folder


@pytest.fixture(params=COMPRESSIONS)
def shard_set(request: pytest.FixtureRequest, tmp_path: Path, folders: dict[str, Path]) -> Path:
    corpus = write_corpus(tmp_path / "corpus" / "EN")
    output = tmp_path / "shards"
    settings = ShardSettings(
        SentenceSettings("clause", "auto", 64), shard_documents=7, compression=request.param
    )
    make_shards([corpus], output, folders["sentencepiece"], settings)
    return output


def test_a_set_reads_back_every_document(shard_set: Path, tmp_path: Path):
    shards = ShardSet.open(shard_set)
    assert len(shards) == 6  # 7 documents each, and one
    assert shards.settings == SentenceSettings("clause", "auto", 64)
    assert shards.manifest["totals"]["documents"] == 36
    tokenizer = shards.tokenizer()
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "corpus/EN").iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    documents = list(shards.documents())
    assert [d.id for d in documents] == [line["id"] for line in lines]
    assert [tokenizer.decode(d.tokens) for d in documents] == [line["content"] for line in lines]
    assert {(d.language, d.source) for d in documents} == {("en", "EN")}
    segmenter = get_segmenter("clause", "auto")
    for document, line in zip(documents, lines, strict=True):
        assert document.bytes == len(line["content"].encode())
        assert document.text_hash == hash64(line["content"].encode())
        cut = cut_document(line["content"], tokenizer, segmenter, 64)
        assert np.array_equal(cut[1], document.sentence_lengths)


def test_few_files_stay_open(shard_set: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_prep.shards.reader.OPEN_SHARDS", 2)
    shards = ShardSet.open(shard_set)
    views = [shards.shard(i).tokens(0) for i in range(len(shards))]
    assert len(shards._open) == 2
    assert all(view.sum() > 0 for view in views)  # closed shards leave their views alive
    assert shards.shard(0) is shards.shard(0)


def test_documents_by_number_and_by_key(shard_set: Path):
    shards = ShardSet.open(shard_set)
    every = list(shards.documents())
    for number in (35, 0, 6, 7, 20):
        for document in (shards.document(number), shards.find(every[number].id)):
            assert document.id == every[number].id
            assert np.array_equal(document.tokens, every[number].tokens)
    for number in (-1, 36):
        with pytest.raises(UserError, match="has documents 0 to 35"):
            shards.document(number)
    with pytest.raises(UserError, match="holds no document with the id 'x'"):
        shards.find("x")


def test_documents_of_one_id_are_found_in_their_order(tmp_path: Path, folders: dict[str, Path]):
    lines = [json.dumps({"id": "ab"[n % 2], "content": f"Text {n}."}) for n in range(60)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    settings = ShardSettings(SentenceSettings("clause", "en", 64), shard_documents=25)
    make_shards([tmp_path / "x.jsonl"], tmp_path / "set", folders["byte-level"], settings)
    shards = ShardSet.open(tmp_path / "set")
    tokenizer = shards.tokenizer()
    assert [tokenizer.decode(found.tokens) for found in shards.find_all("b")] == [
        f"Text {n}." for n in range(1, 60, 2)
    ]
    assert tokenizer.decode(shards.find("a").tokens) == "Text 0."


def test_a_key_hash_shared_by_two_ids_is_told_apart(shard_set: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_prep.shards.reader.hash64", lambda data: 7)
    shards = ShardSet.open(shard_set)
    shards._keys = np.full(36, 7, np.uint64), np.arange(36)
    assert shards.find("2-3").id == "2-3"
    with pytest.raises(UserError, match="no document with the id"):
        shards.find("2-99")


def test_verify_is_content(shard_set: Path, tmp_path: Path):
    result = verify(shard_set)
    assert result["ok"] and result["shards"] == 6 and result["documents"] == 36
    assert verify_deep(shard_set) == {"decoded": 36, "compared": 0}
    assert verify_deep(shard_set, [tmp_path / "corpus/EN"]) == {"decoded": 36, "compared": 36}


def test_deep_verification_finds_another_input(shard_set: Path, tmp_path: Path):
    path = tmp_path / "corpus/EN/part-000001.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for changed, said in (
        ([lines[1], lines[0], *lines[2:]], "not in the input, or not in this place"),
        ([*lines[:-1], lines[-1].replace("1/11.", "1/12.")], "not in the input, or not in this place"),
        ([*lines[:-1], "x" + lines[-1][1:]], "has 35 good documents, the shards explain 36"),
        (lines[1:], "made from other files"),
    ):
        path.write_text("".join(changed), encoding="utf-8")
        with pytest.raises(UserError, match=said):
            verify_deep(shard_set, [tmp_path / "corpus/EN"])
    with pytest.raises(UserError, match="made from other files"):
        verify_deep(shard_set, [path])


def test_deep_verification_finds_documents_that_are_not_in_the_set(tmp_path: Path, folders: dict[str, Path]):
    first, more, last = (json.dumps({"id": str(n), "content": f"Text {n}."}) + "\n" for n in range(3))
    path = tmp_path / "x.jsonl"
    path.write_text(first + " " * (len(more) - 1) + "\n" + last)
    settings = ShardSettings(SentenceSettings("clause", "en", 64))
    make_shards([path], tmp_path / "set", folders["byte-level"], settings)
    assert verify_deep(tmp_path / "set", [path])["compared"] == 2
    path.write_text(first + more + last)  # of the same size
    with pytest.raises(UserError, match="the input has 3 good documents, the shards explain 2"):
        verify_deep(tmp_path / "set", [path])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "shard-000002.tar",
        "shard-000002.index.npy",
        "tokenizer/tokenizer.model",
        "tokenizer/tokenizer_config.json",
        "quarantine.jsonl",
    ],
)
def test_verify_finds_a_changed_a_missing_and_a_cut_file(shard_set: Path, name: str):
    path = shard_set / name
    whole = path.read_bytes()
    if whole:
        for at in (len(whole) // 3, len(whole) - 40):
            flip(path, at)
            with pytest.raises(UserError, match=name):
                verify(shard_set)
            path.write_bytes(whole)
        for size in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError, match=name):
                verify(shard_set)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=name):
        verify(shard_set)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing|holds no {name}"):
        verify(shard_set)


def test_verify_finds_a_foreign_file(shard_set: Path):
    (shard_set / "shard-000006.tar").write_bytes(b"")
    with pytest.raises(UserError, match="shard-000006.tar does not belong"):
        verify(shard_set)


def reseal(folder: Path, number: int) -> None:
    """Give the manifest the hashes of a shard that was altered, so that only its content can betray it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    entry = manifest["shards"][number]
    entry["sha256"] = file_sha256(folder / entry["file"])
    entry["index_sha256"] = file_sha256(folder / entry["index"])
    (folder / "manifest.json").write_bytes(json_bytes(seal_manifest(manifest)))


def test_verify_names_the_input_to_read_again(shard_set: Path):
    (shard_set / "shard-000002.tar").unlink()
    said = "made from EN/part-000000.jsonl, EN/part-000001.jsonl, EN/part-000002.jsonl: "
    with pytest.raises(UserError, match=said + "run the same"):
        verify(shard_set)
    whole = (shard_set / "shard-000001.tar").read_bytes()
    for data in (whole[:1000], b"x" + whole[1:], whole[:600] + b"x" + whole[601:], whole + b"x"):
        (shard_set / "shard-000001.tar").write_bytes(data)
        (shard_set / "shard-000002.tar").write_bytes(whole)  # only so that it is there
        with pytest.raises(UserError, match=f"shard-000001.*{said}delete it and run the same"):
            verify(shard_set)


@pytest.mark.parametrize("field", INDEX_DTYPE.names)
def test_verify_compares_index_and_tar(shard_set: Path, field: str):
    path = shard_set / "shard-000001.index.npy"
    index = np.load(path)
    index[field][2] += 2 if field.endswith("_at") else 1
    path.write_bytes(npy_bytes(index))
    reseal(shard_set, 1)
    if field == "text_hash":  # only the text itself can tell
        with pytest.raises(UserError, match="do not give the text"):
            verify_deep(shard_set)
    else:
        with pytest.raises(UserError, match="shard-000001"):
            verify(shard_set)


def rewrite(path: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    """Pass every member of a tar through `change`."""
    with tarfile.open(path) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w") as archive:
        for name, data in (change(*member) for member in members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_verify_finds_a_token_outside_the_vocabulary(shard_set: Path):
    def change(name: str, data: bytes) -> tuple[str, bytes]:
        if name.endswith("tokens.npy"):
            return name, data[:-2] + b"\xff\xff"
        if name.endswith("tokens.npy.zst"):
            return name, zstandard.compress(unpack_zstd(data)[:-2] + b"\xff\xff")
        return name, data

    rewrite(shard_set / "shard-000000.tar", change)
    reseal(shard_set, 0)
    with pytest.raises(UserError, match="shard-000000.tar: a token id lies outside"):
        verify(shard_set)


@pytest.mark.parametrize(
    "foreign", ["../000000.tokens.npy", "/etc/x", "000000.tokens.pyd", "000007.tokens.npy"]
)
def test_members_with_other_names_are_refused(shard_set: Path, foreign: str):
    def change(name: str, data: bytes) -> tuple[str, bytes]:
        return (foreign if name.startswith("000000.tokens.npy") else name), data

    rewrite(shard_set / "shard-000000.tar", change)
    with pytest.raises(UserError, match="shard-000000.tar holds"):
        tar_members(shard_set / "shard-000000.tar")


def test_links_in_a_tar_are_refused(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("000000.tokens.npy")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UserError, match="foreign member"):
        tar_members(tmp_path / "x.tar")


def test_reading_a_truncated_shard_is_one_clear_line(shard_set: Path):
    path = shard_set / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="shard-000000.tar is cut short"):
        ShardSet.open(shard_set).shard(0).document(5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 5}, "newer than 4"),
        ({"format_version": 2}, "format version 2, not 3: make the shards again"),
        ({"format_version": "x"}, "format version 'x', not 3"),
        ({"totals": {}}, "is damaged"),
        ({"settings": {}}, "not a shard manifest"),
        ({"shards": [{"file": "../x.tar", "index": "y.npy"}]}, "not a plain name"),
    ],
)
def test_manifests_that_cannot_be_used(shard_set: Path, change: dict, said: str):
    manifest = json.loads((shard_set / "manifest.json").read_bytes())
    changed = manifest | change
    (shard_set / "manifest.json").write_bytes(
        json_bytes(changed if "totals" in change else seal_manifest(changed))
    )
    with pytest.raises(UserError, match=said):
        ShardSet.open(shard_set)


def test_folders_that_hold_no_shards(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no manifest.json"):
        ShardSet.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not a shard manifest"):
        ShardSet.open(tmp_path)


def test_another_tokenizer_is_noticed(shard_set: Path, folders: dict[str, Path]):
    load_tokenizer(folders["byte-level"]).save(shard_set / "tokenizer")
    with pytest.raises(UserError, match="not the tokenizer that made"):
        ShardSet.open(shard_set).tokenizer()
