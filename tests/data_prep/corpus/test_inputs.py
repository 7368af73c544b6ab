"""Finding inputs of every kind and place, and cutting them into units of work."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.common.errors import UserError
from data_prep.corpus import inputs
from data_prep.corpus.finding import find_inputs, survey
from data_prep.corpus.inputs import InputFile, Piece, plan_units, split, whole


def touch(folder: Path, *names: str, data: bytes = b"") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


DATA = (
    "b/2.jsonl",
    "b/1.jsonl.gz",
    "a/9.JSONL.ZST",
    "a/8.jsonl.tar.gz",
    "a/7.tgz",
    "a/c/6.tar",
    "a/c/5.jsonl.tar.zst",
    "a/c/4.parquet",
    "z.jsonl",
)


def test_files_and_folders(tmp_path: Path):
    touch(tmp_path / "in", *DATA, "a/x.py", data=b"xyz")
    found = find_inputs([tmp_path / "in/z.jsonl", tmp_path / "in/b", tmp_path / "in/a"])
    assert [(file.name, file.kind, file.packing, file.is_tar) for file in found] == [
        ("in/z.jsonl", "jsonl", "", False),
        ("b/1.jsonl.gz", "packed", "gz", False),
        ("b/2.jsonl", "jsonl", "", False),
        ("a/7.tgz", "packed", "gz", True),
        ("a/8.jsonl.tar.gz", "packed", "gz", True),
        ("a/9.JSONL.ZST", "packed", "zst", False),
        ("c/4.parquet", "parquet", "", False),
        ("c/5.jsonl.tar.zst", "packed", "zst", True),
        ("c/6.tar", "packed", "", True),
    ]
    assert {file.size for file in found} == {3}
    assert all(Path(file.path).is_absolute() and file.source == file.name.split("/")[0] for file in found)


def test_what_is_refused(tmp_path: Path):
    touch(tmp_path, "c.jsonl", "d.xml", "empty/x.py", "zip/a.jsonl.zip", "none/.x.jsonl")
    for paths, message in (
        ([tmp_path, tmp_path / "zip/../c.jsonl"], "named twice"),
        ([tmp_path / "c.jsonl", f"file://{tmp_path}/c.jsonl"], "named twice"),
        ([tmp_path / "nowhere"], "does not exist"),
        ([""], "an input has no name"),
        ([tmp_path / "d.xml"], r"d.xml is neither of .jsonl, .json"),
        ([tmp_path / "*.xm"], r"\*.xm matches nothing"),
        ([tmp_path / "empty"], "holds no .jsonl, .json.* 1 file passed over: empty/x.py"),
        ([tmp_path / "none"], "holds no .jsonl.* passed over: 1 hidden name"),
        ([tmp_path / "zip"], "1 file passed over: zip/a.jsonl.zip; unpack"),
        (["memory://nowhere"], "does not exist"),
        (["noprotocol://x"], "cannot read noprotocol://x: ValueError: Protocol not known"),
        (["hf:"], "does not read like hf:"),
        (["hf:x?plit=train"], "does not read like hf:"),
        ([f"hf:{tmp_path}/empty"], "cannot read hf:"),
    ):
        with pytest.raises(UserError, match=message) as error:
            find_inputs(paths)
        assert "\n" not in str(error.value)


def test_text_files_count_only_where_nothing_else_is(tmp_path: Path):
    touch(
        tmp_path,
        "text/a.txt",
        "text/b/c.md",
        "text/b/d.txt.gz",
        "data/x.jsonl",
        "data/README.md",
        "data/l/LICENSE.txt",
    )
    assert [file.name for file in find_inputs([tmp_path / "text"])] == ["text/a.txt", "b/c.md", "b/d.txt.gz"]
    assert [file.name for file in find_inputs([tmp_path / "data"])] == ["data/x.jsonl"]
    assert survey([tmp_path / "text"]).not_read == []
    assert survey([tmp_path / "data"]).not_read == ["data/README.md", "l/LICENSE.txt"]
    assert find_inputs([tmp_path / "data/README.md"])[0].kind == "text"  # named, so it is meant


def test_files_passed_over_are_told(tmp_path: Path):
    touch(tmp_path, "a/p1.jsonl.br", "a/p2.zip", "a/p3.csv.7z", "b/good.jsonl", "b/n.html", "b/Makefile")
    touch(tmp_path, "a/good.jsonl")
    touch(tmp_path, "c/only.jsonl", "c/p4.zip")
    found = survey([tmp_path / "b", tmp_path / "a", tmp_path / "c/only.jsonl"])
    assert [file.name for file in found.files] == ["b/good.jsonl", "a/good.jsonl", "c/only.jsonl"]
    assert found.not_read == ["b/Makefile", "b/n.html", "a/p1.jsonl.br", "a/p2.zip", "a/p3.csv.7z"]
    (line,) = found.lines()
    assert line.startswith(
        "not read: 5 files passed over: b/Makefile, b/n.html, a/p1.jsonl.br, a/p2.zip, a/p3"
    )
    found.not_read.append("more.zip")
    assert "a/p3.csv.7z, …; unpack" in next(found.lines())


def test_folder_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ("CN/x.jsonl", "CN/news/x.jsonl", "CN/a/EN/b/x.jsonl", "news/CN/x.jsonl", "ENGLISH/x.jsonl")
    touch(tmp_path / "EN", *names)  # what lies above the input never counts
    for given, expected in (
        ("CN", ["en", "zh", "zh"]),
        ("CN/news", [None]),
        ("CN/a", ["en"]),
        ("news", ["zh"]),
        ("ENGLISH", [None]),
        ("CN/x.jsonl", [None]),  # a single file: by its text
    ):
        assert [file.folder_language for file in find_inputs([tmp_path / "EN" / given])] == expected
    monkeypatch.chdir(tmp_path / "EN/CN")
    assert [file.folder_language for file in find_inputs(["."])] == ["en", "zh", "zh"]


def test_links_keep_the_names_given(tmp_path: Path):
    touch(tmp_path, "store/blob.jsonl", data=b"{}")
    (tmp_path / "CN").mkdir()
    (tmp_path / "CN/part.jsonl").symlink_to(tmp_path / "store/blob.jsonl")
    (file,) = find_inputs([tmp_path / "CN"])
    assert (file.name, file.source, file.folder_language) == ("CN/part.jsonl", "CN", "zh")
    with pytest.raises(UserError, match="named twice"):
        find_inputs([tmp_path / "CN", tmp_path / "store"])


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path: Path):
    touch(tmp_path, "in/v3/x.jsonl", "in/a.jsonl", "store/y.jsonl", "store/deep/z.jsonl")
    for link, target in (
        ("in/b", "store"),  # elsewhere
        ("in/latest", "in/v3"),  # read by its own name, though the link's comes first
        ("in/v3/round", "in"),  # in circles
        ("store/deep/up", "store"),
        ("in/other", "store/deep"),  # read already
        ("in/nowhere", "none"),
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    names = ["in/a.jsonl", "deep/z.jsonl", "b/y.jsonl", "v3/x.jsonl"]
    assert [file.name for file in find_inputs([tmp_path / "in"])] == names
    (tmp_path / "again").symlink_to(tmp_path / "in")
    assert [file.name for file in find_inputs([tmp_path / "again"])] == ["again/a.jsonl", *names[1:]]


def test_names_that_are_not_utf8(tmp_path: Path):
    folder = os.fsencode(tmp_path) + b"/d\xff"
    os.mkdir(folder)
    for name in (b"b\xffd.jsonl", b"p\xff.zip"):
        with open(folder + b"/" + name, "wb") as out:
            out.write(b'{"content": "Text."}\n')
    found = survey([os.fsdecode(folder)])
    (file,) = found.files
    assert (file.name, file.source, found.not_read) == (r"d\xff/b\xffd.jsonl", r"d\xff", [r"d\xff/p\xff.zip"])
    with inputs.open_input(file) as stream:
        assert stream.read().startswith(b"{")


def test_a_stamp_tells_that_a_file_has_changed(tmp_path: Path, memory):
    touch(tmp_path, "x.jsonl", data=b"1")
    memory.pipe("/x.jsonl", b"1")
    places = (tmp_path / "x.jsonl", "memory://x.jsonl")
    before, again = ([find_inputs([place])[0] for place in places] for _ in range(2))
    assert before == again and all(file.stamp for file in before)
    os.utime(tmp_path / "x.jsonl", ns=(0, 5))
    memory.pipe("/x.jsonl", b"2")
    after = [find_inputs([place])[0] for place in places]
    assert after[0].stamp == "5" and after[1].stamp != before[1].stamp


def test_logins_are_not_shown():
    for path, shown in (
        ("ftp://me:secret@host:21/a@b/x.jsonl", "ftp://host:21/a@b/x.jsonl"),
        ("https://me:s@cret@host/x.jsonl", "https://host/x.jsonl"),
        ("zip://x.jsonl::ftp://me:secret@host/x.zip", "zip://x.jsonl::ftp://host/x.zip"),
        ("s3://bucket/a:b@c.jsonl", "s3://bucket/a:b@c.jsonl"),
        ("/home/a:b@c/x.jsonl", "/home/a:b@c/x.jsonl"),
        ("hf:a/b?split=train", "hf:a/b?split=train"),
    ):
        assert InputFile(path, "x", "", None, "jsonl", 1).shown_path == shown


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def test_remote_is_like_local(tmp_path: Path, memory):
    touch(tmp_path / "corpus", *DATA, "EN/web/1.jsonl", "README.md", "x.zip", data=b"12345")
    memory.put(str(tmp_path / "corpus"), "/bucket/corpus", recursive=True)
    local = find_inputs([tmp_path / "corpus"])
    for given in ("memory://bucket/corpus", "memory://bucket/corpus/"):
        remote = find_inputs([given])
        assert [file.path for file in remote] == [
            file.path.replace(f"{tmp_path}/", "memory://bucket/") for file in local
        ]
        other = {"path": "", "stamp": ""}
        assert [vars(a) | other for a in remote] == [vars(b) | other for b in local]
        assert (
            survey([given]).not_read
            == survey([tmp_path / "corpus"]).not_read
            == ["corpus/README.md", "corpus/x.zip"]
        )
    (one,) = find_inputs(["memory://bucket/corpus/EN/web/1.jsonl"])
    here = vars(find_inputs([tmp_path / "corpus/EN/web/1.jsonl"])[0])
    assert vars(one) == here | {"path": one.path, "stamp": one.stamp}
    with inputs.open_input(one) as stream:
        assert stream.read() == b"12345"
    assert find_inputs([f"file://{tmp_path}/corpus"]) == local


def file_of(size: int, name: str = "a/x.jsonl") -> InputFile:
    return InputFile(f"/{name}", name, "a", None, inputs.kind_of(name), size)


def test_units_cover_every_byte_once_and_depend_on_the_input_alone():
    random.seed(5)
    for _ in range(200):
        files = [
            file_of(
                random.choice([0, 1, 10, 999, 1000, 1001, 5000]), random.choice(["a/x.jsonl", "a/y.jsonl.gz"])
            )
            for _ in range(random.randint(1, 12))
        ]
        units = plan_units(files, 1000)
        assert units == plan_units(files, 1000)
        pieces = [piece for unit in units for piece in unit]
        for file in files:
            covered = [piece for piece in pieces if piece.file is file]
            assert covered[0].start == 0 and covered[-1].end == file.size
            assert all(a.end == b.start for a, b in zip(covered, covered[1:], strict=False))
            assert len(covered) == (1 if file.packing else max(1, -(-file.size // 1000)))
        order = [id(piece.file) for piece in pieces]
        assert list(dict.fromkeys(order)) == [id(file) for file in files]
        for unit in units:
            text = sum((piece.end - piece.start) * (3 if piece.file.packing else 1) for piece in unit)
            assert text <= 1000 + len(unit) or len(unit) == 1
        for one, two in zip(units, units[1:], strict=False):  # no unit that the next piece had room in
            sizes = [(p.end - p.start) * (3 if p.file.packing else 1) for p in (*one, two[0])]
            assert sum(sizes) > 1000 - len(sizes)


def test_the_size_of_a_unit_is_chosen_by_the_total():
    assert len(plan_units([file_of(7_000_000)])) == 1
    assert len(plan_units([file_of(80_000_000)])) == 10
    assert len(plan_units([file_of(256 * 10**8)])) == 256
    assert len(plan_units([file_of(10**12)])) == -(-(10**12) // 256_000_000)


def write_parquet(path: Path, groups: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("content", pa.string())])
    with pq.ParquetWriter(path, schema) as out:
        for number, rows in enumerate(groups):
            texts = [hashlib.sha256(f"{number}.{n}".encode()).hexdigest() * 5 for n in range(rows)]
            out.write_table(pa.table({"content": texts}, schema=schema))


def test_parquet_is_cut_between_row_groups(tmp_path: Path):
    write_parquet(tmp_path / "x.parquet", [10, 200, 10, 10, 100, 100])
    (file,) = find_inputs([tmp_path / "x.parquet"])
    assert whole(file) == Piece(file, 0, 6, file.size)
    assert [(p.start, p.end) for p in split(file, 3)] == [(0, 2), (2, 5), (5, 6)]
    assert [(p.start, p.end) for p in split(file, 99)] == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert sum(piece.size for piece in split(file, 4)) == file.size
    assert sum(len(unit) for unit in plan_units([file], file.size)) == 3
    write_parquet(tmp_path / "none.parquet", [])
    (file,) = find_inputs([tmp_path / "none.parquet"])
    assert split(file, 5) == [Piece(file, 0, 0, file.size)]
    touch(tmp_path, "bad.parquet", data=b"no parquet")
    (file,) = find_inputs([tmp_path / "bad.parquet"])
    assert plan_units([file]) == [[Piece(file, 0, 0, file.size)]]  # reported where it is read


def test_datasets(tmp_path: Path):
    import datasets

    rows = {"text": [f"Text {n}." for n in range(10)]}
    saved = datasets.Dataset.from_dict(rows, split="train")
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select(range(3))}).save_to_disk(tmp_path / "two")
    (file,) = find_inputs([f"hf:{tmp_path}/one"])
    assert (file.name, file.source, file.kind) == ("hf:one", "one", "dataset")
    assert [(p.start, p.end) for p in split(file, 3)] == [(0, 3), (3, 6), (6, 10)]
    datasets.Dataset.from_dict({"text": ["Other."] * 10}).save_to_disk(tmp_path / "three/one")
    assert file.stamp not in ("", find_inputs([f"hf:{tmp_path}/three/one"])[0].stamp)
    (file,) = find_inputs([f"hf:{tmp_path}/two?split=test"])
    assert file.name == "hf:two?split=test" and whole(file).end == 3
    for given, message in (
        (f"hf:{tmp_path}/two", "has the splits train, test; name one"),
        (f"hf:{tmp_path}/two?split=valid", "has the splits train, test; name one"),
        (f"hf:{tmp_path}/one?split=test", "no such split"),
        (f"hf:{tmp_path}/one?config=x", "no configurations"),
    ):
        with pytest.raises(UserError, match=message):
            find_inputs([given])


def test_a_folder_of_files_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    lines = [json.dumps({"text": f"Text {n}."}) for n in range(5)]
    (tmp_path / "folder/train.jsonl").write_text("\n".join(lines))
    (file,) = find_inputs([f"hf:{tmp_path}/folder"])
    assert (file.name, whole(file).end) == ("hf:folder", 5)
    inputs.open_dataset.cache_clear()
