"""Packed files as members that carry their own checksum: gzip members, zstd frames, xz and bzip2 streams.

A member's checksum is known only after its text. So `Unpacked` gives the text out at once and raises
`DamagedMember` when a member fails. The caller drops what it made of the file, and reads again without the
members that `find_damage` lists. Memory is bounded by a few chunks and a zstd window.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.common.errors import UserError

OUT_BYTES = 1 << 18  # of plain bytes in one chunk, about
STEP = 4096  # stored bytes between two looks at a decoder: damage is located to a step
ZSTD_STEP = 1024  # a zstd decoder has no limit on its output: a stored byte may give 32 kB
ZSTD_WINDOW = 1 << 31  # the format's limit (`zstd --ultra --long=31`)
HEAD = 16  # bytes of a member that tell its format
START = 512  # bytes of a file that tell what it holds
PLAIN_TEXT = "plain text"
RENAME = "give it the name of what it is"

# What is to be known of a document: bits in the index. Without the first two its checksum held, or its format
# has none.
UNVERIFIED, SALVAGED, CONTAMINATED = 1, 2, 4
MARKS = {UNVERIFIED: "unverified", SALVAGED: "salvaged", CONTAMINATED: "contaminated"}


class DamagedMember(UserError):
    """A member failed after text of it had been given out."""


@dataclass(frozen=True)
class Damage:
    """A part of an input that is left out.

    start, end: its stored bytes; of an archive, bytes of the unpacked tar. sound: up to here the decoder had
    met no error.
    """

    reason: str
    start: int
    end: int
    sound: int = 0


class _Corrupt(Exception):
    pass


# Formats ------------------------------------------------------------------------------------------------


class _ZstdFrame:
    """A decoder with the interface of `zlib`'s, fed in small steps."""

    def __init__(self) -> None:
        import zstandard

        self._frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
        self._error = zstandard.ZstdError
        self.eof = False

    def decompress(self, data: bytes, most: int) -> bytes:
        plain, size, at = [], 0, 0
        while at < len(data) and size < most and not self._frame.eof:
            try:
                plain.append(self._frame.decompress(data[at : at + ZSTD_STEP]))
            except (self._error, MemoryError) as error:  # a damaged header may ask for any window
                raise _Corrupt(str(error) or "no memory for its window") from None
            size += len(plain[-1])
            at += ZSTD_STEP
        self.eof = self._frame.eof
        rest = data[at:]
        self.unused_data = self._frame.unused_data + rest if self.eof else b""
        self.unconsumed_tail = b"" if self.eof else rest
        return b"".join(plain)


def _new_xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)  # not the older format, which has no checksum


@dataclass(frozen=True)
class _Format:
    """One packing. `magic`: the first bytes of a member; `start`: more of them, to search for; `checked`:
    whether a checksum protects its text, by its decoder and first bytes."""

    name: str
    magic: bytes
    start: re.Pattern[bytes]
    new: Callable[[], Any]
    checked: Callable[[Any, bytes], bool] = lambda decoder, head: True


_GZIP_START = re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL)
_ZSTD_START = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # or a frame without text
_XZ_START = re.compile(rb"\xfd7zXZ\x00")
_BZIP2_START = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
FORMATS = {
    "gz": _Format("gzip", b"\x1f\x8b", _GZIP_START, lambda: zlib.decompressobj(wbits=31)),
    "zst": _Format("zstd", b"\x28\xb5\x2f\xfd", _ZSTD_START, _ZstdFrame, lambda _, head: bool(head[4] & 4)),
    "xz": _Format("xz", b"\xfd7zXZ", _XZ_START, _new_xz, lambda xz, _: xz.check != lzma.CHECK_NONE),
    "bz2": _Format("bzip2", b"BZh", _BZIP2_START, bz2.BZ2Decompressor),
}
UTF_16 = "UTF-16 text"
OTHERS = {
    **{b"PK\x03\x04": "a zip file", b"PAR1\x15": "a parquet file", b"7z\xbc\xaf": "7z data"},
    **{b"ARROW1": "arrow data", b"FEA1": "Feather V1 data", b"%PDF-": "a PDF file"},
}


def content_of(head: bytes) -> str | None:
    """What a file holds by its first bytes: `gzip data`, …, `plain text`; None when they do not tell."""
    for one in FORMATS.values():
        if one.start.match(head):
            return f"{one.name} data"
    for magic, name in OTHERS.items():
        if head.startswith(magic):
            return name
    if head[257:262] == b"ustar" and b"\0" in head[:257]:
        return "a tar archive"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0" in head:
        return UTF_16
    if head and not any(byte < 9 for byte in head):
        return PLAIN_TEXT
    return None


# One member ---------------------------------------------------------------------------------------------


class _Source:
    """Stored chunks from offset `at` of a file; what a member does not use can be read again."""

    def __init__(self, chunks: Iterable[bytes], at: int = 0):
        self.at = at
        self._chunks = iter(chunks)
        self._chunk = b""
        self._used = 0  # bytes of the chunk

    def read(self, most: int | None = None) -> bytes:
        """The next bytes, at most `most`; b"" at the end."""
        if self._used == len(self._chunk):
            self._chunk, self._used = next(self._chunks, b""), 0
        data = self._chunk[self._used : None if most is None else self._used + most]
        self._used += len(data)
        self.at += len(data)
        return data

    def give_back(self, count: int) -> None:
        """Let the end of the last read be read again."""
        self._used -= count
        self.at -= count

    def more(self) -> bool:
        """Whether another member follows. Zero bytes after a member are padding."""
        while data := self.read():
            if rest := data.lstrip(b"\0") if self.at > len(data) else data:
                self.give_back(len(rest))
                return True
        return False


class _Member:
    """The member that starts where `source` stands."""

    def __init__(self, packing: str, source: _Source):
        self._format = FORMATS[packing]
        self._decoder = self._format.new()
        self._source = source
        self._head = b""
        self.start = source.at
        self.sound = source.at  # all stored bytes before were decoded

    @property
    def checked(self) -> bool:
        """Whether a checksum protects the text given out last."""
        return self._format.checked(self._decoder, self._head)

    def __iter__(self) -> Iterator[bytes]:
        """Its text. Raises `_Corrupt`; else the source stands behind it at the end."""
        while not self._decoder.eof:
            if not (data := self._source.read()):
                raise _Corrupt(f"the {self._format.name} file ends too early")
            yield from self.feed(data)
        self._source.give_back(len(self._decoder.unused_data))

    def check(self) -> str | None:
        """Decode it, without its text. Returns why it fails."""
        try:
            while not self._decoder.eof:
                if not (data := self._source.read(STEP)):
                    raise _Corrupt(f"the {self._format.name} file ends too early")
                for _ in self.feed(data):
                    pass
                self.sound = self._source.at
        except _Corrupt as error:
            return str(error)
        self._source.give_back(len(self._decoder.unused_data))
        return None

    def salvage(self, sound: int, end: int) -> Iterator[bytes]:
        """Its text up to the first error, byte by byte from `sound` on, and not beyond `end`."""
        try:
            while self._source.at < end and not self._decoder.eof:
                far = sound - self._source.at
                if not (data := self._source.read(min(far, end - self._source.at) if far > 0 else 1)):
                    break
                yield from self.feed(data)
        except _Corrupt:
            pass

    def feed(self, data: bytes) -> Iterator[bytes]:
        decoder = self._decoder
        if len(self._head) < HEAD:
            self._head += data[: HEAD - len(self._head)]
        try:
            while True:
                if plain := decoder.decompress(data, OUT_BYTES):
                    yield plain
                data = getattr(decoder, "unconsumed_tail", b"")  # lzma and bz2 keep it
                if decoder.eof or not data and getattr(decoder, "needs_input", True):
                    return
        except (_Corrupt, zlib.error, lzma.LZMAError, OSError, EOFError) as error:
            raise _Corrupt(self._reason(error)) from None

    def _reason(self, error: Exception) -> str:
        one = self._format
        if re.search("(data|length) check|checksum", str(error)):
            return f"the checksum of a {one.name} member differs"
        if self._head.startswith(one.magic) or one.start.match(self._head):
            return f"damaged {one.name} data: {error}"
        content = content_of(self._head)
        if self.start:
            return f"bytes that are not {one.name} data"
        return f"not {one.name} data" + (f" but {content}: {RENAME}" if content else "")


# Files --------------------------------------------------------------------------------------------------


class Unpacked:
    """The plain bytes of a file, in chunks, and None in place of each part that is left out; iterate once.

    Args:
        stored: the stored bytes; read to the end, so that a caller that hashes them sees the whole file.
        packing: a key of `FORMATS`, or "" for plain bytes.
        damage: what `find_damage` gave, to be left out; None before it was called.
        salvage: give out what can be decoded of the damaged members.

    Attributes:
        mark: 0, `UNVERIFIED` or `SALVAGED`, of the chunk given out last.
        unverified: members without a checksum that held text.

    Raises:
        DamagedMember: a member failed its checksum or cannot be decoded.
    """

    def __init__(
        self,
        stored: Iterable[bytes],
        packing: str,
        path: str = "",
        damage: Sequence[Damage] | None = None,
        salvage: bool = False,
    ):
        self.mark = self.unverified = 0
        self._stored, self._packing, self._path = stored, packing, path
        self._damage, self._salvage = damage, salvage

    def __iter__(self) -> Iterator[bytes | None]:
        if not self._packing:
            yield from self._stored
            return
        source = _Source(self._stored)
        ahead = deque(self._damage or ())
        while source.more() or ahead:
            member = _Member(self._packing, source)
            if ahead and ahead[0].start == source.at:
                bad = ahead.popleft()
                if self._salvage:
                    self.mark = SALVAGED
                    yield from member.salvage(bad.sound, bad.end)
                while source.at < bad.end and source.read(bad.end - source.at):
                    pass
                yield None
                continue
            self.mark = 0
            try:
                for plain in member:
                    self.mark = 0 if member.checked else UNVERIFIED
                    yield plain
            except _Corrupt as error:
                raise self._failed(member.start, str(error)) from None
            self.unverified += bool(self.mark)
        if not source.at and self._damage is None:
            raise self._failed(0, _empty(self._packing))

    def _failed(self, at: int, reason: str) -> DamagedMember:
        if self._damage is not None:
            reason += " (but not when it was read before: check the disk and run again)"
        return DamagedMember(f"{self._path}: {reason} (the member at byte {at})")


def find_damage(chunks_from: Callable[[int], Iterable[bytes]], size: int, packing: str) -> tuple[Damage, ...]:
    """The damaged parts of a packed file, in order. `chunks_from(offset)`: its stored bytes from there on.

    After a member that fails, reading resumes at the next place that starts like a member, and that holds a
    whole one or is where the decoder met the error, or later.
    """
    if not size:
        return (Damage(_empty(packing), 0, 0),)
    found = []
    source = _Source(chunks_from(0))
    while source.more():
        member = _Member(packing, source)
        if (reason := member.check()) is None:
            continue
        at = member.start
        while True:
            at = _next_start(chunks_from(at + 1), at + 1, FORMATS[packing].start, size)
            source = _Source(chunks_from(at), at)
            if at >= min(member.sound, size) or _Member(packing, source).check() is None:
                break
        found.append(Damage(reason, member.start, at, member.sound))
    return tuple(found)


def _empty(packing: str) -> str:
    return f"the file is empty, which no {FORMATS[packing].name} file is"


def _next_start(chunks: Iterable[bytes], at: int, start: re.Pattern[bytes], size: int) -> int:
    """The first offset from `at` on at which a member may start; `size` when there is none."""
    held = b""
    for chunk in chunks:
        held += chunk
        if place := start.search(held):
            return at + place.start()
        at += max(len(held) - HEAD, 0)
        held = held[-HEAD:]
    return size
