"""Streams of gzip, zstd and tar files; nothing is written to disk.

Memory is bounded by a few chunks. Damage never raises: everything before it is returned, then `damage` names
it. The stored chunks are always read to the end, so that a caller that hashes them sees the whole file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

OUT_BYTES = 1 << 20  # limit of one gzip step
ZSTD_STEP = 1024  # a zstd decoder cannot be copied: small steps lose at most one block at damage
ZSTD_WINDOW = 1 << 27  # bytes, zstd's default limit (--long=27)
BLOCK = 512  # of a tar
MAX_HEADER = 1 << 20  # long names and pax headers beyond this are damage


class Unpacked:
    """Chunks of the plain bytes; iterate once. `packing`: `gz`, `zst`, or "" for plain bytes."""

    def __init__(self, stored: Iterable[bytes], packing: str):
        self.damage: str | None = None
        self._stored = iter(stored)
        self._packing = packing

    def __iter__(self) -> Iterator[bytes]:
        if not self._packing:
            yield from self._stored
            return
        yield from self._gzip() if self._packing == "gz" else self._zstd()
        for _ in self._stored:  # after damage
            pass

    def _gzip(self) -> Iterator[bytes]:
        member = None
        for data in self._stored:
            while data:
                if member is None or member.eof:  # another member follows, or padding
                    data = data.lstrip(b"\0") if member else data
                    if not data:
                        break
                    member = zlib.decompressobj(wbits=31)
                # A step that meets damage loses the good bytes before it, so it is repeated in smaller steps.
                before = member.copy()
                try:
                    plain = member.decompress(data, OUT_BYTES)
                except zlib.error as error:
                    yield from _inflate_to_damage(before, data)
                    self.damage = f"damaged gzip data: {error}"
                    return
                yield plain
                data = member.unused_data if member.eof else member.unconsumed_tail
        if member is not None and not member.eof:
            yield member.flush()
            if not member.eof:
                self.damage = "the gzip file ends too early"

    def _zstd(self) -> Iterator[bytes]:
        import zstandard

        frame = None
        for stored in self._stored:
            plain = []
            for at in range(0, len(stored), ZSTD_STEP):
                data = stored[at : at + ZSTD_STEP]
                while data:
                    if frame is None or frame.eof:
                        decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
                        frame = decoder.decompressobj()
                    try:
                        plain.append(frame.decompress(data))
                    except zstandard.ZstdError as error:
                        yield b"".join(plain)
                        self.damage = f"damaged zstd data: {error}"
                        return
                    data = frame.unused_data if frame.eof else b""
                    if sum(map(len, plain)) > OUT_BYTES:
                        yield b"".join(plain)
                        plain = []
            yield b"".join(plain)
        if frame is not None and not frame.eof:
            self.damage = "the zstd file ends too early"


def _inflate_to_damage(member, data: bytes) -> Iterator[bytes]:
    """The content of `data` up to the damage in it, to the last byte."""
    for step in (1024, 1):
        while data:
            before = member.copy() if step > 1 else None
            try:
                yield member.decompress(data[:step])
            except zlib.error:
                member = before
                break
            data = data[step:]


class Member:
    """One entry of an archive that is no folder. `parts`: its path without `.`, `..` and a leading `/`."""

    def __init__(self, name: str, regular: bool, content: Iterator[bytes]):
        self.parts = tuple(part for part in name.split("/") if part not in ("", ".", ".."))
        self.name = "/".join(self.parts)
        self.regular = regular  # False for links, devices, sparse files
        self.content = content  # chunks; unread ones are skipped when the next member is read


class TarMembers:
    """The members of a tar in its order; iterate once. Knows ustar, GNU long names and pax headers.

    A damaged header sets `damage`; reading continues at the next valid header.
    """

    def __init__(self, plain: Iterable[bytes]):
        self.damage: str | None = None
        self._plain = iter(plain)
        self._held = b""

    def __iter__(self) -> Iterator[Member]:
        extra: dict[str, str] = {}  # from extension headers, for the next member
        while header := self._read(BLOCK):
            if not header.strip(b"\0"):  # the end, or padding between concatenated archives
                continue
            if len(header) < BLOCK:
                self._damaged("the tar archive ends too early")
                return
            try:
                kind, name, size = _parse_header(header)
                if kind in b"xgL":
                    if size > MAX_HEADER:
                        raise ValueError
                    fields = _extension(kind, self._read(size))
                    self._skip(-size % BLOCK)
                    extra |= fields
                    continue
                size = int(extra.get("size", size))
                if size < 0:
                    raise ValueError
            except ValueError:
                self._damaged("damaged tar header")
                extra = {}
                continue
            name = extra.get("path", name)
            regular = kind in b"0\x007" and not any(key.startswith("GNU.sparse.") for key in extra)
            extra = extra if kind == b"K" else {}
            if kind == b"S" and header[482]:  # the map of a sparse file continues in further blocks
                while (block := self._read(BLOCK)) and block[-8]:
                    pass
            content = self._take(size)
            folder = kind == b"5" or (kind in b"0\0" and name.endswith("/"))
            if not folder and kind != b"K":
                yield Member(name, regular, content)
            for _ in content:
                pass
            self._skip(-size % BLOCK)

    def _damaged(self, what: str) -> None:
        self.damage = self.damage or what

    def _take(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, in chunks."""
        while count:
            if not self._held:
                self._held = next(self._plain, None)
                if self._held is None:
                    self._held = b""
                    self._damaged("the tar archive ends too early")
                    return
                continue
            chunk, self._held = self._held[:count], self._held[count:]
            count -= len(chunk)
            yield chunk

    def _read(self, count: int) -> bytes:
        """The next bytes; fewer at the end, which is not damage by itself."""
        damage = self.damage
        data = b"".join(self._take(count))
        if not data:
            self.damage = damage
        return data

    def _skip(self, count: int) -> None:
        # Missing padding at the end of an archive is not damage.
        damage = self.damage
        for _ in self._take(count):
            pass
        self.damage = damage


def _parse_header(header: bytes) -> tuple[bytes, str, int]:
    """(kind, name, size). Raises `ValueError` on an invalid header."""
    stored = _parse_number(header[148:156])
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    signed = total - 256 * sum(1 for byte in header[:148] + header[156:] if byte > 127)
    if stored not in (total, signed):
        raise ValueError("checksum")
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    return header[156:157], name.decode("utf-8", "replace"), _parse_number(header[124:136])


def _parse_number(field: bytes) -> int:
    if field[0] & 0x80:  # large numbers: big-endian, not octal
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if digits and not all(48 <= byte < 56 for byte in digits):
        raise ValueError("not octal")
    return int(digits or b"0", 8)


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """Fields of an extension header; global ones describe the archive. Raises `ValueError`."""
    if kind == b"g":
        return {}
    if kind == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "replace")}
    fields = {}
    while data:  # "LENGTH KEY=VALUE\n", the length counting itself
        length = int(data[: data.index(b" ")])
        record, data = data[:length], data[length:]
        if length < 5 or not record.endswith(b"\n"):
            raise ValueError("pax record")
        key, _, value = record[record.index(b" ") + 1 : -1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
    return fields
