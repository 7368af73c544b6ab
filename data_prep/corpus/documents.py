"""Reads pieces of the input into documents, and rejects what cannot be used with place and reason.

The pieces of a file together give exactly the file's records. One bad byte costs one line, never a file.
Memory is bounded by a chunk and a line, whatever the size of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from data_prep.common.errors import UserError, log
from data_prep.common.language_codes import normal_language
from data_prep.corpus.archives import TarMembers
from data_prep.corpus.compression import (
    PLAIN_TEXT,
    RENAME,
    SALVAGED,
    START,
    UTF_16,
    Damage,
    DamagedMember,
    Unpacked,
    content_of,
)
from data_prep.corpus.filters import MAX_TEXT_MB, Filters, encodable
from data_prep.corpus.finding import folder_language, partitions, passed_over
from data_prep.corpus.inputs import (
    CHUNK_BYTES,
    InputFile,
    Piece,
    is_array,
    is_json,
    kind_of,
    open_input,
    split,
    starts_array,
    user_errors,
    whole,
)
from data_prep.corpus.lines import BOM, cut_array, cut_csv, cut_lines, whole_number
from data_prep.corpus.tables import Rows, with_text_column

TAIL_BYTES = 1 << 16  # read size past the end of a piece, to complete its last line
# Longer lines are not held; a larger `Filters.max_text_mb` raises this limit too. A text may be six times as
# long in a line of JSON, and other fields come on top.
MAX_LINE_BYTES = 64_000_000
MAX_DEPTH = 200  # of brackets in a record: the JSON parser's own limit depends on its caller
SAMPLE_PLACES = 8  # parts of a file to sample from


@dataclass(frozen=True)
class RawDocument:
    """One good record. `line` counts from 1 in the piece (jsonl), the file, the tar's `member`, or the table.

    `id_repaired`: the record had no usable id; its id is made from its place. `mark`: how far its text can be
    trusted (`compression.MARKS`). `confidence`: that the language is right, where it was identified.
    """

    id: str
    content: str
    language: str
    source: str
    line: int
    id_repaired: bool = False
    member: str = ""
    mark: int = 0
    confidence: float | None = None


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
        self._max_text = int(self.filters.max_text_mb * 1e6)
        self._max_line = int(MAX_LINE_BYTES * max(1, self.filters.max_text_mb / MAX_TEXT_MB))
        self._repeated = 0  # keys of the record in work that occur twice
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._members: Counter[str] = Counter()
        self._fields = dict(self.file.fields)
        self._here = _Place(self.file.name, self.file.source, self.file.folder_language)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[RawDocument | Reject]:
        if self.file.kind in ("parquet", "arrow", "dataset"):
            return self._table()
        if self.file.kind == "jsonl" and not is_array(self.file):
            return self._lines(self._own_lines(), self._here)
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
            misnamed = self._misnamed(stream.read(START))
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
            while last != b"\n" and followed <= self._max_line and (chunk := stream.read(TAIL_BYTES)):
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
            start, chunks = _peek(iter(plain))
            if self._misnamed(start):
                for _ in chunks:  # the file is hashed and checked to its end
                    pass
            elif self.file.kind == "csv":
                yield from self._csv(start, chunks)
            else:
                yield from self._lines_or_array(start, chunks)
        self.unverified = plain.unverified

    def _member(self, member) -> Iterator[RawDocument | Reject]:
        if not member.regular:
            yield Reject(0, "not a regular file", member.name)
            return
        if kind_of(member.name) != "jsonl" or passed_over(member.parts):
            yield Reject(0, "not a .jsonl member", member.name)
            return
        folders = member.parts[:-1]
        # An archive may hold a name twice: a file that was appended again.
        self._members[member.name] += 1
        name = member.name + (f":{count}" if (count := self._members[member.name]) > 1 else "")
        place = _Place(
            f"{self.file.name}!{name}",
            folders[-1] if folders else self.file.source,
            folder_language(folders) or self.file.folder_language,
            name,
        )
        self._fields = dict(self.file.fields) | partitions(folders)
        yield from self._lines(member.content, place)

    def _text(self, plain: Iterable[bytes | None]) -> Iterator[RawDocument | Reject]:
        """A text file is one document with the file's name as its id; damaged, it is one only if salvaged."""
        chunks, held, mark, gap = [], 0, 0, False
        for chunk in plain:
            gap |= chunk is None
            mark |= self._mark()
            held += len(chunk or b"")
            if held <= self._max_text:
                chunks.append(chunk or b"")
            else:
                chunks.clear()
        self.lines += 1
        data = b"".join(chunks)
        if (gap and not mark & SALVAGED) or self._misnamed(data):
            return
        if held > self._max_text:
            yield Reject(1, "file too long")
            return
        try:
            text = data.removeprefix(BOM).decode("utf-8")
        except UnicodeDecodeError:
            yield Reject(1, "undecodable bytes")
            return
        record = {"id": self.file.name, "content": text}
        item = self._judge(1, record, self._here, "", dataclasses.replace(self.filters, text_field=None))
        yield _marked(item, mark)

    def _misnamed(self, start: bytes) -> bool:
        """Whether a text by its name starts like something else, which is then left out as damage."""
        if (content := content_of(start[:START])) in (None, PLAIN_TEXT):
            return False
        if not self.piece.start:
            advice = "convert it to UTF-8" if content == UTF_16 else RENAME
            self.damage.append(Damage(f"not text but {content}: {advice}", 0, self.file.size))
        return True

    # Records --------------------------------------------------------------------------------------------

    def _lines(self, chunks: Iterable[bytes | None], place: _Place) -> Iterator[RawDocument | Reject]:
        number = 0  # enumerate would hold the line while its document is used
        for offset, line, mark in cut_lines(chunks, self._max_line, self._mark):
            number += 1
            self.lines += 1
            if line is None:
                yield Reject(number, "line too long", place.member)
                continue
            line = line.removeprefix(BOM)  # also inside concatenated files
            if line and not line.isspace():
                item = self._parse(number, line, place, f"@{self._first + offset}")
                line = b""
                yield _marked(item, mark)

    def _lines_or_array(self, start: bytes, chunks: Iterator[bytes | None]) -> Iterator[RawDocument | Reject]:
        array = is_json(self.file.name) and starts_array(start)
        return self._array(chunks) if array else self._lines(chunks, self._here)

    def _array(self, chunks: Iterator[bytes | None]) -> Iterator[RawDocument | Reject]:
        """The elements of one JSON array, as a `.json` file may hold it."""
        for number, element in enumerate(cut_array(chunks, self._max_line), start=1):
            self.lines += 1
            if element is None:
                yield Reject(number, "invalid JSON from here to the end of the file")
            else:
                item = self._parse(number, element, self._here, f"#{number}")
                yield _marked(item, self._mark())

    def _object(self, pairs: list[tuple[str, Any]]) -> dict:
        record = dict(pairs)
        self._repeated += len(pairs) - len(record)
        return record

    def _decode(self, text: str) -> Any:
        self._repeated = 0
        try:
            return self._decoder.decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number with too many digits for an int
            self._repeated = 0
            return json.loads(text, object_pairs_hook=self._object, parse_int=whole_number)

    def _parse(self, number: int, line: bytes, place: _Place, mark: str) -> RawDocument | Reject:
        """`mark`: the place of the record within its file, for an id made from the file's name."""
        try:
            record = self._decode(line.decode("utf-8"))
        except UnicodeDecodeError:
            return Reject(number, "undecodable bytes", place.member)
        except (ValueError, RecursionError):
            return Reject(number, "invalid JSON", place.member)
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _too_deep(record):
            return Reject(number, "invalid JSON", place.member)
        if not isinstance(record, dict):
            return Reject(number, "not an object", place.member)
        item = self._judge(number, record, place, mark, self.filters)
        if self._repeated and isinstance(item, RawDocument):
            self.repaired["duplicate keys"] += 1
        return item

    def _judge(
        self, number: int, record: dict, place: _Place, mark: str, filters: Filters
    ) -> RawDocument | Reject:
        if self._fields:
            record = self._fields | record
        text, reason = filters.text_of(record, self._label_language(record, place))
        if reason:
            return Reject(number, reason, place.member)
        if self._too_large(text):
            return Reject(number, "text too long", place.member)
        text, changed = filters.clean(text)
        if changed and self._too_large(text):  # a normal form may be many times as long
            return Reject(number, "text too long", place.member)
        if not text or text.isspace():
            return Reject(number, "empty content", place.member)
        if not encodable(text):
            return Reject(number, "lone surrogate", place.member)
        language, confidence = self._language(record, text, place)
        if reason := filters.refusal(record, text, language):
            return Reject(number, reason, place.member)
        identity = record.get("id")
        if isinstance(identity, (int, Decimal)) and not isinstance(identity, bool):
            identity = str(identity)
        usable = isinstance(identity, str) and identity != "" and encodable(identity)
        if not usable:
            identity = place.name + mark
            changed.append("missing id")
        if changed:
            self.repaired.update(changed)
        facts = identity, text, language, place.source, number, not usable, place.member
        return RawDocument(*facts, confidence=confidence)

    def _language(self, record: dict, text: str, place: _Place) -> tuple[str, float | None]:
        """The setting's language, else what the filters find; and a confidence where it was identified."""
        if self.language != "auto":
            return self.language, None
        return self.filters.language_of(record, text, place.folder_language)

    def _label_language(self, record: dict, place: _Place) -> str | None:
        """The language that an exam question's place gives to its labels."""
        if "q_main" not in record:
            return None
        if self.language != "auto":
            return self.language
        named = normal_language(record.get("language")) or place.folder_language
        return named or ("zh" if place.source.lower().endswith("-cn") else None)  # WanJuan's Exam-cn

    def _too_large(self, text: str) -> bool:
        """Whether a text has more than the limit in UTF-8."""
        if len(text) <= self._max_text // 4:
            return False
        return len(text) > self._max_text or len(text.encode("utf-8", "surrogatepass")) > self._max_text

    # Tables ---------------------------------------------------------------------------------------------

    def _table(self) -> Iterator[RawDocument | Reject]:
        rows = Rows(self.piece, self.filters, self._hash, self.damage)
        for number, record, shard in rows:
            self.bytes_read = rows.bytes_read
            self.lines += 1
            member, mark = ("", f"#{number}") if shard is None else (f"shard {shard}", f"#{shard}.{number}")
            if record is None:
                yield Reject(number, "undecodable bytes", member)
            else:
                place = dataclasses.replace(self._here, member=member) if member else self._here
                yield self._judge(number, record, place, mark, rows.filters)
        self.bytes_read = rows.bytes_read

    def _csv(self, start: bytes, chunks: Iterator[bytes | None]) -> Iterator[RawDocument | Reject]:
        """Rows of a .csv or .tsv file; its first row names the columns."""
        if start.lstrip(BOM + b" \r\n").startswith((b"{", b"[")):
            self.damage.append(Damage(f"not csv but JSON: {RENAME}", 0, self.file.size))
            chunks = (chunk for chunk in chunks if not chunk)  # read for its hash alone
        rows = cut_csv(chunks, self._max_line, tabs=".tsv" in self.file.name.lower())
        (names, problem), filters = next(rows, ([], None)), self.filters
        if problem:
            reason = f"the row of column names has {problem}"
            self.damage.append(Damage(reason, 0, self.file.size))
            rows = (row for row in rows if not row)
        elif names:
            filters = with_text_column(self.file.path, names, names, filters)
        for number, (row, problem) in enumerate(rows, start=1):
            self.lines += 1
            if problem is None and len(row) != len(names):
                problem = "another number of columns than the first row"
            if problem:
                yield Reject(number, problem)
            else:
                record = dict(zip(names, row, strict=True))
                item = self._judge(number, record, self._here, f"#{number}", filters)
                if len(record) < len(names) and isinstance(item, RawDocument):
                    self.repaired["duplicate keys"] += 1
                yield _marked(item, self._mark())


def _marked(item: RawDocument | Reject, mark: int) -> RawDocument | Reject:
    return dataclasses.replace(item, mark=mark) if mark and isinstance(item, RawDocument) else item


def _peek(chunks: Iterator[bytes | None]) -> tuple[bytes, Iterator[bytes | None]]:
    first = next(chunks, b"")
    return first or b"", itertools.chain([first], chunks)  # a gap stays one


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


def _lines_of_text(piece: Piece, filters: Filters | None) -> Iterator[str]:
    """A sample is no more than read from the start: it ends where damage is met, and is not verified."""
    try:
        for document in DocumentReader(piece, filters=filters):
            if isinstance(document, RawDocument):
                yield from document.content.split("\n")
    except DamagedMember as error:
        log(f"data-prep: warning: {error}; the sample ends there")


def _too_deep(value: object) -> bool:
    """Whether brackets are nested deeper than `MAX_DEPTH`."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
    return bool(level)
