"""Reading WanJuan files: one bad record costs one record, and is told by its reason and line."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from data_prep.documents import (
    DocumentReader,
    RawDocument,
    Reject,
    detect_language,
    find_inputs,
    find_unread,
    sample_lines,
    unread_line,
)
from data_prep.errors import UserError

GOOD = b'{"id": "a", "content": "One two. \\u4e8c"}'


def read(path: Path, data: bytes, language: str = "auto") -> tuple[list, DocumentReader]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    reader = DocumentReader(find_inputs([path])[0], language)
    return list(reader), reader


def test_good_records(tmp_path: Path):
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\n" + b'{"id": 7, "content": "Two\\n"}'
    items, reader = read(tmp_path / "books/x.jsonl", data)
    assert items == [
        RawDocument("a", "One two. 二", "en", "books", 1),
        RawDocument("7", "Two\n", "en", "books", 3),
    ]
    assert reader.file.name == "books/x.jsonl"
    assert reader.sha256 == hashlib.sha256(data).hexdigest()
    assert reader.bytes_read == len(data)
    assert reader.damage is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "a", "content": "\xff"}', "undecodable bytes"),
        (b"{'id'}", "invalid JSON"),
        (b'{"id": "a", "content": "cut', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'["content"]', "not an object"),
        (b'"content"', "not an object"),
        (b"3", "not an object"),
        (b'{"id": "a", "q_main": "?"}', "no content"),
        (b'{"id": "a", "content": null}', "content is not text"),
        (b'{"id": "a", "content": ["x"]}', "content is not text"),
        (b'{"id": "a", "content": ""}', "empty content"),
        (b'{"id": "a", "content": " \\n"}', "empty content"),
        (b'{"id": "a", "content": "\\ud800 x"}', "lone surrogate"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_bad_records(tmp_path: Path, line: bytes, reason: str, ending: str):
    data = GOOD + b"\n" + line + b"\n" + GOOD + b"\n"
    items, _ = read(tmp_path / f"x{ending}", gzip.compress(data) if ending.endswith("gz") else data)
    assert [type(item) for item in items] == [RawDocument, Reject, RawDocument]
    assert items[1] == Reject(2, reason)
    assert items[2].line == 3


@pytest.mark.parametrize("identity", ["null", '""', "[1]", "true", '"\\udfff"'])
def test_a_missing_id_is_made_of_the_place(tmp_path: Path, identity: str):
    items, _ = read(tmp_path / "books/x.jsonl", f'{{"id": {identity}, "content": "One."}}'.encode())
    assert items == [RawDocument("books/x.jsonl:1", "One.", "en", "books", 1, id_repaired=True)]


def lines_of(count: int) -> bytes:
    records = (
        {"id": str(i), "content": hashlib.sha256(str(i).encode()).hexdigest() * 8} for i in range(count)
    )
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_gzip_in_several_members_and_padding(tmp_path: Path):
    first, second = lines_of(50), lines_of(30)
    data = gzip.compress(first) + gzip.compress(b"") + gzip.compress(second) + b"\0" * 600
    items, reader = read(tmp_path / "x.jsonl.gz", data)
    assert len(items) == 80 and reader.damage is None
    assert reader.sha256 == hashlib.sha256(data).hexdigest()


def test_a_gzip_file_cut_short_keeps_what_can_be_read(tmp_path: Path):
    whole = gzip.compress(lines_of(400))
    items, reader = read(tmp_path / "x.jsonl.gz", whole[: len(whole) * 3 // 4])
    good = [item for item in items if isinstance(item, RawDocument)]
    assert 250 <= len(good) < 310
    assert [item.id for item in good] == [str(i) for i in range(len(good))]
    assert items[len(good) :] == [Reject(len(good) + 1, "invalid JSON")]  # the line that was cut
    assert reader.damage == "the gzip file ends too early"


def test_damage_inside_a_gzip_file(tmp_path: Path):
    data = bytearray(gzip.compress(lines_of(400)))
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    items, reader = read(tmp_path / "x.jsonl.gz", bytes(data))
    good = [item for item in items if isinstance(item, RawDocument)]
    assert len(good) >= 150
    assert reader.damage.startswith("damaged gzip data")
    assert reader.sha256 == hashlib.sha256(data).hexdigest()  # of the whole file all the same


def test_no_gzip_at_all(tmp_path: Path):
    items, reader = read(tmp_path / "x.jsonl.gz", GOOD)
    assert items == [] and reader.damage.startswith("damaged gzip data")


@pytest.mark.parametrize(
    ("folder", "flag", "content", "language"),
    [
        ("CN/news", "auto", "English", "zh"),
        ("CN/news", "en", "English", "en"),
        ("EN/news", "zh", "English", "zh"),
        ("news/CN", "auto", "English", "zh"),
        ("CN/x/EN", "auto", "中文", "en"),
        ("EN/news", "auto", "中文", "en"),
        ("news", "zh", "English", "zh"),
        ("news", "auto", "这是中文 with words", "zh"),
        ("news", "auto", "English with 中文", "en"),
        ("ENGLISH", "auto", "中文", "zh"),
    ],
)
def test_language(tmp_path: Path, folder: str, flag: str, content: str, language: str):
    file = tmp_path / "CN/EN/CN/corpus" / folder / "x.jsonl"  # what lies above the input never counts
    file.parent.mkdir(parents=True)
    file.write_bytes(json.dumps({"id": "a", "content": content}).encode())
    given = tmp_path / "CN/EN/CN/corpus" / folder.split("/")[0]
    for path in (given, given.parent):
        (document,) = DocumentReader(find_inputs([path])[0], flag)
        assert (document.language, document.source) == (language, folder.split("/")[-1])


def test_language_of_an_input_given_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read(tmp_path / "CN/x.jsonl", GOOD)
    assert find_inputs([tmp_path / "CN/x.jsonl"])[0].folder_language is None  # a single file: by its script
    monkeypatch.chdir(tmp_path / "CN")
    assert find_inputs(["."])[0].folder_language == "zh"


def test_language_of_texts_without_letters():
    assert detect_language("12 + 3 = 15") == "en"


def test_find_inputs(tmp_path: Path):
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "a/9.jsonl", "a/skip.txt", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_inputs([tmp_path / "c.jsonl", tmp_path / "b", tmp_path / "a"])
    assert [file.name for file in found] == [
        f"{tmp_path.name}/c.jsonl",
        "b/1.jsonl.gz",
        "b/2.jsonl",
        "a/9.jsonl",
    ]
    with pytest.raises(UserError, match="named twice"):
        find_inputs([tmp_path, tmp_path / "a/../c.jsonl"])
    with pytest.raises(UserError, match="does not exist"):
        find_inputs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="neither .jsonl nor"):
        find_inputs([tmp_path / "a/skip.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        find_inputs([tmp_path / "empty"])


def test_packed_files_are_not_passed_over_silently(tmp_path: Path):
    names = (
        "a/p1.jsonl.tar.gz",
        "a/p2.jsonl.zst",
        "b/p3.jsonl.GZ",
        "b/good.jsonl",
        "b/good.jsonl.gz",
        "b/n.md",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_unread([tmp_path / "b", tmp_path / "a", tmp_path / "b/good.jsonl"]) == [
        "b/p3.jsonl.GZ",
        "a/p1.jsonl.tar.gz",
        "a/p2.jsonl.zst",
    ]
    assert [file.path.name for file in find_inputs([tmp_path])] == ["good.jsonl", "good.jsonl.gz"]
    with pytest.raises(UserError, match=r"only 2 packed files .* a/p1.jsonl.tar.gz, a/p2.jsonl.zst; unpack"):
        find_inputs([tmp_path / "a"])
    assert unread_line([f"a/{n}" for n in range(1000)]).startswith("1000 packed files")
    assert "a/4, …;" in unread_line([f"a/{n}" for n in range(1000)])


def test_links_keep_the_names_given(tmp_path: Path):
    items, _ = read(tmp_path / "store/blob.jsonl", GOOD)
    (tmp_path / "CN").mkdir()
    (tmp_path / "CN/part.jsonl").symlink_to(tmp_path / "store/blob.jsonl")
    (file,) = find_inputs([tmp_path / "CN"])
    assert (file.name, file.source, file.folder_language) == ("CN/part.jsonl", "CN", "zh")
    assert [item.content for item in DocumentReader(file)] == [items[0].content]


def test_the_sample_is_shared_and_bounded(tmp_path: Path):
    for name, count in (("a", 2), ("b", 400), ("c", 400)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines_of(count))
    files = find_inputs([tmp_path])
    lines = list(sample_lines(files, 60_000))
    assert 60_000 <= sum(len(line) + 1 for line in lines) <= 62_000
    assert len(lines) == 2 + 58 + 57  # all of the short file, the rest in equal shares
    with pytest.raises(UserError, match="no usable document"):
        (tmp_path / "bad.jsonl").write_bytes(b"{}\n")
        list(sample_lines(find_inputs([tmp_path / "bad.jsonl"]), 1000))
