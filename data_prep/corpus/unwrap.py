"""Joins hard-wrapped lines: text that an editor or a mail program broke at a fixed width."""

from __future__ import annotations

import re
from unicodedata import east_asian_width

NARROWEST, WIDEST = 40, 130  # widths to which prose is wrapped, in characters
_FIRST_WORD = re.compile(r"\S+")
# Lines that begin something: lists, quotes, headings, tables, code, more indentation.
_BEGINS = re.compile(r"\s|[-*+•·–—>#|=~]|\(?\d{1,3}[.)]|\(?[A-Za-z][.)]\s|$")


def unwrap(text: str) -> str:
    """Join each line to the next where the next one's first word would have exceeded the width of the text.

    The width is the length that all but two in a hundred lines keep; a text without one between
    `NARROWEST` and `WIDEST` is left alone. East Asian lines are joined without a space, a hyphen at a
    line's end stays.
    """
    lines = text.split("\n")
    lengths = sorted(len(line.rstrip()) for line in lines if line.strip())
    width = lengths[-(-len(lengths) * 98 // 100) - 1] if len(lengths) > 2 else 0
    if not NARROWEST <= width <= WIDEST:
        return text
    joined = [lines[0]]
    last = lines[0]  # of the input, which may be the end of a longer joined line
    for line in lines[1:]:
        if _wrapped(last, line, width):
            head = joined[-1].rstrip()
            close = head.endswith("-") or _wide(head[-1], line[0])
            joined[-1] = head + ("" if close else " ") + line
        else:
            joined.append(line)
        last = line
    return "\n".join(joined)


def _wrapped(line: str, following: str, width: int) -> bool:
    body = line.rstrip()
    if not body.strip() or _BEGINS.match(following):
        return False
    word = _FIRST_WORD.match(following).group()
    room = 1 if _wide(body[-1], word[0]) else 1 + len(word)
    return len(body) <= WIDEST and len(body) + room > width


def _wide(before: str, after: str) -> bool:
    """Whether both characters are East Asian: lines break between any two of those."""
    return {east_asian_width(before), east_asian_width(after)} <= {"W", "F"}
