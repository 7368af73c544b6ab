"""Tar archives as a stream: nothing is written to disk, and damage costs the members that it meets."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator

from data_prep.corpus.compression import RENAME, Damage, content_of

BLOCK = 512
MAGIC_AT = 257  # in a header
MAX_HEADER = 1 << 20  # long names and pax headers beyond this are damage


class Member:
    """One entry of an archive that is no folder. `parts`: its path without `.`, `..` and a leading `/`."""

    def __init__(self, name: str, regular: bool, content: Iterator[bytes | None]):
        self.parts = tuple(part for part in name.split("/") if part not in ("", ".", ".."))
        self.name = "/".join(self.parts)
        self.regular = regular  # False for links, devices, sparse files
        self.content = (
            content  # chunks and gaps, as of `Unpacked`; unread ones are skipped when the next member is read
        )


class TarMembers:
    """The members of a tar in its order; iterate once. Knows ustar, GNU long names and pax headers.

    After a damaged header, and after a gap (None in `plain`: a part that is left out), reading resumes at the
    next valid header.

    Attributes:
        damage: what was met so far, apart from the gaps.
    """

    def __init__(self, plain: Iterable[bytes | None]):
        self.damage: list[Damage] = []
        self._plain = iter(plain)
        self._held = b""
        self._at = 0
        self._gap = False  # the last bytes were followed by a gap
        self._missing = 0  # bytes wanted beyond the end

    def __iter__(self) -> Iterator[Member]:
        extra: dict[str, str] = {}  # from extension headers, for the next member
        head = b""
        valid = lost = ended = False  # a header was found; in a damaged part; after the end mark
        while (header := self._read(BLOCK)) or self._gap:
            if self._gap:
                self._find_header()
                extra, valid, lost, ended = {}, True, False, True
                continue
            head = head or header
            if not header.strip(b"\0"):  # the end mark, or padding between concatenated archives
                ended = True
                continue
            try:
                facts = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
                kind, size = facts.type, facts.size
                if kind in b"xgL":
                    if size > MAX_HEADER:
                        raise ValueError
                    extra |= _extension(kind, self._read(size))
                    self._skip(-size % BLOCK)
                    continue
                size = int(extra.get("size", size))
                if size < 0:
                    raise ValueError
            except (tarfile.HeaderError, ValueError):
                if not lost and not self._gap and len(header) == BLOCK:
                    self._add("damaged tar header", self._at - BLOCK)
                extra, lost = {}, True
                continue
            valid, lost, ended = True, False, False
            name = extra.get("path", facts.name)
            regular = kind in b"0\x007" and not any(key.startswith("GNU.sparse.") for key in extra)
            extra = extra if kind == b"K" else {}
            if kind == b"S" and header[482]:  # the map of a sparse file continues in further blocks
                while (block := self._read(BLOCK)) and block[-8]:
                    pass
            content = self._take(size)
            if kind not in b"5K" and not (kind in b"0\0" and name.endswith("/")):
                yield Member(name, regular, content)
            for _ in content:
                pass
            if self._missing:
                self._add("the tar archive ends too early", self._at)
                return
            self._skip(-size % BLOCK)
        if not valid and not ended:
            other = content_of(head)
            what = f"but {other}: {RENAME}" if other else "" if head else "but empty"
            self.damage = [Damage(f"not a tar archive {what}".rstrip(), 0, self._at)]
        elif not ended:
            self._add("the tar archive ends too early (it has no end mark)", self._at)

    def _add(self, reason: str, start: int) -> None:
        self.damage.append(Damage(reason, start, self._at))

    def _next(self) -> bool:
        """Hold the next chunk; False at the end and at a gap."""
        for chunk in self._plain:
            if chunk is None:
                self._gap = True
                return False
            if chunk:
                self._held = chunk
                return True
        return False

    def _take(self, count: int) -> Iterator[bytes | None]:
        """The next `count` bytes, in chunks; up to a gap, and None for it."""
        while count and not self._gap:
            if not self._held and not self._next():
                if self._gap:
                    yield None
                else:
                    self._missing = count
                return
            chunk, self._held = self._held[:count], self._held[count:]
            self._at += len(chunk)
            count -= len(chunk)
            yield chunk

    def _read(self, count: int) -> bytes:
        """The next bytes; fewer at the end and at a gap."""
        return b"".join(filter(None, self._take(count)))

    def _skip(self, count: int) -> None:
        for _ in self._take(count):
            pass

    def _find_header(self) -> None:
        """Drop the bytes up to the first header after a gap of unknown size: blocks may start anywhere."""
        held = b""
        self._gap = False
        while self._next() or self._gap:
            held = b"" if self._gap else held + self._held
            self._gap, self._held = False, b""
            for place in re.finditer(b"ustar", held):
                if (start := place.start() - MAGIC_AT) >= 0 and _is_header(held[start : start + BLOCK]):
                    self._at += start
                    self._held = held[start:]
                    return
            self._at += max(len(held) - 2 * BLOCK, 0)
            held = held[-2 * BLOCK :]


def _is_header(block: bytes) -> bool:
    try:
        return bool(tarfile.TarInfo.frombuf(block, "utf-8", "replace"))
    except tarfile.HeaderError:
        return False


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
