"""Cuts a stream of bytes into lines, elements of a JSON array, or rows of csv.

A gap in the stream (None) stands for a damaged part that was left out: nothing is joined over it.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal

BOM = b"\xef\xbb\xbf"
SAFE_DIGITS = 640  # a number with fewer is an int in any environment (PYTHONINTMAXSTRDIGITS)
_AFTER = tuple(",] \t\r\n")
_WHITE = re.compile("[\ufeff \\t\\r\\n]*")


def whole_number(digits: str) -> int | Decimal:
    """A whole number of any length, for the JSON parser."""
    return int(digits) if len(digits) < SAFE_DIGITS else Decimal(digits)


def cut_lines(
    chunks: Iterable[bytes | None], longest: int, mark: Callable[[], int] = lambda: 0
) -> Iterator[tuple[int, bytes | None, int]]:
    """(offset, line without its line feed, its mark); no line, but None, where it exceeds `longest` bytes.

    Args:
        chunks: a gap ends a line. Neither part of a torn line of JSON is an object by itself.
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
        if held <= longest:
            open_line.append(first)
        else:
            open_line.clear()
        for line in others:
            open_line = [b"".join(open_line)]  # not held here while the caller uses it
            yield at, open_line.pop() if held <= longest else None, marks
            at += held + (chunk is not None)
            open_line, held, marks = [line], len(line), now if line else 0
    if held:
        yield at, b"".join(open_line) if held <= longest else None, marks


def cut_array(chunks: Iterator[bytes | None], longest: int) -> Iterator[bytes | None]:
    """The elements of a JSON array as they are written; None where one cannot be parsed, or is too long."""
    scan = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode
    # Bytes that are not UTF-8 come out as they were.
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    held, wanted = "", "["  # `wanted`: the sign before the next element
    for chunk in itertools.chain(chunks, [None]):
        held, at = held + decode(chunk or b""), 0
        while (at := _WHITE.match(held, at).end()) < len(held):
            if wanted:
                if held[at] != wanted:
                    break
                at, wanted = _WHITE.match(held, at + 1).end(), ""
            try:
                _, end = scan(held, at)
            except ValueError:
                break
            if chunk is not None and held[end : end + 1] not in _AFTER:  # a number may continue
                break
            yield held[at:end].encode("utf-8", "surrogateescape")
            at, wanted = end, ","
        held = held[at:]
        if held.startswith("]"):
            break
        if chunk is None or len(held) > longest or (wanted and held and held[0] != wanted):
            yield None
            break
    for _ in chunks:  # the file is hashed to its end
        pass


def cut_csv(
    chunks: Iterator[bytes | None], longest: int, tabs: bool
) -> Iterator[tuple[list[str], str | None]]:
    """(fields of a row, what is wrong with it or None), the first row among them.

    Args:
        tabs: whether tabs are between the fields; else the sign that the first line has most of.
    """
    problems: list[str] = []  # of the lines of the row in work

    def texts() -> Iterator[str]:
        for number, (_, line, _) in enumerate(cut_lines(_until_gap(chunks), longest)):
            if line is None:
                problems.append("line too long")
            line = line or b""
            line = line if number else line.removeprefix(BOM)
            try:
                yield line.decode("utf-8") + "\n"
            except UnicodeDecodeError:
                problems.append("undecodable bytes")
                yield line.decode("utf-8", "replace") + "\n"

    csv.field_size_limit(longest)
    lines = texts()
    first = next(lines, "")
    rows = csv.reader(
        itertools.chain([first], lines),
        delimiter="\t" if tabs else max(",;\t", key=first.count),
        strict=True,
    )
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            row = []
            problems.append("invalid CSV")
        if row or problems:
            yield row, problems[0] if problems else None
        problems.clear()


def _until_gap(chunks: Iterator[bytes | None]) -> Iterator[bytes]:
    """The complete lines before the first gap: a torn row could still look like one."""
    tail = b""
    for chunk in chunks:
        if chunk is None:
            tail = b""
            break
        chunk = tail + chunk
        end = chunk.rfind(b"\n") + 1
        tail = chunk[end:]
        yield chunk[:end]
    yield tail
    for _ in chunks:  # the file is hashed to its end
        pass
