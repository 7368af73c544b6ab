"""Packed files, archives, tables, remote files and data sets as inputs: read alike, damage reported."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import random
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.reading import GOOD, PACKERS, read

from data_prep.common.errors import UserError
from data_prep.corpus.compression import SALVAGED
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject, sample_lines
from data_prep.corpus.filters import Filters
from data_prep.corpus.finding import find_inputs
from data_prep.corpus.inputs import open_parquet, split
from data_prep.corpus.tables import Rows

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
    assert reader.damage == [] and reader.bytes_read == len(data)
    assert reader.sha256 == reader.piece.sha256() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("ending", "said"), [(".gz", "the gzip file ends too early"), (".zst", "the zstd file ends too early")]
)
def test_a_file_cut_short_keeps_what_can_be_read_on_request(tmp_path: Path, ending: str, said: str):
    stored = PACKERS[ending](lines_of(4000))
    cut = stored[: len(stored) * 3 // 4]
    assert read(tmp_path / f"x.jsonl{ending}", cut)[0] == []  # its only member has no verified end
    items, reader = read(tmp_path / f"x.jsonl{ending}", cut, salvage=True)
    good = [item for item in items if isinstance(item, RawDocument)]
    assert 2500 <= len(good) < 3100
    assert [item.id for item in good] == [str(i) for i in range(len(good))]
    assert items[len(good) :] in ([Reject(len(good) + 1, "invalid JSON")], [])  # the line that was cut
    assert [one.reason for one in reader.damage] == [said] and {item.mark for item in good} == {SALVAGED}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damage_inside_a_file(tmp_path: Path, ending: str):
    data = bytearray(PACKERS[ending](lines_of(4000)))
    # Enough to hit the header of a block: zstd's literals are not protected by themselves.
    size = 64 if ending == ".gz" else len(data) // 4
    data[len(data) // 2 : len(data) // 2 + size] = b"\xff" * size
    for salvage in (False, True):
        items, reader = read(tmp_path / f"x.jsonl{ending}", bytes(data), salvage=salvage)
        good = [item for item in items if isinstance(item, RawDocument)]
        assert [item.id for item in good] == [str(i) for i in range(len(good))]
        assert len(good) >= 1500 if salvage else not items
        (damage,) = reader.damage
        assert damage.reason.startswith("damaged gzip data" if ending == ".gz" else "damaged zstd data")
        assert reader.sha256 == hashlib.sha256(data).hexdigest()  # of the whole file all the same


@pytest.mark.parametrize("ending", [".gz", ".zst", ".tar", ".tar.gz"])
def test_files_that_are_something_else(tmp_path: Path, ending: str):
    for data, said in (
        (GOOD * 30, "but plain text: give it the name of what it is"),
        (
            PACKERS[".zst" if ending.endswith(".gz") else ".gz"](GOOD * 30),
            "data: give it the name of what it is",
        ),
        (b"", "empty"),
    ):
        items, reader = read(tmp_path / f"x.jsonl{ending}", data)
        assert items == [] and [said in one.reason for one in reader.damage] == [True]


@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".jsonl.tar.gz", ".jsonl.tar.zst"])
def test_files_that_hold_something_else(tmp_path: Path, ending: str):
    """A packed file under a plain name, in every piece; a packed file that is no archive."""
    pack = PACKERS["." + ending.split(".")[-1]] if "tar" in ending else gzip.compress
    path = tmp_path / f"x{ending}"
    items, reader = read(path, pack(lines_of(900)))
    said = "not a tar archive but plain text" if "tar" in ending else "not text but gzip data"
    assert items == [] and [one.reason.startswith(said) for one in reader.damage] == [True]
    readers = [DocumentReader(piece) for piece in split(find_inputs([path])[0], 3)]
    assert [item for one in readers for item in one] == []
    assert sum(len(one.damage) for one in readers) == 1


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
    assert reader.damage == [] and reader.bytes_read == path.stat().st_size
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["news", path.name]  # nothing was unpacked to disk


def test_damaged_archives(tmp_path: Path):
    members = [(f"{n}.jsonl", lines_of(3)) for n in range(5)]
    data = tar_of(*members, form=tarfile.USTAR_FORMAT)
    at = [n for n in range(0, len(data), 512) if data[n + 257 : n + 262] == b"ustar"]
    items, reader = read(tmp_path / "cut.tar", data[: at[3] + 512 + 600])
    assert len(items) == 3 * 3 + 2 and items[-1] == Reject(2, "invalid JSON", "3.jsonl")
    assert [one.reason for one in reader.damage] == ["the tar archive ends too early"]
    _, reader = read(tmp_path / "cut.tar", data[: at[3]])  # between two members
    assert [one.reason for one in reader.damage] == ["the tar archive ends too early (it has no end mark)"]
    broken = bytearray(data)
    broken[at[2] + 130] ^= 1  # in the size of the third
    items, reader = read(tmp_path / "broken.tar", bytes(broken))
    assert [item.line for item in items] == [1, 2, 3] * 4  # all members but the one
    assert [(one.reason, one.start) for one in reader.damage] == [("damaged tar header", at[2])]
    for cut in range(0, len(data), 97):  # never a stack trace
        _, reader = read(tmp_path / "any.tar", data[:cut])
    chance = random.Random(1)
    for _ in range(200):
        torn = bytearray(data)
        for _ in range(5):
            torn[chance.choice(at) + chance.randrange(512)] = chance.randrange(256)
        _, reader = read(tmp_path / "any.tar", bytes(torn))
        assert reader.bytes_read == len(torn)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_archives_with_a_damaged_member_of_the_packing(tmp_path: Path, ending: str, form: int):
    """The tar is cut into packed members anywhere; what is in sight of a header before and after is read."""
    data = tar_of(*((f"{n}.jsonl", lines_of(30)) for n in range(40)), form=form)
    parts = [data[n : n + 30_001] for n in range(0, len(data), 30_001)]
    members = [PACKERS[ending](part) for part in parts]
    for hit in (0, 3, len(parts) - 1):
        torn = bytearray(members[hit])
        torn[len(torn) // 2] ^= 4
        stored = b"".join([*members[:hit], bytes(torn), *members[hit + 1 :]])
        items, reader = read(tmp_path / f"x.tar{ending}", stored)
        assert len(reader.damage) == 1
        start, end = hit * 30_001, hit * 30_001 + len(parts[hit])
        good = [item for item in items if isinstance(item, RawDocument)]
        sizes = [(n, data.index(f"{n}.jsonl".encode())) for n in range(40)]
        whole = {f"{n}.jsonl" for n, at in sizes if at + 512 + len(lines_of(30)) <= start or at - 1024 >= end}
        found = {item.member for item in good}
        assert whole <= found and len(found - whole) <= 1
        texts = {json.loads(line)["content"] for line in lines_of(30).splitlines()}
        assert {item.content for item in good} <= texts
        assert all(sum(item.member == name for item in good) == 30 for name in whole)


# Text and tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACKERS)
def test_text_files(tmp_path: Path, ending: str):
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
    long = PACKERS[ending](b"x" * 11)
    assert read(tmp_path / f"y.md{ending}", long, max_text_mb=1e-5)[0] == [Reject(1, "file too long")]


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


RULES = Filters(filters=("toxic_score<0.9",))


def test_parquet(tmp_path: Path):
    (tmp_path / "web").mkdir()
    pq.write_table(pa.table(table_of(1000)), tmp_path / "web/x.parquet", row_group_size=130)
    (file,) = find_inputs([tmp_path / "web/x.parquet"])
    reader = DocumentReader(file, filters=RULES)
    expected = expected_of(1000, "web/x.parquet", "web")
    assert list(reader) == expected
    assert (reader.lines, reader.bytes_read, reader.damage) == (1000, file.size, [])
    assert reader.repaired["missing id"] == sum(getattr(item, "id_repaired", False) for item in expected)
    for count in (3, 8):
        pieces = split(file, count)
        readers = [DocumentReader(piece, filters=RULES) for piece in pieces]
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
        batches = Rows(reader.piece, Filters(), None, []).batches(table, 0, ["text"])
        sizes = [batch.num_rows for batch in batches]
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
    assert [one.reason[:21] for one in reader.damage] == ["damaged row group 1: "]
    # Pages that carry a checksum: one flipped bit.
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table(table_of(1000)), tmp_path / "x.parquet", row_group_size=250, **options)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[data.index(b"Text 300.")] ^= 1
    items, reader = read(tmp_path / "x.parquet", bytes(data), filters=RULES.filters)
    assert items == expected[:250] + expected[500:]
    assert ["CRC" in one.reason for one in reader.damage] == [True]
    (tmp_path / "x.parquet").write_bytes(data[:-10])
    items, reader = read(tmp_path / "x.parquet", bytes(data[:-10]), filters=RULES.filters)
    assert items == [] and [one.reason[:30] for one in reader.damage] == ["cut or damaged: ArrowInvalid: "]


def archive_of(data: bytes) -> bytes:
    with io.BytesIO() as stored:
        with tarfile.open(fileobj=stored, mode="w") as tar:
            member = tarfile.TarInfo("x.jsonl")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        return stored.getvalue()


def arrow_of(count: int, kind: str) -> bytes:
    table = pa.table(table_of(count))
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with io.BytesIO() as stored:
        with new(stored, table.schema) as writer:
            writer.write_table(table, max_chunksize=count // 2)
        return stored.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.jsonl.gz", gzip.compress(gzip.compress(lines_of(5))), "not text but gzip data: give it"),
        ("x.jsonl.zst", PACKERS[".zst"](archive_of(lines_of(5))), "not text but a tar archive: give it"),
        ("x.jsonl", archive_of(lines_of(5)), "not text but a tar archive: give it"),
        ("x.csv.gz", gzip.compress(lzma.compress(lines_of(5))), "not text but xz data: give it"),
        ("x.csv", gzip.compress(b"id,content\n1,a\n"), "not text but gzip data: give it"),
        ("x.csv", "id,content\n1,a\n".encode("utf-16"), "not text but UTF-16 text: convert it to UTF-8"),
        ("x.jsonl", lines_of(3).decode().encode("utf-16"), "not text but UTF-16 text: convert it to UTF-8"),
        ("x.csv", b"id,content\r1,a\r", "the row of column names has invalid CSV"),
        ("x.csv", b"id,\xe9\xe9,content\n1,a,b\n", "the row of column names has undecodable bytes"),
        ("x.parquet", b"", "not a parquet file but empty"),
        ("x.parquet", lines_of(5), "not a parquet file but plain text: give it"),
        ("x.arrow", b"", "not arrow data but empty"),
        ("x.arrow", lines_of(5), "not arrow data but plain text: give it"),
        ("x.arrow", arrow_of(10, "file")[:-20], "cut or damaged: ArrowInvalid: Not an Arrow file"),
        ("x.feather", b"FEA1" + b"\0" * 20, "not arrow data but Feather V1 data: give it"),
    ],
)
def test_a_file_that_is_something_else_is_damage(tmp_path: Path, name: str, data: bytes, said: str):
    items, reader = read(tmp_path / name, data)
    assert items == [] and [one.reason[: len(said)] for one in reader.damage] == [said]
    assert reader.bytes_read == len(data) and reader.sha256 == reader.piece.sha256()


def test_an_arrow_stream_that_is_cut_keeps_its_first_batches(tmp_path: Path):
    items, reader = read(tmp_path / "x.arrow", arrow_of(1000, "stream")[:-100], filters=RULES.filters)
    assert items == expected_of(1000, f"{tmp_path.name}/x.arrow", tmp_path.name)[:500]
    assert [one.reason[:16] for one in reader.damage] == ["cut or damaged: "]


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
    reader = DocumentReader(find_inputs([tmp_path / "x.parquet"])[0], filters=Filters(text_field=field))
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
    assert list(DocumentReader(file, filters=RULES)) == expected
    for count in (4, 7):
        pieces = split(file, count)
        readers = [DocumentReader(piece, filters=RULES) for piece in pieces]
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


def test_the_sample_is_shared_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture):
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
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(lines_of(400))[:-9])
    sample = list(sample_lines(find_inputs([tmp_path / "torn.jsonl.gz"]), 10_000_000))
    assert len(sample) == 400 and "the sample ends there" in capsys.readouterr().err
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
    sample = "\n".join(sample_lines(files, 25_000, Filters()))
    for word in ("tabular", "plain text", "set "):
        assert sample.count(word) > 10
    assert 25_000 <= len(sample) <= 28_000
    hexadecimal = np.isin(list(sample), list("0123456789abcdef")).sum()
    assert hexadecimal > 9000  # the packed files
