"""Reads pieces of the input into documents, and rejects what cannot be used with place and reason.

The pieces of a file together give exactly the file's records. One bad byte costs one line, never a file.
Memory is bounded by a chunk and a line, whatever the size of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from data_prep.common.errors import UserError, first_line, log
from data_prep.common.language import detect_language
from data_prep.corpus.archives import TarMembers
from data_prep.corpus.compression import (
    HEAD,
    PLAIN_TEXT,
    RENAME,
    SALVAGED,
    Damage,
    DamagedMember,
    Unpacked,
    content_of,
)
from data_prep.corpus.compression import find_damage as find_in_packed
from data_prep.corpus.filters import TEXT_FIELDS, Filters, encodable, normal_language
from data_prep.corpus.inputs import (
    CHUNK_BYTES,
    ROWS,
    InputFile,
    Piece,
    folder_language,
    hash_row_groups,
    hash_rows,
    open_dataset,
    open_input,
    open_parquet,
    records,
    split,
    user_errors,
    whole,
)

TAIL_BYTES = 1 << 16  # read size past the end of a piece, to complete its last line
# Longer lines, texts and text files are rejected: the tokenizer takes up to 40 bytes of memory per byte of a
# text without white space (docs/inputs.md, Measured).
MAX_LINE_BYTES = 4_000_000
BATCH_BYTES = 4 << 20  # approximate size of a batch of a parquet file
MAX_DEPTH = 200  # of brackets in a record: the JSON parser's own limit depends on its caller
SAMPLE_PLACES = 8  # parts of a file to sample from
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawDocument:
    """One good record. `line` counts from 1 in the piece (jsonl), the file, the tar's `member`, or the table.

    `id_repaired`: the record had no usable id; its id is made from its place. `mark`: how far its text can be
    trusted (`compression.MARKS`).
    """

    id: str
    content: str
    language: str
    source: str
    line: int
    id_repaired: bool = False
    member: str = ""
    mark: int = 0


@dataclass(frozen=True)
class Reject:
    """One rejected record, or with line 0 a whole member of a tar.

    of: the id of the document that it resembles, or the words that it shares with a test text.
    """

    line: int
    reason: str
    member: str = ""
    of: str = ""


@dataclass(frozen=True)
class _Place:
    """The origin of lines: a file, or a member of a tar."""

    name: str
    source: str
    folder_language: str | None
    member: str = ""


class DocumentReader:
    """Reads one piece, or a file as one piece; iterate once.

    Args:
        language: en, zh, other, or auto.
        damage: what `find_damage` gave for the piece, to be left out; None before it was called.
        salvage: also give what can be decoded of damaged members, marked.

    Attributes:
        bytes_read: stored bytes read so far.
        sha256: of the piece's stored bytes (of the rows, for a dataset), after iterating.
        lines: lines or rows read.
        repaired: documents by kind of change.
        damage: the parts that were left out (or salvaged), after iterating.
        unverified: members without a checksum that held text.

    Raises:
        DamagedMember: a member failed its checksum after documents of it were given out: drop what came of
            the file, and read it again with `find_damage`.
        UserError: the file cannot be read, or has changed since it was found.
    """

    def __init__(
        self,
        source: InputFile | Piece,
        language: str = "auto",
        filters: Filters | None = None,
        damage: Sequence[Damage] | None = None,
        salvage: bool = False,
    ):
        self.piece = source if isinstance(source, Piece) else whole(source)
        self.file = self.piece.file
        self.language = language
        self.filters = filters or Filters()
        self.bytes_read = 0
        self.lines = 0
        self.damage: list[Damage] = []
        self.unverified = 0
        self._known_damage, self._salvage = damage, salvage
        self._mark: Callable[[], int] = lambda: 0  # of the bytes read last
        self.repaired: Counter[str] = Counter()
        self._hash = hashlib.sha256()
        self._first = 0  # offset of the first line that starts in the piece
        self._here = _Place(self.file.name, self.file.source, self.file.folder_language)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[RawDocument | Reject]:
        if self.file.kind == "jsonl":
            return self._lines(self._own_lines(), self._here)
        if self.file.kind == "parquet":
            return self._parquet()
        if self.file.kind == "dataset":
            return self._dataset()
        return self._unpacked()

    # Bytes ----------------------------------------------------------------------------------------------

    def _stored(self) -> Iterator[bytes]:
        """The stored bytes of the piece, hashed and counted."""
        with user_errors(self.file.path), open_input(self.file) as stream:
            stream.seek(self.piece.start)
            yield from self._read(stream)

    def _read(self, stream) -> Iterator[bytes]:
        left = self.piece.end - self.piece.start
        while left:
            if not (chunk := stream.read(min(CHUNK_BYTES, left))):
                raise UserError(f"{self.file.path} has become shorter since it was found; run again")
            left -= len(chunk)
            self.bytes_read += len(chunk)
            self._hash.update(chunk)
            yield chunk

    def _own_lines(self) -> Iterator[bytes]:
        """The bytes of the lines that start in the piece; sets `self._first` to the offset of the first."""
        start = self.piece.start
        with user_errors(self.file.path), open_input(self.file) as stream:
            misnamed = self._misnamed(stream.read(HEAD))
            inside = False  # a line of an earlier piece
            stream.seek(start)
            if start:
                stream.seek(start - 1)
                inside = stream.read(1) != b"\n"
            self._first, last = start, b"\n"
            for chunk in self._read(stream):
                if misnamed:
                    continue
                if inside:
                    end = chunk.find(b"\n") + 1
                    inside = not end
                    self._first += end or len(chunk)
                    chunk = chunk[end:] if end else b""
                if chunk:
                    last = chunk[-1:]
                    yield chunk
            followed = 0
            while last != b"\n" and followed <= MAX_LINE_BYTES and (chunk := stream.read(TAIL_BYTES)):
                end = chunk.find(b"\n") + 1
                chunk = chunk[:end] if end else chunk
                last = chunk[-1:]
                followed += len(chunk)
                yield chunk

    def _unpacked(self) -> Iterator[RawDocument | Reject]:
        path, known = self.file.path, self._known_damage
        plain = Unpacked(self._stored(), self.file.packing, path, known, self._salvage)
        self._mark = lambda: plain.mark
        self.damage += known or ()
        if self.file.kind == "text":
            yield from self._text(plain)
        elif self.file.is_tar:
            archive = TarMembers(plain)
            for member in archive:
                yield from self._member(member)
            self.damage += archive.damage
        else:
            yield from self._lines(plain, self._here)
        self.unverified = plain.unverified

    def _member(self, member) -> Iterator[RawDocument | Reject]:
        if not member.regular:
            yield Reject(0, "not a regular file", member.name)
            return
        if not member.name.lower().endswith(".jsonl"):
            yield Reject(0, "not a .jsonl member", member.name)
            return
        folders = member.parts[:-1]
        place = _Place(
            f"{self.file.name}!{member.name}",
            folders[-1] if folders else self.file.source,
            folder_language(folders) or self.file.folder_language,
            member.name,
        )
        yield from self._lines(member.content, place)

    def _text(self, plain: Iterable[bytes | None]) -> Iterator[RawDocument | Reject]:
        """A text file is one document with the file's name as its id; damaged, it is one only if salvaged."""
        chunks, held, mark, gap = [], 0, 0, False
        for chunk in plain:
            gap |= chunk is None
            mark |= self._mark()
            held += len(chunk or b"")
            if held <= MAX_LINE_BYTES:
                chunks.append(chunk or b"")
            else:
                chunks.clear()
        self.lines += 1
        data = b"".join(chunks)
        if (gap and not mark & SALVAGED) or self._misnamed(data):
            return
        if held > MAX_LINE_BYTES:
            yield Reject(1, "file too long")
            return
        try:
            text = data.removeprefix(_BOM).decode("utf-8")
        except UnicodeDecodeError:
            yield Reject(1, "undecodable bytes")
            return
        record = {"id": self.file.name, "content": text}
        item = self._judge(1, record, self._here, "", dataclasses.replace(self.filters, text_field=None))
        yield dataclasses.replace(item, mark=mark) if mark and isinstance(item, RawDocument) else item

    def _misnamed(self, start: bytes) -> bool:
        """Whether a text by its name starts like something else, which is then left out as damage."""
        if (content := content_of(start[:HEAD])) in (None, PLAIN_TEXT):
            return False
        if not self.piece.start:
            self.damage.append(Damage(f"not text but {content}: {RENAME}", 0, self.file.size))
        return True

    # Records --------------------------------------------------------------------------------------------

    def _lines(self, chunks: Iterable[bytes | None], place: _Place) -> Iterator[RawDocument | Reject]:
        for number, (offset, line, mark) in enumerate(cut_lines(chunks, self._mark), start=1):
            self.lines += 1
            if line is None:
                yield Reject(number, "line too long", place.member)
                continue
            line = line.removeprefix(_BOM)  # also inside concatenated files
            if line and not line.isspace():
                item = self._parse(number, line, place, offset)
                if mark and isinstance(item, RawDocument):
                    item = dataclasses.replace(item, mark=mark)
                yield item

    def _parse(self, number: int, line: bytes, place: _Place, offset: int) -> RawDocument | Reject:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            return Reject(number, "undecodable bytes", place.member)
        except (ValueError, RecursionError):
            return Reject(number, "invalid JSON", place.member)
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _too_deep(record):
            return Reject(number, "invalid JSON", place.member)
        if not isinstance(record, dict):
            return Reject(number, "not an object", place.member)
        return self._judge(number, record, place, f"@{self._first + offset}", self.filters)

    def _judge(
        self, number: int, record: dict, place: _Place, mark: str, filters: Filters
    ) -> RawDocument | Reject:
        """`mark`: the place of the record within its file, for an id made from the file's name."""
        text, reason = filters.text_of(record)
        if reason:
            return Reject(number, reason, place.member)
        if _too_large(text):  # a row of a table
            return Reject(number, "line too long", place.member)
        text, changed = filters.clean(text)
        if changed and _too_large(text):  # a normal form may be many times as long
            return Reject(number, "line too long", place.member)
        if not text or text.isspace():
            return Reject(number, "empty content", place.member)
        if not encodable(text):
            return Reject(number, "lone surrogate", place.member)
        language = self._language(record, text, place)
        if reason := filters.refusal(record, text, language):
            return Reject(number, reason, place.member)
        identity = record.get("id")
        if isinstance(identity, int) and not isinstance(identity, bool):
            identity = str(identity)
        usable = isinstance(identity, str) and identity != "" and encodable(identity)
        if not usable:
            identity = place.name + mark
            changed.append("missing id")
        if changed:
            self.repaired.update(changed)
        return RawDocument(identity, text, language, place.source, number, not usable, place.member)

    def _language(self, record: dict, text: str, place: _Place) -> str:
        """The setting's language, else the record's, else the folder's, else by script."""
        if self.language != "auto":
            return self.language
        return normal_language(record.get("language")) or place.folder_language or detect_language(text)

    # Tables ---------------------------------------------------------------------------------------------

    def _parquet(self) -> Iterator[RawDocument | Reject]:
        with open_parquet(self.file) as table:
            facts = table.metadata
            columns, filters = self._columns(table.schema_arrow)
            first = sum(facts.row_group(n).num_rows for n in range(self.piece.start))
            with user_errors(self.file.path):
                hash_row_groups(self._hash, self.piece, facts)
            for group in range(self.piece.start, self.piece.end):
                number = first
                for batch in self._batches(table, group, columns):
                    yield from self._rows(batch, number, filters)
                    number += batch.num_rows
                first += facts.row_group(group).num_rows
                size, groups = self.file.size, facts.num_row_groups
                self.bytes_read += size * (group + 1) // groups - size * group // groups

    def _batches(self, table, group: int, columns: list[str]) -> Iterator:
        """One row group in small batches; a damaged one up to the damage."""
        import pyarrow

        facts = table.metadata.row_group(group)
        rows = BATCH_BYTES * facts.num_rows // max(facts.total_byte_size, 1)
        with user_errors(self.file.path):
            try:
                yield from table.iter_batches(min(max(rows, 1), ROWS), row_groups=[group], columns=columns)
            except (pyarrow.ArrowException, OSError) as error:
                # A failing disk or network is not damage: the next run may read it all.
                if getattr(error, "errno", None) is not None or "://" in self.file.path:
                    raise
                place = facts.column(0).data_page_offset
                reason = f"damaged row group {group}: {first_line(error)}"
                self.damage.append(Damage(reason, place, place + facts.total_byte_size))

    def _dataset(self) -> Iterator[RawDocument | Reject]:
        table = open_dataset(self.file.path)
        if self.piece.end > len(table):
            raise UserError(f"{self.file.path} has fewer rows than when it was found; run again")
        columns, filters = self._columns(table.features.arrow_schema)
        table = table.with_format("arrow")
        for at in range(self.piece.start, self.piece.end, ROWS):
            end = min(at + ROWS, self.piece.end)
            with user_errors(self.file.path):
                batch = table[at:end]
                hash_rows(self._hash, batch)
            yield from self._rows(batch.select(columns), at, filters)
            size, count = self.file.size, len(table)
            self.bytes_read += size * end // count - size * at // count

    def _columns(self, schema) -> tuple[list[str], Filters]:
        """The columns to read, and the filters for their rows.

        Raises:
            UserError: the text column is ambiguous.
        """
        rules = self.filters
        if rules.text_field is None and not set(TEXT_FIELDS) & set(schema.names):
            strings = [field.name for field in schema if _is_text(field.type)]
            strings = [name for name in strings if name not in ("id", "language")]
            if len(strings) != 1:
                raise UserError(
                    f"{self.file.path} does not tell which column holds the text "
                    f"(it has {', '.join(schema.names) or 'none'}); name it with --text-field"
                )
            rules = dataclasses.replace(rules, text_field=strings[0])
        wanted = rules.fields()
        columns = [name for name in schema.names if name in wanted]
        if rules.text_field and not {rules.text_field, rules.text_field.split(".")[0]} & set(columns):
            raise UserError(
                f"{self.file.path} has no column {rules.text_field}; --text-field can name one of "
                f"{', '.join(schema.names)}"
            )
        return columns, rules

    def _rows(self, batch, first: int, filters: Filters) -> Iterator[RawDocument | Reject]:
        """Documents of a batch of rows. `first`: the number of rows before it."""
        for number, record in enumerate(records(batch), start=first + 1):
            self.lines += 1
            if record is None:
                yield Reject(number, "undecodable bytes")
            else:
                yield self._judge(number, record, self._here, f"#{number}", filters)


def cut_lines(
    chunks: Iterable[bytes | None], mark: Callable[[], int] = lambda: 0
) -> Iterator[tuple[int, bytes | None, int]]:
    """(offset, line without its line feed, its mark); no line, but None, where it exceeds `MAX_LINE_BYTES`.

    Args:
        chunks: a gap (None) ends a line. Neither part of a torn line of JSON is an object by itself.
        mark: of the chunk given last; a line has the marks of all its chunks.
    """
    open_line: list[bytes] = []  # parts of a line whose end has not been read
    held = at = marks = 0
    for chunk in chunks:
        # At a gap the open line ends without a line feed.
        first, *others = (b"", b"") if chunk is None else chunk.split(b"\n")
        held += len(first)
        now = mark()
        if chunk is not None:
            marks |= now
        if held <= MAX_LINE_BYTES:
            open_line.append(first)
        else:
            open_line.clear()
        for line in others:
            yield at, b"".join(open_line) if held <= MAX_LINE_BYTES else None, marks
            at += held + (chunk is not None)
            open_line, held, marks = [line], len(line), now if line else 0
    if held:
        yield at, b"".join(open_line) if held <= MAX_LINE_BYTES else None, marks


def sample_lines(files: list[InputFile], budget: int, filters: Filters | None = None) -> Iterator[str]:
    """Lines of text, about `budget` UTF-8 bytes: an equal share from every file, from several places where a
    file can be split, else from its start. Short files leave their rest to the others.

    Raises:
        UserError: no file has a usable document.
    """
    files = sorted(files, key=lambda file: file.size)
    found = False
    for position, file in enumerate(files):
        file_share = budget // (len(files) - position)
        places = split(file, SAMPLE_PLACES)
        for number, piece in enumerate(places):
            share = file_share // (len(places) - number)
            for line in _lines_of_text(piece, filters):
                if share <= 0:
                    break
                found = True
                size = len(line.encode("utf-8")) + 1
                share -= size
                file_share -= size
                budget -= size
                yield line
    if not found:
        raise UserError("the input holds no usable document to learn a tokenizer from")


def find_damage(piece: Piece, tick: Callable[[], object] = lambda: None) -> tuple[Damage, ...]:
    """The damaged members of a piece; `tick()` is called regularly. Raises `UserError` when unreadable."""
    file = piece.file
    if not file.packing:
        return ()
    with user_errors(file.path), open_input(file) as stream:

        def chunks_from(offset: int) -> Iterator[bytes]:
            stream.seek(offset)
            while chunk := stream.read(CHUNK_BYTES):
                tick()
                yield chunk

        return find_in_packed(chunks_from, file.size, file.packing)


def _lines_of_text(piece: Piece, filters: Filters | None) -> Iterator[str]:
    """A sample is no more than read from the start: it ends where damage is met, and is not verified."""
    try:
        for document in DocumentReader(piece, filters=filters):
            if isinstance(document, RawDocument):
                yield from document.content.split("\n")
    except DamagedMember as error:
        log(f"data-prep: warning: {error}; the sample ends there")


def _too_large(text: str) -> bool:
    """Whether a text has more than `MAX_LINE_BYTES` in UTF-8."""
    if len(text) <= MAX_LINE_BYTES // 4:
        return False
    return len(text) > MAX_LINE_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_LINE_BYTES


def _too_deep(value: object) -> bool:
    """Whether brackets are nested deeper than `MAX_DEPTH`."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
    return bool(level)


def _is_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
