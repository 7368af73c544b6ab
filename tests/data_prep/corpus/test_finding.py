"""Nothing below a named input is dropped without a word: it is read, reported, or passed over and counted."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.paths import REPOSITORY

from data_prep.common.errors import UserError
from data_prep.corpus.documents import DocumentReader
from data_prep.corpus.filters import Filters
from data_prep.corpus.finding import find_inputs, survey


def line(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def touch(folder: Path, *names: str, data: bytes = line(content="Text.")) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def texts(*inputs: str | Path, **rules) -> list[str]:
    """The contents of all documents."""
    readers = [DocumentReader(file, filters=Filters(**rules)) for file in find_inputs(inputs)]
    return [item.content for reader in readers for item in reader]


def test_hidden_names_and_leftovers_are_passed_over_and_counted(tmp_path: Path):
    touch(tmp_path / "in", "part.jsonl", "b/_data.jsonl", "b/_other/x.jsonl")
    hidden = (".ipynb_checkpoints/p.jsonl", "._part.jsonl", ".cache/dl/x.jsonl", "b/.hidden.jsonl")
    left = ("_temporary/0/task/part.jsonl", "_SUCCESS", "b/.x.crc", "b/part.jsonl.crc", "__MACOSX/part.jsonl")
    touch(tmp_path / "in", *hidden, *left, data=b"\xff")
    found = survey([tmp_path / "in"])
    names = ["b/_data.jsonl", "_other/x.jsonl", "in/part.jsonl"]
    assert [file.name for file in found.files] == names
    assert found.passed_over == {"hidden name(s)": 5, "leftover(s) of other programs": 4}
    assert list(found.lines()) == ["passed over: 5 hidden names, 4 leftovers of other programs"]
    # What is named is meant.
    for given in ("._part.jsonl", ".cache", ".ca*/dl", "_temporary/0/task/part.jsonl"):
        assert len(find_inputs([tmp_path / "in" / given])) == 1
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "in"), "/in", recursive=True)
    try:
        remote = survey(["memory://in"])
        assert [file.name for file in remote.files] == names and sum(remote.passed_over.values()) == 9
    finally:
        memory.rm("/", recursive=True)


ENDINGS = (".json", ".ndjson", ".jsonlines", ".jl", ".jsonl")
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".gzip": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def test_every_usual_name_of_json_lines_is_read(tmp_path: Path):
    for ending in ENDINGS:
        for packing, pack in PACK.items():
            touch(tmp_path, f"x{ending}{packing}", data=pack(line(content=ending + packing) * 2))
    assert sorted(texts(tmp_path)) == sorted(
        ending + packing for ending in ENDINGS for packing in PACK for _ in "12"
    )
    assert [file.name.split("/")[1] for file in find_inputs([tmp_path / "x.json.gz"])] == ["x.json.gz"]


def test_other_endings_are_reported(tmp_path: Path):
    touch(tmp_path / "in", "a.jsonl", "j.jsonl.br", "k.xml", "Makefile", "p.parquet.gz", "a.jsonl.part")
    found = survey([tmp_path / "in"])
    assert [file.name for file in found.files] == ["in/a.jsonl"]
    names = ["Makefile", "a.jsonl.part", "j.jsonl.br", "k.xml", "p.parquet.gz"]
    assert found.not_read == [f"in/{name}" for name in names]


def test_dangling_and_circular_links_are_lost_not_dropped(tmp_path: Path):
    touch(tmp_path / "in", "good.jsonl", "deep/good.jsonl")
    for name, target in (
        ("lost.jsonl", "/nonexistent/blob"),
        ("deep/self.jsonl", "self.jsonl"),
        ("folder", "gone"),
    ):
        (tmp_path / "in" / name).symlink_to(target)
    found = survey([tmp_path / "in"])
    assert [file.name for file in found.files] == ["deep/good.jsonl", "in/good.jsonl"]
    assert sorted(one.split(" (")[0] for one in found.lost) == [
        "deep/self.jsonl",
        "in/folder",
        "in/lost.jsonl",
    ]
    assert "in/lost.jsonl (a link to nothing)" in found.lost
    assert "cannot be read: " in next(found.lines())


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder with two folders that cannot be opened. Permissions do not hold for root: it steps back."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = Path(folder) / "in"
        touch(root, "good.jsonl", "closed/x.jsonl", "open/deep/closed/x.jsonl")
        places = root / "closed", root / "open/deep/closed"
        for place in places:
            place.chmod(0)
        if os.getuid() == 0:
            os.seteuid(65534)
        yield root
        os.seteuid(os.getuid())
        for place in places:
            place.chmod(0o755)


def test_unreadable_folders_are_lost_not_dropped(closed: Path):
    for given in (closed, closed.parent / "i*"):
        found = survey([given])
        assert [file.name for file in found.files] == ["in/good.jsonl"]
        assert found.lost == ["in/closed (Permission denied)", "deep/closed (Permission denied)"]
    with pytest.raises(UserError, match="1 name below the input cannot be read: in/closed"):
        survey([closed / "closed"])


def test_links_to_a_neighbour_are_read_once_by_the_own_name(tmp_path: Path):
    touch(tmp_path / "in", "b.jsonl", "d/c.jsonl")
    (tmp_path / "in/a.jsonl").symlink_to("b.jsonl")
    (tmp_path / "in/latest.jsonl").symlink_to("a.jsonl")
    (tmp_path / "in/d/d").symlink_to("../d")
    os.link(tmp_path / "in/d/c.jsonl", tmp_path / "in/d/z.jsonl")
    found = survey([tmp_path / "in"])
    assert [file.name for file in found.files] == ["in/b.jsonl", "d/c.jsonl"]
    assert found.passed_over == {"second name(s) of files read": 3}


def test_what_is_no_file_is_reported_and_not_opened(tmp_path: Path):
    touch(tmp_path / "in", "a.jsonl")
    os.mkfifo(tmp_path / "in/pipe.jsonl")  # reading it would wait for ever
    found = survey([tmp_path / "in"])
    assert found.not_read == ["in/pipe.jsonl/(no regular file)"] and len(found.files) == 1


def test_the_output_is_passed_over(tmp_path: Path):
    touch(tmp_path / "in", "a.jsonl", "shards/quarantine.jsonl")
    found = survey([tmp_path / "in"], tmp_path / "in/shards")
    assert [file.name for file in found.files] == ["in/a.jsonl"] and found.passed_over == {"output folder": 1}


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path / "c", "EN/a.jsonl", "EN/web/b.jsonl", "CN/c.jsonl", "CN/.d.jsonl", "x[1].jsonl", "n.html")
    monkeypatch.chdir(tmp_path)
    for pattern, names in (
        ("c/*/*.jsonl", ["CN/c.jsonl", "EN/a.jsonl"]),
        ("c/**/*.jsonl", ["CN/c.jsonl", "EN/a.jsonl", "web/b.jsonl", "c/x[1].jsonl"]),
        ("c/E*", ["EN/a.jsonl", "web/b.jsonl"]),
        (f"{tmp_path}/c/[CE]N/?.jsonl", ["CN/c.jsonl", "EN/a.jsonl"]),
        ("c/x[1].jsonl", ["c/x[1].jsonl"]),  # a file of this name comes before the pattern
        ("*/n*", None),
        ("c/*.jsonl.gz", None),
    ):
        if names is None:
            with pytest.raises(UserError, match="n.html|matches nothing"):
                find_inputs([pattern])
        else:
            assert [file.name for file in find_inputs([pattern])] == names
    assert [file.folder_language for file in find_inputs(["c/*/*.jsonl"])] == ["zh", "en"]
    memory = fsspec.filesystem("memory")
    memory.put("c", "/bucket/c", recursive=True)
    try:
        for pattern in ("c/*/*.jsonl", "c/E*"):
            local, remote = find_inputs([pattern]), find_inputs([f"memory://bucket/{pattern}"])
            assert [f.name for f in remote] == [f.name for f in local]
            assert [f.folder_language for f in remote] == [f.folder_language for f in local]
            assert texts(f"memory://bucket/{pattern}") == texts(pattern)
    finally:
        memory.rm("/", recursive=True)


def test_archives_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("d/a.jsonl", line(content="A."))
        archive.writestr("d/e/b.jsonl.gz", gzip.compress(line(content="B.")))
        archive.writestr("c.jsonl", line(content="C.") * 300)
    monkeypatch.chdir(tmp_path)
    for url, expected in (
        ("zip://d/a.jsonl::x.zip", ["A."]),
        (f"zip://d::{tmp_path}/x.zip", ["A.", "B."]),
        ("zip://d/*.jsonl::x.zip", ["A."]),
        ("zip://::x.zip", ["C."] * 300 + ["A.", "B."]),
        ("zip://**::file://x.zip", ["C."] * 300 + ["A.", "B."]),
        (f"zip://c.jsonl::simplecache::file://{tmp_path}/x.zip", ["C."] * 300),
    ):
        assert texts(url) == expected, url
    assert [file.name for file in find_inputs(["zip://::x.zip"])] == [
        "x.zip/c.jsonl",
        "d/a.jsonl",
        "e/b.jsonl.gz",
    ]
    with pytest.raises(UserError, match="x.zip; unpack what is packed otherwise"):
        find_inputs([tmp_path])
    with pytest.raises(UserError, match="does not exist|matches nothing"):
        find_inputs(["zip://none::x.zip"])


def test_partition_folders_are_fields(tmp_path: Path):
    touch(
        tmp_path / "t", "lang=vi/date=2024-01/a.jsonl", "lang=__HIVE_DEFAULT_PARTITION__/date=2%2F3/b.jsonl"
    )
    (tmp_path / "t/lang=deu/date=2025-01").mkdir(parents=True)
    pq.write_table(pa.table({"content": ["Drei."]}), tmp_path / "t/lang=deu/date=2025-01/c.parquet")
    files = find_inputs([tmp_path / "t"])
    assert [(file.folder_language, dict(file.fields)) for file in files] == [
        (None, {"lang": None, "date": "2/3"}),
        ("de", {"lang": "deu", "date": "2025-01"}),
        ("vi", {"lang": "vi", "date": "2024-01"}),
    ]
    documents = [
        item for file in files for item in DocumentReader(file, filters=Filters(filters=("date>2024-02",)))
    ]
    assert [getattr(item, "language", None) or item.reason for item in documents] == [
        "filter: date>2024-02",
        "de",
        "filter: date>2024-02",
    ]
    # A record's own field comes first.
    touch(tmp_path / "u", "date=2024-01/a.jsonl", data=line(content="Own.", date="2026-01"))
    assert texts(tmp_path / "u", filters=("date>2025-01",)) == ["Own."]


def test_names_are_kept_apart(tmp_path: Path):
    names = ("2023-01/en/p.jsonl", "2023-02/en/p.jsonl", "2023-02/de/p.jsonl", "x/2023-01/en/p.jsonl")
    for name in names:
        touch(tmp_path / "in", name, data=line(content=name))
    files = find_inputs([tmp_path / "in"])
    assert [file.name for file in files] == [
        "in/2023-01/en/p.jsonl",
        "de/p.jsonl",
        "2023-02/en/p.jsonl",
        "x/2023-01/en/p.jsonl",
    ]
    assert [file.source for file in files] == ["en", "de", "en", "en"]
    documents = [item for file in files for item in DocumentReader(file)]
    assert [item.id for item in documents] == [f"{file.name}@0" for file in files]
    given = [tmp_path / "in/2023-01/en", tmp_path / "in/2023-02/en"]
    assert [file.name for file in find_inputs(given)] == ["2023-01/en/p.jsonl", "2023-02/en/p.jsonl"]


@pytest.mark.parametrize("given", ["-", "/dev/stdin"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst", ".xz", ".bz2"])
def test_standard_input(given: str, packing: str):
    code = (
        "import sys; from data_prep.corpus.documents import DocumentReader; "
        "from data_prep.corpus.finding import find_inputs; (f,) = find_inputs([sys.argv[1]]); "
        "assert find_inputs([sys.argv[1]]) == [f]; print(f.name, *(d.content for d in DocumentReader(f)))"
    )
    data = PACK[packing](line(content="One.") + line(content="Two."))
    command = [sys.executable, "-c", code, given]
    done = subprocess.run(command, input=data, capture_output=True, cwd=REPOSITORY, check=True)
    assert done.stdout.decode() == f"stdin/stdin.jsonl{packing} One. Two.\n"


def test_a_named_pipe_is_read_once(tmp_path: Path):
    os.mkfifo(tmp_path / "rows.jsonl")
    writer = subprocess.Popen(["sh", "-c", f'echo \'{{"content": "Piped."}}\' > {tmp_path}/rows.jsonl'])
    assert texts(tmp_path / "rows.jsonl") == texts(tmp_path / "rows.jsonl") == ["Piped."]
    assert find_inputs([tmp_path / "rows.jsonl"])[0].name == "stdin/rows.jsonl"
    assert writer.wait() == 0
