"""Records as corpora hold them: odd JSON, arrays, csv, arrow, columns of bytes, exams, WanJuan 3.0."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.reading import PACKERS, read

from data_prep.common.errors import UserError
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject
from data_prep.corpus.filters import Filters
from data_prep.corpus.finding import find_inputs
from data_prep.corpus.inputs import split, whole
from data_prep.corpus.lines import cut_array
from data_prep.corpus.verified import find_damage

LONG = "9" * 5000


def told(items: list) -> list[str]:
    return [item.content if isinstance(item, RawDocument) else f"! {item.reason}" for item in items]


@pytest.mark.parametrize("limit", [None, 0, 640, 4300])
def test_numbers_of_any_length(tmp_path: Path, limit: int | None):
    lines = [
        '{"id": "a", "content": "Kept.", "n": LONG}',
        '{"id": LONG, "content": "An id.", "n": 1}',
        '{"id": "c", "content": "A digit less.", "n": -LESS}',
        '{"id": 7, "q_main": "Which?", "std_ans": LONG}',
        '{"id": "e", "content": "A float.", "n": LONG.5e3}',
    ]
    data = "\n".join(lines).replace("LONG", LONG).replace("LESS", "1" * 639).encode()
    before = sys.get_int_max_str_digits()
    try:
        if limit is not None:
            sys.set_int_max_str_digits(limit)
        items, _ = read(tmp_path / "x.jsonl", data)
        high, _ = read(tmp_path / "x.jsonl", data, filters=("n>2",))
    finally:
        sys.set_int_max_str_digits(before)
    assert [item.id for item in items] == ["a", LONG, "c", "7", "e"]
    assert items[3].content == f"Which?\nAnswer: {LONG}"
    assert [item.id for item in high if isinstance(item, RawDocument)] == ["a", "e"]


def test_repeated_keys_are_counted(tmp_path: Path):
    data = b'{"content": "One.", "content": "Two.", "id": "a"}\n'
    data += b'{"id": "b", "content": "x", "m": {"k": 1, "k": 2}}\n'
    data += b'{"id": "c", "content": "\\"k\\": 1, \\"k\\": 2", "m": [{"k": 1}, {"k": 2}]}\n'
    items, reader = read(tmp_path / "x.jsonl", data)
    assert told(items) == ["Two.", "x", '"k": 1, "k": 2'] and reader.repaired == {"duplicate keys": 2}


def test_the_limit_is_of_the_text_and_can_be_changed(tmp_path: Path):
    book = "Это книга. " * 100_000  # 1.9 MB, 5.5 MB in ASCII
    records = [
        {"id": "book", "content": book},
        {"id": "page", "content": "Short.", "html": "x" * 4_100_000},
        {"id": "long", "content": "y" * 4_000_001},
    ]
    data = "\n".join(map(json.dumps, records)).encode()
    for ending, pack in PACKERS.items():
        items, _ = read(tmp_path / f"x.jsonl{ending}", pack(data))
        assert told(items) == [book, "Short.", "! text too long"]
    assert told(read(tmp_path / "x.jsonl", data, max_text_mb=4.1)[0])[2] == "y" * 4_000_001
    assert told(read(tmp_path / "x.jsonl", data, max_text_mb=1)[0])[0] == "! text too long"
    assert "max_text_mb" not in Filters().to_dict()  # the fingerprints of earlier sets hold
    assert Filters.from_dict(Filters(max_text_mb=9).to_dict()).max_text_mb == 9


@pytest.mark.parametrize("ending", PACKERS)
def test_a_json_file_may_be_an_array(tmp_path: Path, ending: str):
    records = [{"id": str(n), "content": f'Text {n}, [with] "signs".'} for n in range(300)]
    for data in (
        json.dumps(records),
        json.dumps(records, indent=1),
        "\ufeff [" + ",\n".join(map(json.dumps, records)),
    ):
        data = data if data.endswith("]") else data + "]\n"
        items, reader = read(tmp_path / f"x.json{ending}", PACKERS[ending](data.encode()))
        assert [(item.id, item.content) for item in items] == [(r["id"], r["content"]) for r in records]
        assert len(split(reader.file, 5)) == 1 and reader.sha256 == reader.piece.sha256()
    broken = b'[{"content": "One."}, 3, {"content": "\xff"}, {"content": "Two."} {"content": "Lost."}]'
    items, _ = read(tmp_path / f"x.json{ending}", PACKERS[ending](broken))
    assert told(items) == [
        "One.",
        "! not an object",
        "! undecodable bytes",
        "Two.",
        "! invalid JSON from here to the end of the file",
    ]
    assert items[0].id.endswith(f"x.json{ending}#1")
    for data, expected in ((b"[]", []), (b"[", ["! invalid JSON from here to the end of the file"])):
        assert told(read(tmp_path / f"x.json{ending}", PACKERS[ending](data))[0]) == expected


def test_an_array_is_cut_the_same_at_any_chunk():
    data = json.dumps([1, -2.5e10, 'a]\\"', {"b": [None, True]}, "二😀", 12345], ensure_ascii=False).encode()
    whole = list(cut_array(iter([data]), 1 << 20))
    assert [json.loads(element) for element in whole] == json.loads(data)
    for step in range(1, len(data)):
        chunks = (data[at : at + step] for at in range(0, len(data), step))
        assert list(cut_array(chunks, 1 << 20)) == whole
    assert list(cut_array(iter([b'["' + b"x" * 99, b"x" * 99 + b'"]']), 50)) == [None]


@pytest.mark.parametrize("ending", PACKERS)
def test_csv(tmp_path: Path, ending: str):
    data = (
        b"\xef\xbb\xbfid,text,score\r\n"
        b'1,"One, with ""quotes""\nand a line.",0.5\r\n'
        b"2,Two.\r\n"
        b"3,\xff,1\r\n\r\n"
        b'4,"Four" oops,1\r\n'
        b"5,Low.,0.1\r\n"
        b"6,Last.,1"
    )
    rules = {"filters": ("score>0.2",)}
    items, reader = read(tmp_path / f"x.csv{ending}", PACKERS[ending](data), **rules)
    assert told(items) == [
        'One, with "quotes"\nand a line.',
        "! another number of columns than the first row",
        "! undecodable bytes",
        "! invalid CSV",
        "! filter: score>0.2",
        "Last.",
    ]
    assert [item.id for item in items if isinstance(item, RawDocument)] == ["1", "6"]
    assert [item.line for item in items] == [1, 2, 3, 4, 5, 6]
    assert reader.sha256 == reader.piece.sha256() and reader.lines == 6
    tabs = b"body\tlanguage\nEin Text, \xe2\x80\x9ekurz\xe2\x80\x9c.\tGerman\n"
    items, _ = read(tmp_path / f"x.tsv{ending}", PACKERS[ending](tabs))
    assert [(item.content, item.language) for item in items] == [("Ein Text, „kurz“.", "de")]
    items, _ = read(tmp_path / f"x.csv{ending}", PACKERS[ending](b"id;content\n1;A, b.\n"))
    assert told(items) == ["A, b."]
    with pytest.raises(UserError, match="which column holds the text .it has a, b.; name it"):
        read(tmp_path / f"x.csv{ending}", PACKERS[ending](b"a,b\n1,2\n"))
    assert told(read(tmp_path / f"x.csv{ending}", PACKERS[ending](b"a,b\n1,2\n"), text_field="b")[0]) == ["2"]
    items, reader = read(tmp_path / f"x.csv{ending}", PACKERS[ending](b'{"content": "JSON."}\n'))
    assert items == [] and "not csv but JSON" in reader.damage[0].reason


def test_an_open_quote_costs_no_silence(tmp_path: Path):
    items, _ = read(tmp_path / "x.csv", b'id,text\n1,Good.\n2,"open\n3,Lost.\n')
    assert told(items) == ["Good.", "! invalid CSV"]


def test_a_row_torn_by_damage_is_not_given(tmp_path: Path):
    first, second = b"id,text\n1,Whole.\n2,To", b"rn.\n3,Lost.\n"
    damaged = bytearray(gzip.compress(second))
    damaged[-8] ^= 1  # in the checksum
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(first) + damaged + gzip.compress(b"4,After.\n"))
    (file,) = find_inputs([tmp_path])
    reader = DocumentReader(file, damage=find_damage(whole(file)))
    assert told(list(reader)) == ["Whole."] and len(reader.damage) == 1
    assert reader.sha256 == reader.piece.sha256()


@pytest.mark.parametrize("form", ["file", "stream", "feather"])
def test_arrow_files(tmp_path: Path, form: str):
    table = pa.table(
        {"id": [str(n) for n in range(500)], "text": [f"Text {n}." for n in range(500)], "n": range(500)}
    )
    name = "x.feather" if form == "feather" else "x.arrow"
    if form == "feather":
        import pyarrow.feather

        pyarrow.feather.write_feather(table, tmp_path / name, compression="zstd", chunksize=90)
    else:
        make = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with make(tmp_path / name, table.schema) as out:
            out.write_table(table, max_chunksize=90)
    reader = DocumentReader(find_inputs([tmp_path])[0], filters=Filters(filters=("n<480",)))
    items = list(reader)
    assert told(items) == [f"Text {n}." for n in range(480)] + ["! filter: n<480"] * 20
    assert [item.id for item in items[:480]] == [str(n) for n in range(480)]
    assert reader.sha256 == reader.piece.sha256() and reader.bytes_read == reader.file.size
    (tmp_path / name).write_bytes(b"no arrow data at all")
    reader = DocumentReader(find_inputs([tmp_path])[0])
    assert list(reader) == [] and "not arrow data" in reader.damage[0].reason


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_columns_of_bytes_are_read_as_utf8(tmp_path: Path, kind: pa.DataType):
    columns = {
        "id": pa.array([b"a", b"\xff\xfe", b"c"], kind),
        "content": pa.array(["One. 二".encode(), b"Two.", b"\xff"], kind),
        "image": pa.array([b"\xff"] * 3, kind),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    items = list(DocumentReader(find_inputs([tmp_path / "x.parquet"])[0]))
    assert told(items) == ["One. 二", "Two.", "! undecodable bytes"]
    assert [item.id for item in items[:2]] == ["a", f"{tmp_path.name}/x.parquet#2"]
    pq.write_table(pa.table({"body": columns["content"], "n": [1, 2, 3]}), tmp_path / "x.parquet")
    assert told(list(DocumentReader(find_inputs([tmp_path / "x.parquet"])[0])))[0] == "One. 二"


FORMULAS = {"q_main": "$x^2=4$, $x=?$", "option_a": "1", "std_ans": "B", "answer_detail": "$2^2=4$"}


@pytest.mark.parametrize(
    ("place", "record", "labels"),
    [
        ("CN/Exam-cn/part.jsonl", FORMULAS, ("答案：", "解析：")),
        ("Exam-cn/part.jsonl", FORMULAS, ("答案：", "解析：")),
        ("EN/exam/part.jsonl", FORMULAS, ("Answer: ", "Explanation: ")),
        ("exam/part.jsonl", FORMULAS | {"language": "zh-CN"}, ("答案：", "解析：")),
        ("EN/exam/part.jsonl", FORMULAS | {"q_main": "下列哪个是质数？"}, ("答案：", "解析：")),
    ],
)
def test_exam_labels_follow_the_language_of_the_folder(
    tmp_path: Path, place: str, record: dict, labels: tuple
):
    read(tmp_path / "in" / place, json.dumps(record).encode())
    (item,) = DocumentReader(find_inputs([tmp_path / "in"])[0])
    assert item.content.split("\n")[-2:] == [f"{labels[0]}B", f"{labels[1]}$2^2=4$"]


def test_members_of_one_name_have_ids_of_their_own(tmp_path: Path):
    import io
    import tarfile

    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as archive:
        for name in ("a/p.jsonl", "./a/p.jsonl", "a/._p.jsonl", "a/q.json"):
            facts, data = tarfile.TarInfo(name), json.dumps({"content": name}).encode()
            facts.size = len(data)
            archive.addfile(facts, io.BytesIO(data))
    items, _ = read(tmp_path / "t.tar", stored.getvalue())
    name = f"{tmp_path.name}/t.tar"
    assert [item.id for item in items if isinstance(item, RawDocument)] == [
        f"{name}!a/p.jsonl@0",
        f"{name}!a/p.jsonl:2@0",
        f"{name}!a/q.json@0",
    ]
    assert Reject(0, "not a .jsonl member", "a/._p.jsonl") in items


def test_wanjuan_3(tmp_path: Path):
    """raw/<class>/<source>/part-*.jsonl.gz with content, title, labels and sub_path, without an id."""
    expected = []
    for kind in ("news", "law"):
        for source in ("web-a", "web-b"):
            for part in range(2):
                rows = [
                    {
                        "content": f"เนื้อหา {kind} {source} {part} {n}",
                        "title": "ชื่อ",
                        "labels": {"type": kind, "quality": n / 4},
                        "sub_path": f"{kind}/{source}",
                    }
                    for n in range(3)
                ]
                folder = tmp_path / "WanJuan-Thai/raw" / kind / source
                folder.mkdir(parents=True, exist_ok=True)
                data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
                (folder / f"part-{part:05d}.jsonl.gz").write_bytes(gzip.compress(data))
                expected += [(row["content"], source, row["labels"]["quality"]) for row in rows]
    files = find_inputs([tmp_path / "WanJuan-Thai"])
    rules = Filters(filters=("labels.quality>=0.25",))
    items = [item for file in files for item in DocumentReader(file, "th", rules)]
    kept = [item for item in items if isinstance(item, RawDocument)]
    assert len(items) == 24 and {(i.content, i.source) for i in kept} == {
        e[:2] for e in expected if e[2] >= 0.25
    }
    assert {item.language for item in kept} == {"th"}
    assert len({item.id for item in kept}) == 16  # also where class folders repeat a source's files
    assert kept[0].id.startswith("law/web-a/part-00000.jsonl.gz@")
    assert {os.path.basename(file.name) for file in files} == {"part-00000.jsonl.gz", "part-00001.jsonl.gz"}


def test_datasets_by_slice_and_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part in range(2):
        rows = [{"id": f"{part}-{n}", "text": f"Text {part} {n}."} for n in range(50)]
        path = tmp_path / f"set/part-{part}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    every = [f"{part}-{n}" for part in range(2) for n in range(50)]

    def ids(query: str) -> list[str]:
        (file,) = find_inputs([f"hf:{tmp_path}/set?{query}"])
        return [item.id for piece in split(file, 9) for item in DocumentReader(piece)]

    assert ids("split=train[:10%25]") == ids("split=train[:10%]") == every[:10]
    assert ids("split=train[40:60]") == ids("split=train[40:60]&streaming=true") == every[40:60]
    assert ids("split=train[:2]+train[-2:]") == every[:2] + every[-2:]
    assert ids("streaming=true") == every
    (file,) = find_inputs([f"hf:{tmp_path}/set?streaming=true"])
    pieces = split(file, 2)
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 1), (1, 2)]
    readers = [DocumentReader(piece) for piece in pieces]
    assert [len(list(reader)) for reader in readers] == [50, 50]
    assert [reader.sha256 for reader in readers] == [piece.sha256() for piece in pieces]
    for query, message in (
        ("split=train[:10%]&streaming=true", "a stream has no share"),
        ("split=test[:3]", "has the splits train"),
        ("split=train[:x]", "Unrecognized instruction"),
        ("streaming=yes", "does not read like"),
    ):
        with pytest.raises(UserError, match=message):
            ids(query)
    path.write_text('{"id": "x", "other": 5}')
    with pytest.raises(UserError, match="caused by .*column names don't match"):
        find_inputs([f"hf:{tmp_path}/set"])


def test_columns_that_occur_twice_are_counted(tmp_path: Path):
    items, reader = read(tmp_path / "x.csv", b"content,id,content\nbefore,1,after\n")
    assert [item.content for item in items] == ["after"] and reader.repaired == {"duplicate keys": 1}
