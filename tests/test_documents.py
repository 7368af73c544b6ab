"""Reading inputs of every kind: one bad record costs one record, told by its reason and line, and pieces of a
file give exactly what the file gives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import documents
from data_prep.documents import DocumentReader, RawDocument, Reject, sample_lines
from data_prep.errors import UserError
from data_prep.hygiene import Hygiene
from data_prep.inputs import Piece, find_inputs, open_parquet, split, whole

GOOD = b'{"id": "a", "content": "One two. \\u4e8c"}'
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(path: Path, data: bytes, language: str = "auto", **rules) -> tuple[list, DocumentReader]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    reader = DocumentReader(find_inputs([path])[0], language, Hygiene(**rules))
    return list(reader), reader


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
    assert (reader.bytes_read, reader.lines, reader.damage) == (len(data), 3, None)
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
    monkeypatch.setattr("data_prep.inputs.CHUNK_BYTES", steps[0])
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
    assert list(DocumentReader(file, hygiene=Hygiene(normal_form="NFKC"))) == [Reject(1, "line too long")]
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

PROSE = (
    "The old man, never tired, went on. ",
    "他说：“你好！我来了。”她笑了。",
    "</s> <unk> stay text. ",
    "Ünïcödé – “quotes” … ",
    "line\nbreaks\tand \u2028 separators \x85 ",
    "🎉 \U00020000 ",
    'quotes " and \\ and / ',
)


def prose(chance: random.Random) -> str:
    return "".join(chance.choices(PROSE, k=chance.randint(1, 12))) + "end"


def good_line(chance: random.Random, number: int) -> tuple[bytes, tuple]:
    """(line, what must arrive): good records in all the shapes that JSON allows."""
    identity, text = f"id-{number}", prose(chance)
    record: dict = {"id": identity, "content": text}
    shape = chance.randrange(12)
    if shape == 1:
        record = {"text": text, "id": identity}
    elif shape == 2:
        record |= {"score": float("nan"), "more": [{"a": [1, None, True]}] * 3}
    elif shape == 3:
        record["deep"] = json.loads("[" * 150 + "]" * 150)
    elif shape == 4:
        record = {"q_main": text, "id": identity, "std_ans": "A", "option_a": "甲" * 99}
        text += "\nA. " + "甲" * 99 + "\n答案：A"
    line = json.dumps(record, ensure_ascii=chance.random() < 0.5).encode("utf-8")
    if shape == 5:
        line = b"\xef\xbb\xbf" + line
    elif shape == 6:
        line = b" \t" + line + b" \r"
    elif shape == 7:  # the last of two equal keys counts
        line = b'{"content": 3, ' + line[1:]
    elif shape == 8:
        line = b"{\r" + line[1:]
    elif shape == 9:
        text = "\0" + text
        line = json.dumps(record | {"content": text}).encode()
    return line, (identity, text)


def bad_line(chance: random.Random) -> tuple[bytes, str | None]:
    """(line, reason): the reason is known from what was done to a good record. None: a blank line."""
    text = prose(chance)
    good = json.dumps({"id": "never", "content": text}, ensure_ascii=False)
    ascii_only = json.dumps({"id": "never", "content": text}).encode()
    # A place in the text, between two characters and in no escape.
    inside = chance.randint(len('{"id": "never", "content": "'), len(good) - 2)
    while good[inside - 1] == "\\":
        inside -= 1

    def put(stored: bytes) -> bytes:
        return good[:inside].encode() + stored + good[inside:].encode()

    def record(value: object) -> bytes:
        return json.dumps({"id": "never", "content": value, "title": text}).encode()

    undecodable = [b"\xff", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xba"]
    choices = [
        lambda: (good[: chance.randint(1, len(good) - 1)].encode(), "invalid JSON"),  # cut
        lambda: (put(chance.choice(undecodable)), "undecodable bytes"),
        lambda: (json.dumps({"content": "中"}, ensure_ascii=False).encode()[:14], "undecodable bytes"),
        lambda: (ascii_only.decode().encode("utf-16"), "undecodable bytes"),
        lambda: (b"\xfe" + chance.randbytes(chance.randint(1, 300)).replace(b"\n", b""), "undecodable bytes"),
        lambda: (gzip.compress(ascii_only, mtime=0).replace(b"\n", b"") + b"\xff", "undecodable bytes"),
        lambda: (
            record(chance.choice([None, 3, 1.5, True, [text], {"text": text}, float("nan")])),
            "content is not text",
        ),
        lambda: (record(chance.choice(["", " ", "\t\n", "\u3000\u2028 \x85"])), "empty content"),
        lambda: (record(text + chance.choice(["\ud800", "\udfff x", "\udc00\ud800"])), "lone surrogate"),
        lambda: (json.dumps({"id": "never", "title": text}).encode(), "no content"),
        lambda: (json.dumps(chance.choice([[text], text, 3, None, False, []])).encode(), "not an object"),
        lambda: (
            ascii_only[:-1] + chance.choice([b"", b",}", b"]", b"}}", b"} x", b"}{}", b"}\0"]),
            "invalid JSON",
        ),
        lambda: (
            chance.choice([b"x", b"\0", b"//", b",", b"\x0b", b"\xc2\xa0"]) + ascii_only,
            "invalid JSON",
        ),
        lambda: (
            put(chance.choice([b"\0", b"\r", b"\t", b"\x1b", b"\\x", b"\\u12-", b"\\ud8 "])),
            "invalid JSON",
        ),
        lambda: (ascii_only.replace(b'"', b"'", 2), "invalid JSON"),
        lambda: (b"\xef\xbb\xbf\xef\xbb\xbf" + ascii_only, "invalid JSON"),
        lambda: (b"[" * chance.choice([1, 50, 5000, 90_000]), "invalid JSON"),
        lambda: (b'{"a":' * chance.choice([1, 50, 5000, 18_000]), "invalid JSON"),
        lambda: (deep(chance.choice([250, 2000, 40_000])), "invalid JSON"),
        lambda: (json.dumps({"content": "z" * 100_001}).encode(), "line too long"),
        lambda: (b"\xff[\0" * 33_400, "line too long"),
        lambda: (chance.choice([b"", b" ", b"\r", b"\t\r", b"\xef\xbb\xbf"]), None),
    ]
    return chance.choice(choices)()


def deep(depth: int) -> bytes:
    return b'{"content": "x", "a": ' + b"[" * depth + b"]" * depth + b"}"


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


# Packed files -------------------------------------------------------------------------------------------


def lines_of(count: int) -> bytes:
    records = (
        {"id": str(i), "content": hashlib.sha256(str(i).encode()).hexdigest() * 8} for i in range(count)
    )
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_files_in_several_parts(tmp_path: Path, ending: str):
    pack = PACKERS[ending]
    data = pack(lines_of(50)) + pack(b"") + pack(lines_of(30))
    data += (
        b"\0" * 600 if ending == ".gz" else b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    )  # padding; a frame to skip
    items, reader = read(tmp_path / f"x.jsonl{ending}", data)
    assert [item.id for item in items] == [str(n) for n in (*range(50), *range(30))]
    assert reader.damage is None and reader.bytes_read == len(data)
    assert reader.sha256 == reader.piece.sha256() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("ending", "said"), [(".gz", "the gzip file ends too early"), (".zst", "the zstd file ends too early")]
)
def test_a_file_cut_short_keeps_what_can_be_read(tmp_path: Path, ending: str, said: str):
    stored = PACKERS[ending](lines_of(4000))
    items, reader = read(tmp_path / f"x.jsonl{ending}", stored[: len(stored) * 3 // 4])
    good = [item for item in items if isinstance(item, RawDocument)]
    assert 2500 <= len(good) < 3100
    assert [item.id for item in good] == [str(i) for i in range(len(good))]
    assert items[len(good) :] in ([Reject(len(good) + 1, "invalid JSON")], [])  # the line that was cut
    assert reader.damage == said


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damage_inside_a_file(tmp_path: Path, ending: str):
    data = bytearray(PACKERS[ending](lines_of(4000)))
    # Enough to hit the header of a block: zstd's literals are not protected by themselves.
    size = 64 if ending == ".gz" else len(data) // 4
    data[len(data) // 2 : len(data) // 2 + size] = b"\xff" * size
    items, reader = read(tmp_path / f"x.jsonl{ending}", bytes(data))
    good = [item for item in items if isinstance(item, RawDocument)]
    assert len(good) >= 1500 and [item.id for item in good] == [str(i) for i in range(len(good))]
    assert reader.damage.startswith("damaged gzip data" if ending == ".gz" else "damaged zstd data")
    assert reader.sha256 == hashlib.sha256(data).hexdigest()  # of the whole file all the same


@pytest.mark.parametrize("ending", [".gz", ".zst", ".tar", ".tar.gz"])
def test_files_that_are_something_else(tmp_path: Path, ending: str):
    items, reader = read(tmp_path / f"x.jsonl{ending}", GOOD * 30)
    assert items == [] and reader.damage.startswith("damaged")
    items, reader = read(tmp_path / f"y.jsonl{ending}", b"")
    assert items == [] and reader.damage is None


def tar_of(
    *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, form: int = tarfile.PAX_FORMAT
) -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w", format=form) as archive:
        for name, data in members:
            facts = tarfile.TarInfo(name)
            facts.size, facts.type, facts.linkname = len(data), kind, "elsewhere" if kind != b"0" else ""
            archive.addfile(facts, io.BytesIO(data))
    return stored.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("ending", [".jsonl.tar", ".jsonl.tar.gz", ".tgz", ".tar.zst"])
def test_archives(tmp_path: Path, ending: str, form: int):
    long = "x" * 90 + "/" + "y" * 90
    data = tar_of(
        ("./part.jsonl", GOOD + b"\nbad\n"),
        ("CN/web/part.jsonl", b'\xef\xbb\xbf{"content": "Two"}\n' + GOOD),
        (f"EN/{long}.jsonl", GOOD),
        ("../../escape.jsonl", GOOD),
        ("web/README.md", b"no lines"),
        ("empty.jsonl", b""),
        form=form,
    )
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        data += tar_of(("link.jsonl", b""), kind=kind, form=form)
    data += tar_of(("folder.jsonl", b""), kind=tarfile.DIRTYPE, form=form)
    path = tmp_path / f"news/w{ending}"
    pack = PACKERS[".gz"] if ending.endswith("gz") else PACKERS[".zst"] if ending.endswith("zst") else bytes
    items, reader = read(path, pack(data))
    assert items == [
        RawDocument("a", "One two. 二", "en", "news", 1, member="part.jsonl"),
        Reject(2, "invalid JSON", "part.jsonl"),
        RawDocument(f"news/w{ending}!CN/web/part.jsonl@0", "Two", "zh", "web", 1, True, "CN/web/part.jsonl"),
        RawDocument("a", "One two. 二", "zh", "web", 2, member="CN/web/part.jsonl"),
        RawDocument("a", "One two. 二", "en", "x" * 90, 1, member=f"EN/{long}.jsonl"),
        RawDocument("a", "One two. 二", "en", "news", 1, member="escape.jsonl"),
        Reject(0, "not a .jsonl member", "web/README.md"),
        *[Reject(0, "not a regular file", "link.jsonl")] * 4,
    ]
    assert reader.damage is None and reader.bytes_read == path.stat().st_size
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["news", path.name]  # nothing was unpacked to disk


def test_damaged_archives(tmp_path: Path):
    members = [(f"{n}.jsonl", lines_of(3)) for n in range(5)]
    data = tar_of(*members, form=tarfile.USTAR_FORMAT)
    at = [n for n in range(0, len(data), 512) if data[n + 257 : n + 262] == b"ustar"]
    items, reader = read(tmp_path / "cut.tar", data[: at[3] + 512 + 600])
    assert len(items) == 3 * 3 + 2 and items[-1] == Reject(2, "invalid JSON", "3.jsonl")
    assert reader.damage == "the tar archive ends too early"
    broken = bytearray(data)
    broken[at[2] + 130] ^= 1  # in the size of the third
    items, reader = read(tmp_path / "broken.tar", bytes(broken))
    assert [item.line for item in items] == [1, 2, 3] * 4  # all members but the one
    assert reader.damage == "damaged tar header"
    for cut in range(0, len(data), 97):  # never a stack trace
        _, reader = read(tmp_path / "any.tar", data[:cut])
    chance = random.Random(1)
    for _ in range(200):
        torn = bytearray(data)
        for _ in range(5):
            torn[chance.choice(at) + chance.randrange(512)] = chance.randrange(256)
        _, reader = read(tmp_path / "any.tar", bytes(torn))
        assert reader.bytes_read == len(torn)


# Text and tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACKERS)
def test_text_files(tmp_path: Path, monkeypatch, ending: str):
    text = "\ufeffFirst.\r\n\r\nSecond, 二.\n"
    items, reader = read(tmp_path / f"b/x.txt{ending}", PACKERS[ending](text.encode()), text_field="body")
    assert items == [RawDocument(f"b/x.txt{ending}", text[1:], "en", "b", 1)]
    assert not reader.repaired and reader.lines == 1
    for data, reason in (
        (b"\xff\xfea", "undecodable bytes"),
        (b" \n", "empty content"),
        (b"", "empty content"),
    ):
        assert read(tmp_path / f"y.md{ending}", PACKERS[ending](data))[0] == [Reject(1, reason)]
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 10)
    assert read(tmp_path / f"y.md{ending}", PACKERS[ending](b"x" * 11))[0] == [Reject(1, "file too long")]


def table_of(rows: int) -> dict:
    return {
        "id": [f"r{n}" if n % 5 else None for n in range(rows)],
        "text": [None if n % 7 == 3 else "" if n % 7 == 4 else f"Text {n}. 二" for n in range(rows)],
        "toxic_score": [n / rows for n in range(rows)],
        "language": ["zh" if n % 2 else "en" for n in range(rows)],
        "image": [b"\xff\x00"] * rows,
    }


def expected_of(rows: int, name: str, source: str) -> list:
    items = []
    for n in range(rows):
        if n % 7 in (3, 4):
            items.append(Reject(n + 1, "content is not text" if n % 7 == 3 else "empty content"))
        elif n / rows >= 0.9:
            items.append(Reject(n + 1, "filter: toxic_score<0.9"))
        else:
            identity = f"r{n}" if n % 5 else f"{name}#{n + 1}"
            language = "zh" if n % 2 else "en"
            items.append(RawDocument(identity, f"Text {n}. 二", language, source, n + 1, n % 5 == 0))
    return items


RULES = Hygiene(filters=("toxic_score<0.9",))


def test_parquet(tmp_path: Path):
    (tmp_path / "web").mkdir()
    pq.write_table(pa.table(table_of(1000)), tmp_path / "web/x.parquet", row_group_size=130)
    (file,) = find_inputs([tmp_path / "web/x.parquet"])
    reader = DocumentReader(file, hygiene=RULES)
    expected = expected_of(1000, "web/x.parquet", "web")
    assert list(reader) == expected
    assert (reader.lines, reader.bytes_read, reader.damage) == (1000, file.size, None)
    assert reader.repaired["missing id"] == sum(getattr(item, "id_repaired", False) for item in expected)
    for count in (3, 8):
        pieces = split(file, count)
        readers = [DocumentReader(piece, hygiene=RULES) for piece in pieces]
        assert [item for part in readers for item in part] == expected and len(pieces) > 2
        assert sum(part.bytes_read for part in readers) == file.size
        assert [part.sha256 for part in readers] == [piece.sha256() for piece in pieces]
        assert len({part.sha256 for part in readers}) == len(pieces)


def test_few_large_rows_of_a_table_are_in_memory_at_once(tmp_path: Path):
    rows = [hashlib.sha256(b"%d" % n).hexdigest() * 8000 for n in range(100)]  # of 0.5 MB
    options = {"use_dictionary": False, "write_batch_size": 1, "compression": "zstd"}
    pq.write_table(pa.table({"text": rows}), tmp_path / "x.parquet", **options)
    reader = DocumentReader(find_inputs([tmp_path / "x.parquet"])[0])
    with open_parquet(reader.file) as table:
        sizes = [batch.num_rows for batch in reader._batches(table, 0, ["text"])]
    assert sum(sizes) == 100 and max(sizes) == 8
    assert [document.content for document in reader] == rows


def test_a_damaged_row_group_costs_itself(tmp_path: Path):
    pq.write_table(pa.table(table_of(1000)), tmp_path / "x.parquet", row_group_size=250, compression="snappy")
    group = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(1)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    at = group.dictionary_page_offset
    data[at : at + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    items, reader = read(tmp_path / "x.parquet", bytes(data), filters=RULES.filters)
    name = f"{tmp_path.name}/x.parquet"
    expected = expected_of(1000, name, tmp_path.name)
    assert items == expected[:250] + expected[500:]
    assert reader.damage.startswith("damaged row group 1: ")
    (tmp_path / "x.parquet").write_bytes(data[:-10])
    with pytest.raises(UserError, match="cannot read .*x.parquet: ArrowInvalid"):
        DocumentReader(find_inputs([tmp_path / "x.parquet"])[0])


def test_strings_in_tables_that_are_no_text(tmp_path: Path):
    values = pa.array([b"good", b"\xff\xfe", b"too"]).view(pa.utf8())
    pq.write_table(pa.table({"content": values}), tmp_path / "x.parquet")
    reader = DocumentReader(find_inputs([tmp_path / "x.parquet"])[0])
    items = list(reader)
    assert [getattr(item, "content", None) or item.reason for item in items] == [
        "good",
        "undecodable bytes",
        "too",
    ]


@pytest.mark.parametrize(
    ("columns", "field", "text"),
    [
        ({"passage": ["a"], "id": ["1"], "n": [1]}, None, "a"),
        ({"passage": ["a"], "content": ["b"]}, None, "b"),
        ({"passage": ["a"], "content": ["b"]}, "passage", "a"),
        ({"body": [{"text": "c", "n": 1}], "title": ["t"]}, "body.text", "c"),
        ({"body.text": ["d"]}, "body.text", "d"),
        ({"q_main": ["Why?"], "std_ans": ["A"], "title": ["t"]}, None, "Why?\nAnswer: A"),
        ({"kind": pa.array(["e"]).dictionary_encode()}, None, "e"),
        ({"passage": ["a"], "title": ["t"]}, None, UserError),
        ({"n": [1]}, None, UserError),
        ({"passage": ["a"]}, "body", UserError),
    ],
)
def test_the_text_column(tmp_path: Path, columns: dict, field: str | None, text):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    reader = DocumentReader(find_inputs([tmp_path / "x.parquet"])[0], hygiene=Hygiene(text_field=field))
    if isinstance(text, str):
        assert [item.content for item in reader] == [text]
    else:
        with pytest.raises(text, match="--text-field"):
            list(reader)


def test_datasets(tmp_path: Path):
    import datasets

    table = datasets.Dataset.from_dict(table_of(300))
    table.save_to_disk(tmp_path / "set", num_shards=3)
    (file,) = find_inputs([f"hf:{tmp_path}/set"])
    expected = expected_of(300, "hf:set", "set")
    assert list(DocumentReader(file, hygiene=RULES)) == expected
    for count in (4, 7):
        pieces = split(file, count)
        readers = [DocumentReader(piece, hygiene=RULES) for piece in pieces]
        assert [item for part in readers for item in part] == expected
        assert sum(part.bytes_read for part in readers) == file.size
        assert [part.sha256 for part in readers] == [piece.sha256() for piece in pieces]
    # Rows chosen and put in another order are read as the dataset gives them.
    table.select(list(range(299, -1, -1))).save_to_disk(tmp_path / "back")
    (file,) = find_inputs([f"hf:{tmp_path}/back"])
    assert [item.content for item in DocumentReader(file) if hasattr(item, "content")][0] == "Text 299. 二"


def test_remote_files_are_read_like_local_ones(tmp_path: Path):
    corpus = tmp_path / "corpus"
    read(corpus / "EN/a/1.jsonl", lines_of(300))
    read(corpus / "EN/b/2.jsonl.gz", gzip.compress(lines_of(20)))
    read(corpus / "EN/b/3.tar.zst", PACKERS[".zst"](tar_of(("x/part.jsonl", lines_of(9)))))
    pq.write_table(pa.table(table_of(100)), corpus / "EN/b/4.parquet", row_group_size=30)
    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(corpus), "/bucket/corpus", recursive=True)
        local, remote = find_inputs([corpus]), find_inputs(["memory://bucket/corpus"])
        for one, other in zip(local, remote, strict=True):
            assert other.path.startswith("memory://")
            for a, b in zip(split(one, 3), split(other, 3), strict=True):
                first, second = DocumentReader(a), DocumentReader(b)
                assert list(first) == list(second)
                assert first.sha256 == second.sha256 and first.lines == second.lines
        memory.rm("/bucket/corpus/EN/a/1.jsonl")
        with pytest.raises(UserError, match="cannot read memory://bucket/corpus/EN/a/1.jsonl"):
            list(DocumentReader(remote[0]))
    finally:
        memory.rm("/", recursive=True)


# Samples ------------------------------------------------------------------------------------------------


def test_the_sample_is_shared_and_bounded(tmp_path: Path):
    for name, count in (("a", 2), ("b", 400), ("c", 400)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines_of(count))
    files = find_inputs([tmp_path])
    lines = list(sample_lines(files, 60_000))
    assert 60_000 <= sum(len(line) + 1 for line in lines) <= 62_000
    ids = {json.loads(line)["content"]: n for n, line in enumerate(lines_of(400).splitlines())}
    taken = [ids[line] for line in lines]
    assert taken[:2] == [0, 1] and 110 < len(taken) < 125
    assert {n * 8 // 400 for n in taken[2:60]} == set(range(8))  # from everywhere in the second file
    assert list(sample_lines(files, 60_000)) == lines
    with pytest.raises(UserError, match="no usable document"):
        (tmp_path / "bad.jsonl").write_bytes(b"{}\n")
        list(sample_lines(find_inputs([tmp_path / "bad.jsonl"]), 1000))


def test_every_kind_is_sampled(tmp_path: Path):
    import datasets

    corpus = tmp_path / "corpus"
    read(corpus / "1.jsonl.gz", gzip.compress(lines_of(100)))
    read(corpus / "2.tar", tar_of(("x.jsonl", lines_of(100))))
    pq.write_table(pa.table({"body": ["tabular " * 50] * 100}), corpus / "3.parquet", row_group_size=10)
    read(tmp_path / "text/4.txt", b"plain text\n" * 900)
    datasets.Dataset.from_dict({"body": ["set " * 100] * 100}).save_to_disk(tmp_path / "set")
    files = find_inputs([corpus, tmp_path / "text", f"hf:{tmp_path}/set"])
    sample = "\n".join(sample_lines(files, 25_000, Hygiene()))
    for word in ("tabular", "plain text", "set "):
        assert sample.count(word) > 10
    assert 25_000 <= len(sample) <= 28_000
    hexadecimal = np.isin(list(sample), list("0123456789abcdef")).sum()
    assert hexadecimal > 9000  # the packed files
