"""Reading inputs of every kind: one bad record costs one record, told by its reason and line, and pieces of a
file give exactly what the file gives."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpus_lines import bad_line, good_line
from helpers.reading import GOOD, PACKERS, read

from data_prep.common.errors import UserError
from data_prep.corpus import documents
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject
from data_prep.corpus.filters import Filters
from data_prep.corpus.inputs import Piece, find_inputs, split, whole

# Lines --------------------------------------------------------------------------------------------------


def test_good_records(tmp_path: Path):
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\n" + b'{"id": 7, "content": "Two\\n"}'
    items, reader = read(tmp_path / "books/x.jsonl", data)
    assert items == [
        RawDocument("a", "One two. 二", "en", "books", 1),
        RawDocument("7", "Two\n", "en", "books", 3),
    ]
    assert reader.file.name == "books/x.jsonl"
    assert reader.sha256 == reader.piece.sha256() == hashlib.sha256(data).hexdigest()
    assert (reader.bytes_read, reader.lines, reader.damage) == (len(data), 3, [])
    assert not reader.repaired


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "a", "content": "\xff"}', "undecodable bytes"),
        (b"{'id'}", "invalid JSON"),
        (b'{"id": "a", "content": "cut', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"content": "x", "a": ' + b"[" * 200 + b"]" * 200 + b"}", "invalid JSON"),
        (b'["content"]', "not an object"),
        (b'"content"', "not an object"),
        (b"3", "not an object"),
        (b'{"id": "a", "q_type": "?"}', "no content"),
        (b'{"id": "a", "q_main": null}', "content is not text"),
        (b'{"id": "a", "q_main": " "}', "empty content"),
        (b'{"id": "a", "content": null}', "content is not text"),
        (b'{"id": "a", "content": ["x"]}', "content is not text"),
        (b'{"id": "a", "content": ""}', "empty content"),
        (b'{"id": "a", "content": " \\n"}', "empty content"),
        (b'{"id": "a", "content": "\\ud800 x"}', "lone surrogate"),
    ],
)
@pytest.mark.parametrize("ending", PACKERS)
def test_bad_records(tmp_path: Path, line: bytes, reason: str, ending: str):
    data = GOOD + b"\n" + line + b"\n" + GOOD + b"\n"
    items, _ = read(tmp_path / f"x.jsonl{ending}", PACKERS[ending](data))
    assert [type(item) for item in items] == [RawDocument, Reject, RawDocument]
    assert items[1] == Reject(2, reason)
    assert items[2].line == 3


@pytest.mark.parametrize("identity", ["null", '""', "[1]", "true", '"\\udfff"'])
def test_a_missing_id_is_made_of_the_place(tmp_path: Path, identity: str):
    data = GOOD + f'\n\n {{"id": {identity}, "content": "One."}}'.encode()
    for ending, pack in PACKERS.items():
        items, reader = read(tmp_path / f"books/x.jsonl{ending}", pack(data))
        place = f"books/x.jsonl{ending}@{len(GOOD) + 2}"
        assert items[1:] == [RawDocument(place, "One.", "en", "books", 3, id_repaired=True)]
        assert reader.repaired == {"missing id": 1}


def test_rules_of_hygiene_are_counted(tmp_path: Path):
    records = [
        {"id": 1, "content": "a  b\x00", "toxic_score": 0.1},
        {"content": "e\u0301  \n", "toxic_score": 0.2},
        {"id": 3, "content": "\x00 ", "toxic_score": 0.1},
        {"id": 4, "content": "c", "toxic_score": 0.9},
        {"id": 5, "content": "d"},
        {"id": 6, "content": "wort", "toxic_score": 0, "language": "deu"},
        {"id": 7, "content": "</s><unk>", "toxic_score": 0},
    ]
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    rules = {"strip_control": True, "white_space": True, "normal_form": "NFC", "keep_languages": ("en",)}
    items, reader = read(tmp_path / "x.jsonl", data, filters=("toxic_score<0.5",), **rules)
    assert [getattr(item, "content", None) or item.reason for item in items] == [
        "a b",
        "é\n",
        "empty content",
        "filter: toxic_score<0.5",
        "filter: no toxic_score",
        "language: de",
        "</s><unk>",
    ]
    assert reader.repaired == {
        "control characters removed": 1,
        "white space": 2,
        "normal form": 1,
        "missing id": 1,
    }


@pytest.mark.parametrize(
    ("folder", "flag", "record", "language"),
    [
        ("CN/news", "auto", {"content": "English"}, "zh"),
        ("CN/news", "en", {"content": "中文", "language": "fr"}, "en"),
        ("CN/news", "other", {"content": "中文"}, "other"),
        ("CN/news", "auto", {"content": "English", "language": "English"}, "en"),
        ("CN/news", "auto", {"content": "中文", "language": ""}, "zh"),
        ("news", "auto", {"content": "这是中文 with words"}, "zh"),
        ("news", "auto", {"content": "English with 中文", "language": 3}, "en"),
        ("news", "auto", {"content": "Это русский текст."}, "other"),
        ("news", "auto", {"content": "Это русский текст.", "language": "ru-RU"}, "ru"),
        ("CN/x/EN", "auto", {"content": "中文"}, "en"),
    ],
)
def test_language(tmp_path: Path, folder: str, flag: str, record: dict, language: str):
    path = tmp_path / "in" / folder / "x.jsonl"
    read(path, json.dumps(record).encode())
    (document,) = DocumentReader(find_inputs([tmp_path / "in"])[0], flag)
    assert (document.language, document.source) == (language, folder.split("/")[-1])


# Pieces -------------------------------------------------------------------------------------------------

SMALL = (
    b'\xef\xbb\xbf{"content": "one"}\n\n\r\n{"content": "\xe4\xba\x8c"}\r\nbad\n\n{"content": "x\xff"}\n  \n'
    b'{"id": "i", "content": "f"}'
)


def joined(pieces: list[Piece]) -> tuple[list, list[DocumentReader]]:
    """The records of all pieces, with lines counted as the sharder does."""
    items, readers, before = [], [], 0
    for piece in pieces:
        reader = DocumentReader(piece)
        items += [vars(item) | {"line": item.line + before} for item in reader]
        before += reader.lines
        readers.append(reader)
    return items, readers


@pytest.mark.parametrize("data", [SMALL, SMALL + b"\n", SMALL + b"\n\n", b"\n\n", b"x" * 40])
@pytest.mark.parametrize("steps", [(1 << 20, 1 << 16), (5, 3)])
def test_pieces_at_every_boundary_give_the_whole(tmp_path: Path, monkeypatch, data: bytes, steps):
    monkeypatch.setattr("data_prep.corpus.inputs.CHUNK_BYTES", steps[0])
    monkeypatch.setattr(documents, "CHUNK_BYTES", steps[0])
    monkeypatch.setattr(documents, "TAIL_BYTES", steps[1])
    (tmp_path / "x.jsonl").write_bytes(data)
    (file,) = find_inputs([tmp_path / "x.jsonl"])
    expected, (reader,) = joined([whole(file)])
    assert reader.lines == data.count(b"\n") + (not data.endswith(b"\n"))
    if data.startswith(SMALL):
        assert [item.get("content") or item["reason"] for item in expected] == [
            "one",
            "二",
            "invalid JSON",
            "undecodable bytes",
            "f",
        ]
        assert [item["line"] for item in expected] == [1, 4, 5, 7, 9]
    end = len(data)
    for a in range(end + 1):
        for b in range(a, end + 1) if steps[0] > 5 else (a, (a + end) // 2, end):
            pieces = [Piece(file, 0, a), Piece(file, a, b), Piece(file, b, end)]
            items, readers = joined(pieces)
            assert items == expected, (a, b)
            for piece, part in zip(pieces, readers, strict=True):
                stored = data[piece.start : piece.end]
                assert part.sha256 == piece.sha256() == hashlib.sha256(stored).hexdigest()
                assert part.bytes_read == len(stored)


def test_a_line_that_is_too_long_costs_itself_and_no_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 100_000)
    fits = json.dumps({"id": "fits", "content": "y" * 90_000}).encode()
    path = tmp_path / "x.jsonl"
    with open(path, "wb") as out:
        out.write(GOOD + b"\n" + fits + b"\n")
        for _ in range(300):
            out.write(b"x" * 100_000)
        out.write(b"\n" + fits + b"\n")
    (file,) = find_inputs([path])
    tracemalloc.start()
    items = list(DocumentReader(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [getattr(item, "id", None) or item.reason for item in items] == [
        "a",
        "fits",
        "line too long",
        "fits",
    ]
    assert [item.line for item in items] == [1, 2, 3, 4]
    assert peak < 8e6  # of a line of 30 MB
    expected, _ = joined([whole(file)])
    for count in (2, 3, 7, 60):
        assert joined(split(file, count))[0] == expected


@pytest.mark.parametrize("letter", ["x", "é", "二", "😀"])
def test_the_limit_counts_bytes_after_the_rules_as_well(tmp_path: Path, monkeypatch, letter: str):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1200)
    count = 1200 // len(letter.encode())
    rows = [letter * count, letter * (count + 1)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "x.parquet")
    items = list(DocumentReader(find_inputs([tmp_path / "x.parquet"])[0]))
    assert [type(item) for item in items] == [RawDocument, Reject]
    assert items[1].reason == "line too long"
    pq.write_table(pa.table({"text": ["\ufdfa" * 60]}), tmp_path / "x.parquet")  # one gives 18
    file = find_inputs([tmp_path / "x.parquet"])[0]
    assert list(DocumentReader(file, filters=Filters(normal_form="NFKC"))) == [Reject(1, "line too long")]
    assert len(list(DocumentReader(file))[0].content) == 60


def test_ids_of_files_whose_names_are_not_utf8(tmp_path: Path):
    for name, data, expected in (
        (b"b\xffd.jsonl", b'{"content": "Text."}\n', r"d/b\xffd.jsonl@0"),
        (b"t\xff.txt", b"Text.\n", r"d/t\xff.txt"),
    ):
        path = tmp_path / "d" / os.fsdecode(name)
        (document,), reader = read(path, data)
        assert document.id == expected and document.content.startswith("Text.")
        assert reader.sha256 == hashlib.sha256(data).hexdigest()


def test_a_file_that_changes_under_the_reader_is_told(tmp_path: Path):
    read(tmp_path / "x.jsonl", GOOD + b"\n" + GOOD)
    (file,) = find_inputs([tmp_path / "x.jsonl"])
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match="has become shorter"):
        list(DocumentReader(file))
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(UserError, match="cannot read .*x.jsonl: No such file"):
        list(DocumentReader(file))


# Fuzz ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACKERS)
def test_fuzzed_lines_among_good_ones(tmp_path: Path, monkeypatch, ending: str):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 100_000)
    chance = random.Random(3)
    lines, good, bad = [], [], []
    kinds = [True] * 5000 + [False] * 10_000
    chance.shuffle(kinds)
    for number, is_good in enumerate(kinds, start=1):
        if is_good:
            line, (identity, text) = good_line(chance, number)
            good.append((number, identity, text))
        else:
            line, reason = bad_line(chance)
            if reason:
                bad.append((number, reason))
        assert b"\n" not in line
        lines.append(line)
    data = b"\n".join(lines)
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(PACKERS[ending](data))
    (file,) = find_inputs([path])
    for count in (1, 97):
        items, _ = joined(split(file, count))
        assert [(i["line"], i["id"], i["content"]) for i in items if "id" in i] == good
        assert [(i["line"], i["reason"]) for i in items if "reason" in i] == bad
    assert len({reason for _, reason in bad}) == 8
