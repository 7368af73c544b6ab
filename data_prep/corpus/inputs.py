"""Finds the files that the user named, and splits them into the pieces that make units of work.

Units depend on the inputs alone, never on workers. Only names, sizes, and the footers of parquet files are
read here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl, urlencode

from data_prep.common.errors import UserError, first_line

# Tried in this order; names are compared in lower case.
KINDS = {
    "packed": (".jsonl.gz", ".jsonl.zst", ".tar", ".tar.gz", ".tgz", ".tar.zst"),
    "jsonl": (".jsonl",),
    "parquet": (".parquet",),
    "text": tuple(ending + packing for ending in (".txt", ".md") for packing in ("", ".gz", ".zst")),
}
ENDINGS = ".jsonl, .jsonl.gz, .jsonl.zst, .tar, .tar.gz, .tgz, .tar.zst, .parquet, .txt or .md"
# Packed files of other kinds are reported, not read.
PACKED_ENDINGS = (".gz", ".tar", ".tgz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".rar")
FOLDER_LANGUAGES = {"EN": "en", "CN": "zh"}  # WanJuan's folder names
DATASET = "hf:"
CHUNK_BYTES = 1 << 20
ROWS = 64  # of a table, in memory at once
UNPACKED = 3  # approximate bytes of text per stored byte of a packed file
UNITS, LEAST_UNIT, MOST_UNIT = 256, 8_000_000, 256_000_000  # bytes of text
# Keys of fsspec's file info that change with a remote file; the first one present is used.
STAMPS = ("etag", "ETag", "checksum", "mtime", "LastModified", "created")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")
_LOGIN = re.compile(r"(?<=://)[^/?#]*@")


@dataclass(frozen=True)
class InputFile:
    """One file or dataset to read.

    Attributes:
        path: absolute path, URL or `hf:` name.
        name: last folder and file name, for manifests (no machine's paths).
        source: the file's folder, or the dataset's name.
        folder_language: of the nearest folder named EN or CN, up to the input path's own name.
        kind: jsonl, packed (one piece), text (one document), parquet or dataset.
        size: stored bytes; of a dataset, in memory.
        stamp: changes with the file (time, etag, a dataset's fingerprint); "" if unknown.
    """

    path: str
    name: str
    source: str
    folder_language: str | None
    kind: str
    size: int
    stamp: str = ""

    @property
    def shown_path(self) -> str:
        """`path` without the user and password of a URL."""
        return _LOGIN.sub("", self.path) if _URL.match(self.path) else self.path

    @property
    def packing(self) -> str:
        """`gz`, `zst`, or "" for an uncompressed file."""
        name = self.name.lower()
        return "gz" if name.endswith((".gz", ".tgz")) else "zst" if name.endswith(".zst") else ""

    @property
    def is_tar(self) -> bool:
        return self.kind == "packed" and bool(re.search(r"\.(tar|tgz)(\.gz|\.zst)?$", self.name.lower()))


@dataclass(frozen=True)
class Piece:
    """A part of a file: from `start` up to `end`, in bytes, in row groups (parquet) or rows (dataset).

    A record of a jsonl file belongs to the piece that holds its first byte. `size`: approximate stored bytes.
    """

    file: InputFile
    start: int
    end: int
    size: int = 0

    def sha256(self) -> str:
        """Hash of the stored bytes; of the rows, for a dataset. Raises `UserError` when it cannot be read."""
        found = hashlib.sha256()
        with user_errors(self.file.path):
            if self.file.kind == "parquet":
                with open_parquet(self.file) as table:
                    hash_row_groups(found, self, table.metadata)
            elif self.file.kind == "dataset":
                rows = open_dataset(self.file.path).with_format("arrow")
                for at in range(self.start, self.end, ROWS):
                    hash_rows(found, rows[at : min(at + ROWS, self.end)])
            else:
                with open_input(self.file) as stream:
                    hash_range(found, stream, self.start, self.end - self.start)
        return found.hexdigest()


# Finding ------------------------------------------------------------------------------------------------


def survey(paths: Iterable[str | Path]) -> tuple[list[InputFile], list[str]]:
    """The inputs named by `paths`, and the names of skipped files.

    Inputs are files, folders (searched in sorted order), their URLs, and `hf:` datasets. Text files in a
    folder count only when it holds nothing else: a README beside data is not a document. Skipped files may
    hold text but are not read: other packings, or text beside data.

    Raises:
        UserError: a path is missing, of another kind, or named twice, or a folder has no inputs.
    """
    files: list[InputFile] = []
    passed: list[str] = []
    for given in map(_spelled, paths):
        if given.startswith(DATASET):
            files.append(_dataset_input(given))
            continue
        place = _Place(given)
        found, unread = place.choose()
        if not found:
            advice = f", only {unread_line(unread)}" if unread else ""
            raise UserError(f"input folder {given} holds no {ENDINGS} file{advice}")
        files += map(place.input_file, found)
        passed += unread
    seen: set[str] = set()
    for file in files:
        real = file.path if _URL.match(file.path) else os.path.realpath(file.path)
        if real in seen:
            raise UserError(f"input {file.path} is named twice; give each file once")
        seen.add(real)
    return files, passed


def find_inputs(paths: Iterable[str | Path]) -> list[InputFile]:
    """The inputs of `survey`."""
    return survey(paths)[0]


def find_unread(paths: Iterable[str | Path]) -> list[str]:
    """The skipped files of `survey`."""
    return survey(paths)[1]


def unread_line(unread: list[str], shown: int = 5) -> str:
    """One line about skipped files: how many, the first few, what to do."""
    more = ", …" if len(unread) > shown else ""
    files = f"{len(unread)} file{'s' if len(unread) > 1 else ''} passed over"
    names = ", ".join(unread[:shown])
    return f"{files}: {names}{more}; unpack what is packed otherwise, name text files one by one"


def kind_of(name: str) -> str | None:
    """The kind of a file by its name, None for files that cannot be read."""
    name = name.lower()
    return next((kind for kind, endings in KINDS.items() if name.endswith(endings)), None)


def _spelled(given: str | Path) -> str:
    given = os.fspath(given)
    return given.removeprefix("file://") if given.startswith("file://") else given


class _Place:
    """A file or folder that a user named, local or behind a URL.

    `parts` of an entry: the input path's own name and the names below it. Folders above the input depend on
    the machine and must not change the result.
    """

    def __init__(self, given: str):
        self.given = given
        self._remote = bool(_URL.match(given))
        # Path to open → (parts, size, stamp).
        self._entries: dict[str, tuple[tuple[str, ...], int, str]] = {}
        if self._remote:
            with user_errors(given):
                self.is_folder = self._list_remote()
        else:
            self.is_folder = self._list_local()
        if not self.is_folder and kind_of(self._name(next(iter(self._entries)))) is None:
            raise UserError(f"input {given} is neither of {ENDINGS}")

    def _list_local(self) -> bool:
        root = Path(os.path.abspath(self.given))
        if root.is_dir():
            for path in sorted(_files_below(root)):
                self._add_local(path, (root.name, *path.relative_to(root).parts))
            return True
        if not root.is_file():
            raise UserError(f"input {self.given} does not exist")
        # Links are followed when read; name and folder are the given ones.
        self._add_local(root, (root.name,))
        return False

    def _add_local(self, path: Path, parts: tuple[str, ...]) -> None:
        facts = path.stat()
        self._entries[str(path)] = parts, facts.st_size, str(facts.st_mtime_ns)

    def _list_remote(self) -> bool:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(self.given)
        root = root.rstrip("/")
        if is_folder := files.isdir(root):
            found = files.find(root, detail=True)
        elif files.exists(root):
            found = {root: files.info(root)}
        else:
            raise UserError(f"input {self.given} does not exist")
        above = len(_split(root)) - 1
        for path, facts in sorted(found.items(), key=lambda item: _split(item[0])):
            if _may_hold_text(path.split("/")[-1]) or not is_folder:
                if facts.get("size") is None:
                    raise UserError(f"input {path} does not tell its size; copy it to this machine first")
                url = self.given.rstrip("/") + path.removeprefix(root)
                stamp = next((str(facts[name]) for name in STAMPS if facts.get(name) is not None), "")
                self._entries[url] = tuple(_split(path)[above:]), facts["size"], stamp
        return is_folder

    def choose(self) -> tuple[list[str], list[str]]:
        """(paths to read, names of the files passed over)."""
        kinds = {path: kind_of(self._name(path)) for path in self._entries}
        only_text = not set(kinds.values()) - {"text", None}
        read = [path for path, kind in kinds.items() if kind and (only_text or kind != "text")]
        taken = set(read)
        passed = [self._shown(path) for path in kinds if path not in taken]
        return read, passed if self.is_folder else []

    def input_file(self, path: str) -> InputFile:
        parts, size, stamp = self._entries[path]
        # A file that was named itself has no folder within the input.
        folders = parts[:-1] if self.is_folder else ()
        language = folder_language(folders)
        kind = kind_of(parts[-1])
        source = _in_utf8(_folder_of(path))
        return InputFile(path, self._shown(path), source, language, kind, size, stamp)

    def _name(self, path: str) -> str:
        return self._entries[path][0][-1]

    def _shown(self, path: str) -> str:
        return _in_utf8(f"{_folder_of(path)}/{self._name(path)}")


def _files_below(root: Path) -> Iterator[Path]:
    """Files below a folder that may hold text, by name. Links to folders are followed, but each folder is
    entered once, by its own name if possible: links may be circular."""
    entered: set[str] = set()
    starts = deque([str(root)])
    while starts:
        for folder, folders, names in os.walk(starts.popleft()):
            if (real := os.path.realpath(folder)) in entered:
                folders.clear()
                continue
            entered.add(real)
            folders.sort()
            starts += filter(os.path.islink, (os.path.join(folder, name) for name in folders))
            yield from filter(Path.is_file, (Path(folder, name) for name in names if _may_hold_text(name)))


def folder_language(parts: Iterable[str]) -> str | None:
    """The language of the nearest folder named EN or CN; the last of `parts` is the nearest."""
    return next((FOLDER_LANGUAGES[part] for part in reversed(tuple(parts)) if part in FOLDER_LANGUAGES), None)


def _may_hold_text(name: str) -> bool:
    return kind_of(name) is not None or name.lower().endswith(PACKED_ENDINGS)


def _in_utf8(name: str) -> str:
    """A file name with bytes that are not UTF-8 written as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _folder_of(path: str) -> str:
    parts = _split(_URL.sub("/", path))
    return parts[-2] if len(parts) > 1 else ""


# Planning -----------------------------------------------------------------------------------------------


def plan_units(files: list[InputFile], unit_bytes: int | None = None) -> list[list[Piece]]:
    """Units of work of about `unit_bytes` bytes of text (None: chosen by the total), in the order of `files`.

    Consecutive small files share a unit; large files are split where possible. A function of `files` and
    `unit_bytes` alone. Raises `UserError` on a parquet file or dataset that cannot be opened.
    """
    texts = [_text_bytes(file) for file in files]
    if unit_bytes is None:
        unit_bytes = min(max(sum(texts) // UNITS, LEAST_UNIT), MOST_UNIT)
    units: list[list[Piece]] = []
    room = 0
    for file, text in zip(files, texts, strict=True):
        pieces = split(file, -(-text // max(unit_bytes, 1)))
        for piece in pieces:
            share = -(-text // len(pieces))
            if not units or share > room:
                units.append([])
                room = unit_bytes
            units[-1].append(piece)
            room -= share
    return units


def whole(file: InputFile) -> Piece:
    """All of a file as one piece."""
    return split(file, 1)[0]


def split(file: InputFile, count: int) -> list[Piece]:
    """One to `count` pieces of about the same size that make up the file.

    Raises `UserError` on a parquet file or dataset that cannot be opened.
    """
    if file.kind == "jsonl":
        weights = None
        end = file.size
    elif file.kind == "dataset":
        weights = None
        end = len(open_dataset(file.path))
    elif file.kind == "parquet":
        with open_parquet(file) as table:
            groups = table.metadata.num_row_groups
            weights = [table.metadata.row_group(n).total_byte_size for n in range(groups)]
        end = groups
    else:
        return [Piece(file, 0, file.size, file.size)]
    count = min(max(count, 1), max(end, 1))
    if weights is None:
        marks = [end * n // count for n in range(count + 1)]
    else:  # cut before the first group that fills a share
        total, done, marks = sum(weights), 0, [0]
        for number, weight in enumerate(weights, start=1):
            done += weight
            if done * count >= total * len(marks) and number < end and len(marks) < count:
                marks.append(number)
        marks.append(end)
    sizes = [file.size * high // max(end, 1) - file.size * low // max(end, 1) for low, high in _pairs(marks)]
    if end == 0:
        sizes = [file.size]
    return [Piece(file, low, high, size) for (low, high), size in zip(_pairs(marks), sizes, strict=True)]


def _pairs(marks: list[int]) -> list[tuple[int, int]]:
    return list(zip(marks, marks[1:], strict=False))


def _text_bytes(file: InputFile) -> int:
    """Approximate bytes of text in a file: the measure of its work."""
    if file.kind == "parquet" or file.packing:
        return file.size * UNPACKED
    return file.size


# Opening ------------------------------------------------------------------------------------------------


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turn any error in opening or reading `what` into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror or first_line(error)}") from error
    except Exception as error:  # libraries for remote files and tables raise many kinds
        raise UserError(f"cannot read {what}: {first_line(error)}") from error


def open_input(file: InputFile) -> BinaryIO:
    """The stored bytes of a file, for reading and seeking. Raises `UserError` when it cannot be opened."""
    with user_errors(file.path):
        if _URL.match(file.path):
            import fsspec

            return fsspec.open(file.path, "rb").open()
        return open(file.path, "rb")


@contextmanager
def open_parquet(file: InputFile) -> Iterator:
    """A `pyarrow.parquet.ParquetFile`. Raises `UserError` when the file is not parquet."""
    import pyarrow.parquet

    with open_input(file) as stream:
        with user_errors(file.path):
            # A small buffer and no read-ahead: memory is bounded by pages, not by row groups.
            # Pages that carry a checksum are compared with it.
            options = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
            table = pyarrow.parquet.ParquetFile(stream, **options)
        yield table


def hash_range(found, stream: BinaryIO, start: int, size: int) -> None:
    """Feed `size` bytes from `start` to a hash."""
    stream.seek(start)
    while size > 0 and (chunk := stream.read(min(CHUNK_BYTES, size))):
        found.update(chunk)
        size -= len(chunk)


def hash_row_groups(found, piece: Piece, facts) -> None:
    """Feed the stored bytes of a piece's row groups to a hash, column after column. `facts`: the metadata."""
    with open_input(piece.file) as stored:
        for n in range(piece.start, piece.end):
            for column in map(facts.row_group(n).column, range(facts.num_columns)):
                start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
                hash_range(found, stored, start, column.total_compressed_size)


def hash_rows(found, batch) -> None:
    """Feed the rows of an arrow batch or table to a hash."""
    for record in records(batch):
        found.update(json.dumps(record, sort_keys=True, default=repr).encode("ascii") + b"\n")


def records(batch) -> Iterator[dict | None]:
    """The rows of an arrow batch or table; None for one with a string that is not UTF-8."""
    if batch.nbytes <= CHUNK_BYTES:  # else row by row, so that large rows are in memory only once
        try:
            yield from batch.to_pylist()
            return
        except UnicodeDecodeError:
            pass
    for n in range(batch.num_rows):
        try:
            yield batch.slice(n, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


@functools.lru_cache(maxsize=4)
def open_dataset(path: str):
    """The `datasets.Dataset` named by an `hf:` path; its rows stay on disk. Remote code is never run.

    Raises:
        UserError: it cannot be opened, or several configurations or splits exist and none is named.
    """
    import datasets

    name, options = _parse_dataset(path)
    datasets.disable_progress_bars()
    with user_errors(path):
        if any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            if "config" in options:
                raise UserError(f"{path} is a saved dataset and has no configurations; leave config= out")
            found = datasets.load_from_disk(name)
        else:
            # All splits, so that the error for a wrong name can list the right ones.
            found = datasets.load_dataset(name, options.get("config"))
    if not isinstance(found, dict):
        if "split" in options and str(found.split) != options["split"]:
            raise UserError(f"{path} has no such split, it is one table; leave split= out")
        return found
    split = options.get("split") or (next(iter(found)) if len(found) == 1 else None)
    if split not in found:
        names = ", ".join(found)
        raise UserError(f"{path} has the splits {names}; name one, for example {DATASET}NAME?split=train")
    return found[split]


def _parse_dataset(path: str) -> tuple[str, dict[str, str]]:
    """`hf:NAME?config=…&split=…` → (name or folder, options)."""
    name, _, query = path.removeprefix(DATASET).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not name or set(options) - {"config", "split"} or (query and not options):
        raise UserError(f"dataset {path} does not read like {DATASET}FOLDER_OR_NAME?config=NAME&split=train")
    return name, options


def _dataset_input(given: str) -> InputFile:
    name, options = _parse_dataset(given)
    shown = name
    if Path(name).is_dir():
        name = os.path.abspath(name)
        shown = Path(name).name
    query = f"?{urlencode(sorted(options.items()))}" if options else ""
    path = f"{DATASET}{name}{query}"
    table = open_dataset(path)
    name, source = f"{DATASET}{_in_utf8(shown)}{query}", _in_utf8(shown.split("/")[-1])
    return InputFile(path, name, source, None, "dataset", table.data.nbytes, table._fingerprint)
