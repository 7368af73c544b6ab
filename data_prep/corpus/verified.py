"""Reads the pieces of a unit, and again without its damaged members when one fails after it was read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_prep.common.errors import UserError
from data_prep.corpus.compression import Damage, DamagedMember
from data_prep.corpus.compression import find_damage as find_in_packed
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject
from data_prep.corpus.filters import Filters
from data_prep.corpus.inputs import CHUNK_BYTES, Piece, open_input, user_errors
from data_prep.corpus.limits import LEAST_RECORDS, UNVERIFIED_TEXT, Limits, TooManyRejected

HEARTBEAT_SECONDS = 0.5

Heartbeat = Callable[[dict[str, int]], None]
Readers = Iterator[tuple[Piece, DocumentReader]]
T = TypeVar("T")


class Counts:
    """Counts what readers yield, reports the counts regularly, and stops when too much is rejected."""

    def __init__(self, heartbeat: Heartbeat, limits: Limits):
        self._heartbeat, self._limits = heartbeat, limits
        self._before = self._bytes = self._documents = 0
        self._rejected: Counter[str] = Counter()
        self._sent = time.monotonic()

    def follow(self, reader: DocumentReader) -> Iterator[RawDocument | Reject]:
        """What the reader yields, counted."""
        for item in reader:
            if isinstance(item, Reject):
                self._rejected[item.reason] += 1
                if self._documents + self._rejected.total() >= LEAST_RECORDS:
                    self._limits.refuse_rejected(self._rejected, self._documents, reader.file.name)
            else:
                self._documents += 1
            yield item
            self._bytes = self._before + reader.bytes_read
            self.tick()
        self._before += reader.bytes_read
        self._bytes = self._before

    def tick(self) -> None:
        """Report the counts, if that is due."""
        if time.monotonic() - self._sent >= HEARTBEAT_SECONDS:
            self._sent = time.monotonic()
            self._heartbeat(self.final())

    def move_to_rejected(self, reason: str) -> None:
        """Count the last document as rejected: its text is a duplicate or cannot be tokenized."""
        self._documents -= 1
        self._rejected[reason] += 1

    def final(self) -> dict[str, int]:
        """Bytes read, documents, rejected records."""
        rejected = self._rejected.total()
        return {"bytes": self._bytes, "documents": self._documents, "rejected": rejected}


@dataclass(frozen=True)
class VerifiedReading:
    """How the pieces of units are read: `language`, `filters` and `salvage` as for `DocumentReader`."""

    language: str
    filters: Filters
    salvage: bool
    limits: Limits

    def read(
        self,
        pieces: Sequence[Piece],
        folder: Path,
        heartbeat: Heartbeat,
        make: Callable[[Readers, Counts], T],
    ) -> tuple[T, Counts]:
        """What `make` makes of the pieces in `folder`, which is emptied before it makes it again.

        Raises:
            UserError: the limits forbid the input, or it cannot be read.
        """
        try:
            return self._attempt(pieces, None, heartbeat, make)
        except (DamagedMember, TooManyRejected) as error:  # garbage may be rejected before its checksum fails
            tick = Counts(heartbeat, self.limits).tick
            damage = [find_damage(piece, tick) for piece in pieces]
            if not any(damage):
                raise
            if self.limits.strict:
                raise UserError(f"{error}; --strict stops there, without it the rest is kept") from None
        for path in folder.iterdir():
            path.unlink()
        return self._attempt(pieces, damage, heartbeat, make)

    def _attempt(
        self,
        pieces: Sequence[Piece],
        damage: list[tuple[Damage, ...]] | None,
        heartbeat: Heartbeat,
        make: Callable[[Readers, Counts], T],
    ) -> tuple[T, Counts]:
        counts = Counts(heartbeat, self.limits)

        def readers() -> Readers:
            for n, piece in enumerate(pieces):
                known = damage[n] if damage else None
                reader = DocumentReader(piece, self.language, self.filters, known, self.salvage)
                yield piece, reader
                problems = [one.reason for one in reader.damage]
                problems += [UNVERIFIED_TEXT] if reader.unverified else []
                self.limits.refuse_damage(piece.file.name, next(iter(problems), None))

        return make(readers(), counts), counts


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
