"""Input files, the pieces that make units of work, and opening them.

Units depend on the inputs alone, never on workers. Only names, sizes, the start of a `.json` file and the
footers of parquet files are read for them. `finding` makes the `InputFile`s.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlencode

from data_prep.common.errors import UserError, first_line, with_causes
from data_prep.common.remote import is_url, open_remote, without_login
from data_prep.corpus.compression import RENAME, START, content_of

# What a name ends in, before the ending of its packing; names are compared in lower case.
KINDS = {
    "jsonl": (".jsonl", ".ndjson", ".jsonlines", ".jl", ".json"),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".md"),
    "packed": (".tar",),
    # Never packed.
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
}
PACKINGS = {".gz": "gz", ".gzip": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}
TARS = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
ENDINGS = ".jsonl, .json, .csv, .tsv, .txt, .md, .tar (each also .gz, .zst, .xz, .bz2), .parquet or .arrow"
KINDS_OF_TABLES = {"parquet": "a parquet file", "arrow": "arrow data"}
DATASET = "hf:"
CHUNK_BYTES = 1 << 17
BATCH_BYTES = 1 << 20  # of a table that are converted at once
ROWS = 64  # of a table, in memory at once
UNPACKED = 3  # approximate bytes of text per stored byte of a packed file
UNITS, LEAST_UNIT, MOST_UNIT = 256, 8_000_000, 256_000_000  # bytes of text
_SLICE = re.compile(r"(?P<name>[^\[\]]+)(\[[^\[\]]*\])?")


@dataclass(frozen=True)
class InputFile:
    """One file or dataset to read.

    Attributes:
        path: absolute path, URL or `hf:` name.
        name: last folder and file name, for manifests (no machine's paths); more folders where these repeat.
        source: the file's folder, or the dataset's name.
        folder_language: of the nearest folder that names one, up to the input path's own name.
        kind: jsonl, packed (one piece), csv, text (one document), parquet, arrow or dataset.
        size: stored bytes; of a dataset, in memory; of a streamed one, its shards.
        stamp: changes with the file (time, etag, a dataset's fingerprint); "" if unknown.
        fields: what partition folders (`lang=en`) add to each record.
    """

    path: str
    name: str
    source: str
    folder_language: str | None
    kind: str
    size: int
    stamp: str = ""
    fields: tuple[tuple[str, str | None], ...] = ()

    @property
    def shown_path(self) -> str:
        """`path` without the user and password of a URL."""
        return without_login(self.path) if is_url(self.path) else self.path

    @property
    def packing(self) -> str:
        """`gz`, `zst`, `xz`, `bz2`, or "" for an uncompressed file."""
        return _endings(self.name)[1]

    @property
    def is_stream(self) -> bool:
        """Whether it is a dataset whose rows come one after another only."""
        return self.kind == "dataset" and "streaming=true" in self.path

    @property
    def is_tar(self) -> bool:
        return self.kind == "packed" and _endings(self.name)[0].endswith(".tar")


@dataclass(frozen=True)
class Piece:
    """A part of a file: from `start` up to `end`, in bytes, in row groups (parquet), rows (dataset) or shards
    (a streamed dataset).

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
                with suppress(DamagedTable), open_parquet(self.file, found) as table:
                    hash_row_groups(found, self, table.metadata)
            elif self.file.kind == "dataset":
                for _, _, batch in dataset_batches(self):
                    hash_rows(found, batch)
            else:
                with open_input(self.file) as stream:
                    hash_range(found, stream, self.start, self.end - self.start)
        return found.hexdigest()


def kind_of(name: str) -> str | None:
    """The kind of a file by its name, None for files that cannot be read."""
    stem, packing = _endings(name)
    kind = next((kind for kind, endings in KINDS.items() if stem.endswith(endings)), None)
    if packing and kind in ("parquet", "arrow"):
        return None
    return "packed" if packing and kind == "jsonl" else kind


def _endings(name: str) -> tuple[str, str]:
    """(name without the ending of its packing, packing), in lower case."""
    name = name.lower()
    for short, long in TARS.items():
        name = name.removesuffix(short) + long if name.endswith(short) else name
    ending = next((ending for ending in PACKINGS if name.endswith(ending)), "")
    return name.removesuffix(ending), PACKINGS.get(ending, "")


# Planning -----------------------------------------------------------------------------------------------


def plan_units(files: list[InputFile], unit_bytes: int | None = None) -> list[list[Piece]]:
    """Units of work of about `unit_bytes` bytes of text (None: chosen by the total), in the order of `files`.

    Consecutive small files share a unit; large files are split where possible. A function of `files` and
    `unit_bytes` alone. Raises `UserError` on a parquet file or dataset that cannot be opened.
    """
    texts = [text_bytes(file) for file in files]
    unit_bytes = unit_size(files, unit_bytes)
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


def unit_size(files: list[InputFile], unit_bytes: int | None = None) -> int:
    """Bytes of text in a unit: as given, else by the total."""
    if unit_bytes is not None:
        return unit_bytes
    return min(max(sum(map(text_bytes, files)) // UNITS, LEAST_UNIT), MOST_UNIT)


def whole(file: InputFile) -> Piece:
    """All of a file as one piece."""
    return split(file, 1)[0]


def split(file: InputFile, count: int) -> list[Piece]:
    """One to `count` pieces of about the same size that make up the file.

    Raises `UserError` on a parquet file or dataset that cannot be opened.
    """
    weights = None
    # A place inside an archive is reached by unpacking all before it.
    if file.kind == "jsonl" and "::" not in file.path and not is_array(file):
        end = file.size
    elif file.kind == "dataset":
        table = open_dataset(file.path)
        end = file.size if file.is_stream else len(table)
    elif file.kind == "parquet":
        try:
            with open_parquet(file) as table:
                end = table.metadata.num_row_groups
                weights = [table.metadata.row_group(n).total_byte_size for n in range(end)]
        except DamagedTable:  # reported where it is read
            end, weights = 0, []
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


def text_bytes(file: InputFile) -> int:
    """Approximate bytes of text in a file: the measure of its work."""
    if file.is_stream:  # a unit for each of its shards
        return file.size * MOST_UNIT
    if file.kind == "parquet" or file.packing:
        return file.size * UNPACKED
    return file.size


# Opening ------------------------------------------------------------------------------------------------


class DamagedTable(UserError):
    """A table whose file does not hold one."""


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
        raise UserError(f"cannot read {what}: {with_causes(error)}") from error


def open_input(file: InputFile) -> BinaryIO:
    """The stored bytes of a file, for reading and seeking. Raises `UserError` when it cannot be opened."""
    with user_errors(file.path):
        return open_remote(file.path) if is_url(file.path) else open(file.path, "rb")


def is_array(file: InputFile) -> bool:
    """Whether an unpacked `.json` file is one array, not a record per line."""
    if file.packing or not is_json(file.name):
        return False
    with open_input(file) as stream, user_errors(file.path):
        return starts_array(stream.read(64))


def is_json(name: str) -> bool:
    """Whether a file may hold an array: C4's `.json.gz` holds a record per line."""
    return _endings(name)[0].endswith(".json")


def starts_array(start: bytes) -> bool:
    """Whether these first bytes begin a JSON array."""
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


@contextmanager
def open_parquet(file: InputFile, found=None) -> Iterator:
    """A `pyarrow.parquet.ParquetFile`. Raises `DamagedTable` when the file is not parquet; its bytes are then
    fed to the hash `found`."""
    import pyarrow.parquet

    with open_input(file) as stream:
        with user_errors(file.path):
            # A small buffer and no read-ahead: memory is bounded by pages, not by row groups.
            # Pages that carry a checksum are compared with it.
            options = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
            try:
                with damaged_tables(file):
                    table = pyarrow.parquet.ParquetFile(stream, **options)
            except DamagedTable:
                if found:
                    hash_range(found, stream, 0, file.size)
                raise
        yield table


@contextmanager
def damaged_tables(file: InputFile) -> Iterator[None]:
    """Turn an error in a file's content into a `DamagedTable`; not one of a disk or network: the next run may
    read it all."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None or is_url(file.path):
            raise
        kind = KINDS_OF_TABLES[file.kind]
        with open_input(file) as stream:
            content = content_of(stream.read(START)) if file.size else "empty"
        if content in (None, kind):
            raise DamagedTable(f"cut or damaged: {first_line(error)}") from error
        raise DamagedTable(f"not {kind} but {content}" + (f": {RENAME}" if file.size else "")) from error


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
    if batch.nbytes <= BATCH_BYTES:  # else row by row, so that large rows are in memory only once
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
    """The `datasets.Dataset` named by an `hf:` path, whose rows stay on disk, or the `IterableDataset` where
    it is streamed. Remote code is never run.

    Raises:
        UserError: it cannot be opened, or several configurations or splits exist and none is named.
    """
    import datasets

    name, options = _parse_dataset(path)
    streaming = options.get("streaming") == "true"
    datasets.disable_progress_bars()
    with user_errors(path):
        if any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            if "config" in options or streaming:
                raise UserError(
                    f"{path} is a saved dataset and has no configurations; leave config= and streaming= out"
                )
            found = datasets.load_from_disk(name)
        else:
            # All splits, so that the error for a wrong name can list the right ones.
            found = datasets.load_dataset(name, options.get("config"), streaming=streaming)
    if not isinstance(found, dict):
        found = {str(found.split): found}
        if options.get("split", next(iter(found))).split("[")[0] not in found:
            raise UserError(f"{path} has no such split, it is one table; leave split= out")
    split = options.get("split") or (next(iter(found)) if len(found) == 1 else "")
    parts = [_SLICE.fullmatch(part) for part in split.split("+")]
    if any(part is None or part["name"] not in found for part in parts):
        names = ", ".join(found)
        raise UserError(f"{path} has the splits {names}; name one, for example {DATASET}NAME?split=train")
    with user_errors(path):
        tables = [_sliced(found[part["name"]], part[0], streaming) for part in parts]
        return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def _sliced(table, spec: str, streaming: bool):
    """A split, or the rows of it that `train[:10%]` names."""
    if "[" not in spec:
        return table
    if streaming:
        low, high = re.fullmatch(r".*\[(\d*):(\d*)\]", spec).groups() if "%" not in spec else (None, None)
        if low is None:
            raise UserError(f"a stream has no share of {spec}; name rows, for example split=train[:1000]")
        table = table.skip(int(low or 0))
        return table.take(int(high) - int(low or 0)) if high else table
    from datasets import ReadInstruction

    name = spec.split("[")[0]
    (span,) = ReadInstruction.from_spec(spec).to_absolute({name: len(table)})
    return table.select(range(span.from_ or 0, len(table) if span.to is None else span.to))


def dataset_batches(piece: Piece) -> Iterator[tuple[int | None, int, Any]]:
    """Over a piece of a dataset: (shard of a stream or None, rows before, arrow table of at most `ROWS`)."""
    table = open_dataset(piece.file.path)
    if not piece.file.is_stream:
        if piece.end > len(table):
            raise UserError(f"{piece.file.path} has fewer rows than when it was found; run again")
        table = table.with_format("arrow")
        for at in range(piece.start, piece.end, ROWS):
            yield None, at, table[at : min(at + ROWS, piece.end)]
        return
    for shard in range(piece.start, piece.end):
        at = 0
        rows = table.shard(piece.file.size, shard) if piece.file.size > 1 else table
        for batch in rows.with_format("arrow").iter(ROWS):
            yield shard, at, batch
            at += batch.num_rows


def _parse_dataset(path: str) -> tuple[str, dict[str, str]]:
    """`hf:NAME?config=…&split=…&streaming=true` → (name or folder, options)."""
    name, _, query = path.removeprefix(DATASET).partition("?")
    options = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))
    if (
        not name
        or set(options) - {"config", "split", "streaming"}
        or (query and not options)
        or options.get("streaming", "true") not in ("true", "false")
    ):
        form = f"{DATASET}FOLDER_OR_NAME?config=NAME&split=train&streaming=true"
        raise UserError(f"dataset {path} does not read like {form}")
    return name, options


def dataset_input(given: str) -> InputFile:
    """The input that an `hf:` path names. Raises `UserError` as `open_dataset`."""
    name, options = _parse_dataset(given)
    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    if Path(name).is_dir():
        name = os.path.abspath(name)
        shown = os.fsencode(Path(name).name).decode("utf-8", "backslashreplace")
    query = f"?{urlencode(sorted(options.items()), safe='[]:+%')}" if options else ""
    path = f"{DATASET}{name}{query}"
    table = open_dataset(path)
    if options.get("streaming") == "true":
        # Slices count rows from the start: one part. Sizes are known only if somebody has downloaded it all.
        size, stamp = 1 if set("[+") & set(options.get("split", "")) else table.num_shards, ""
    else:
        size, stamp = table.data.nbytes, table._fingerprint
    return InputFile(path, f"{DATASET}{shown}{query}", shown.split("/")[-1], None, "dataset", size, stamp)
