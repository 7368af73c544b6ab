"""Cuts a text into sentences without losing a character.

In: one text (any Unicode without lone surrogates). Out: a list of non-empty strings whose concatenation is
the text. `sentence` cuts at sentence ends, `clause` also at commas, semicolons, colons and dashes (the
mechanism of the SentenceVAE paper, arXiv 2408.00655). Called by `sentences.cut_document` for every document,
and by `pipeline/generation.py` (`is_complete`). The rules are on one page in docs/segmentation.md.

How it works: every line is scanned once for runs of punctuation marks; each run is judged by what stands
before and after it, and becomes a cut or not. Slices between cuts are returned, so nothing can be lost or
altered. The rules are ours rather than a library's because cut positions are part of a shard's fingerprint:
they may change only when `VERSION` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.abbreviations import (
    LOWER_CASE,
    NEVER_LAST,
    NUMBERED,
    NUMBERED_TITLES,
    SOMETIMES_LAST,
    SPEECH_VERBS,
    STARTERS,
    TITLES,
)
from data_prep.errors import UserError

# Raise it whenever any text could be cut differently: shards made by different rules must not be mixed.
VERSION = 1

NAMES = ("clause", "sentence")
LANGUAGES = ("en", "zh", "auto")

WIDE_STOPS = "。！？｡"  # end a sentence whatever follows
STOPS = WIDE_STOPS + ".!?．‽⁇⁈⁉‼"
ELLIPSES = "…⋯"
WIDE_PAUSES = "，；：、､﹐﹔﹕"
PAUSES = WIDE_PAUSES + ",;:"
DASHES = "—–―⸺"
QUOTE_CLOSERS = "\"'”’」』»﹂﹄"
# What may stand between a mark and the cut: closing quotes and brackets, Markdown's emphasis, and characters
# that join the one before them (accents, joiners, variation selectors), which no cut may separate from it.
EXTENDERS = "\u200b\u200c\u200d\u2060\u20e3\ufeff"
EXTENDER_RANGES = "\u0300-\u036f\ufe00-\ufe0f"
CLOSERS = QUOTE_CLOSERS + ")]}）］｝】》〉〕〗〙〛*_`~" + EXTENDERS
OPENERS = "\"'“‘「『«﹁﹃([{（［｛【《〈〔〖〘〚*_`~#"

_MARK = re.escape(STOPS + ELLIPSES + PAUSES + DASHES)
_CLOSE = re.escape(CLOSERS) + EXTENDER_RANGES
# Marks and closers in any order (`?!`, `!”,`, `.)`), spaced dots (`. . .`), and note references (`.[12]`).
# It starts with one set of characters, which the regex engine finds six times faster than alternatives.
_RUN = re.compile(
    rf"[{_MARK}-][{_MARK}{_CLOSE}-]*"
    rf"(?:[ \u00a0]\.(?=[ \u00a0]\.|[\s{_CLOSE}]|$)[{_CLOSE}]*)*(?:\[\d{{1,3}}\][{_CLOSE}]*)*"
)
_PAUSES_AND_DASHES = PAUSES + DASHES + "-"
_NOT_MARKS = re.compile(rf"[^{_MARK}-]+")
_WORD_CHARACTER = re.compile(r"[^\W_]")
_NEXT_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_SKIP = re.compile(rf"\s*[{re.escape(OPENERS)}\s]*")
_TOKEN = re.compile(rf"[^\s/{re.escape(OPENERS + DASHES + WIDE_STOPS + WIDE_PAUSES)}\u2e80-\U0003ffff]*\Z")
_ACRONYM = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,3}\Z")
_ENUMERATOR = re.compile(r"(?:\d{1,3}(?:\.\d{1,2})*|[^\W\d_]|[ivxlIVXL]{2,6})\Z")
_WIDE_ENUMERATOR = re.compile(r"(?:\d{1,3}|[一二三四五六七八九十]{1,3}|[①-⑳⑴-⑽])\Z")
_ROMAN = re.compile(r"[IVXLC]+\Z")
_YEAR = re.compile(r" ?\d{4}\b")
_MONTH_DAY = re.compile(r"(?:[^\W\d_]|\.) \d\d?\Z")
_PLAIN_WORD = re.compile(r"(?=.*[aeiouy])[a-z]{2,}\Z")
_SHORTENED = NUMBERED | LOWER_CASE
_I = ("I", "I'm", "I’m", "I'll", "I’ll", "I've", "I’ve", "I'd", "I’d")
_EAST_ASIAN = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]")
# Inline code, formulas and titles of works: one unit to a reader, whatever marks they hold.
_UNIT = re.compile(
    r"《[^《》\n]{1,60}》|`[^`。！？．，；\n]{1,200}`|\$(?![\s\d{$])[^$。！？．，；\n]{0,200}(?<!\s)\$(?!\d)"
)
_SPEAKER = re.compile(r"(?:I|(?:[A-Z][^\W\d_]*\.? ){0,2}[A-Z][^\W\d_]+) ([a-z]+)\b")
# “你好！”他说。 but not 「……。」那妖精聽說，……
_WIDE_SPEAKER = re.compile(r"[\u4e00-\u9fff]{1,4}?(?<![听聽不再小所分])[说說道問问喊叫答]道?[。，！]")


@dataclass(frozen=True)
class Segmenter:
    """Callable `text -> list[str]`; made by `get_segmenter`. Pickles, holds no state, the same everywhere."""

    name: str
    language: str
    version: int = VERSION

    def __call__(self, text: str) -> list[str]:
        """Sentences of `text`, in order. `"".join(result) == text`; no empty string; `""` gives `[]`.

        White space, line breaks too, belongs to the front of the sentence that follows it; at the end of the
        text it belongs to the last sentence. A text of white space only is one sentence.
        """
        pieces: list[str] = []
        start = line_end = 0
        clause = self.name == "clause"
        # The languages differ only beside Chinese characters: without any, `auto` need not look at each line.
        chinese = self.language == "zh"
        auto = self.language == "auto" and _EAST_ASIAN.search(text) is not None
        for begin, end in _lines(text):
            if line_end:  # a line break ends a sentence, before the white space it is part of
                pieces.append(text[start:line_end])
                start = line_end
            if auto:
                chinese = _EAST_ASIAN.search(text, begin, end) is not None
            for cut in _Line(text, begin, end, clause, chinese).cuts():
                pieces.append(text[start:cut])
                start = cut
            line_end = end
        if text:
            pieces.append(text[start:])
        return pieces

    def is_complete(self, text: str) -> bool:
        """True when `text`, without trailing spaces, ends where a sentence ends should more text follow.

        Generation asks this of a prompt: False means that the next words belong to a sentence already begun.
        A text that ends in a line break is complete, and so is one without anything but white space.
        """
        body = text.rstrip()
        space = text[len(body) :]
        if not body or "".join(space.splitlines()) != space:
            return True
        line = body.splitlines()[-1].lstrip()
        chinese = self.language == "zh" or (self.language == "auto" and _EAST_ASIAN.search(line) is not None)
        # What follows is unknown: complete is what any ordinary continuation would leave as it is.
        probes = [" The"] + (["下一句"] if chinese else [])
        return all(
            len(line) in _Line(line + probe, 0, len(line + probe), self.name == "clause", chinese).cuts()
            for probe in probes
        )


def get_segmenter(name: str, language: str = "auto") -> Segmenter:
    """The segmenter `name` (`clause` or `sentence`) for `language` (`en`, `zh`, or `auto`: line by line).

    Raises `UserError` for any other name or language.
    """
    if name not in NAMES:
        raise UserError(f"unknown segmenter {name!r}: use one of {', '.join(NAMES)}")
    if language not in LANGUAGES:
        raise UserError(f"unknown language {language!r} for the segmenter: use one of {', '.join(LANGUAGES)}")
    return Segmenter(name, language)


def _lines(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each line of `text` without the white space around it; empty lines are left out."""
    at = 0
    for line in text.splitlines(keepends=True):
        body = line.strip()
        if body:
            begin = at + len(line) - len(line.lstrip())
            yield begin, begin + len(body)
        at += len(line)


class _Line:
    """The cuts in one line, `text[begin:end]`: one pass over its runs of marks, each judged in its place.

    `first` and `cut` below are where a run begins and where it ends, closing quotes included; `marks` are the
    run's marks alone. Every look back is of bounded length, so the time grows with the line's length alone.
    """

    def __init__(self, text: str, begin: int, end: int, clause: bool, chinese: bool) -> None:
        self.text, self.begin, self.end = text, begin, end
        self.clause, self.chinese = clause, chinese
        self.start = begin  # where the sentence begins that the scan is in

    def cuts(self) -> Iterator[int]:
        """Positions within (begin, end), ascending, at which a sentence ends."""
        text, begin, end = self.text, self.begin, self.end
        seen = begin  # the current sentence has no letter or digit before `seen`
        counted, odd_quotes = begin, False  # parity of straight double quotes before `counted`
        unit_begin, unit_end = 0, begin  # the last unit (see _UNIT) that begins before the mark
        has_units = any(text.find(sign, begin, end) >= 0 for sign in "`$《")
        units = _UNIT.finditer(text, begin, end) if has_units else iter(())
        for run in _RUN.finditer(text, begin, end):
            first, cut = run.span()
            if cut >= end:
                return
            marks = run.group()
            if cut - first > 1:
                if '"' in marks and not text[cut].isspace():
                    # Without a space after it a straight quote opens what follows, if none is open already.
                    quote = first + marks.index('"')
                    odd_quotes ^= text.count('"', counted, quote) % 2 == 1
                    counted = quote
                    if not odd_quotes:
                        cut = quote
                marks = _NOT_MARKS.sub("", text[first:cut])
            mark = marks[-1]
            if mark == "-" and (marks[-2:] != "--" or marks[-3:] == "---"):
                continue
            pause = mark in _PAUSES_AND_DASHES
            if pause and not self.clause and (mark in PAUSES or not self._stops_before_dash(cut, marks)):
                continue
            while unit_end <= first and (unit := next(units, None)) is not None:
                unit_begin, unit_end = unit.span()
            if unit_begin < first < unit_end:
                continue
            if not _WORD_CHARACTER.search(text, seen, first):  # marks alone are no sentence
                seen = first
                continue
            if self._ends_clause(first, cut, marks) if pause else self._ends_sentence(first, cut, marks):
                yield cut
                self.start = seen = cut

    def _ends_clause(self, first: int, cut: int, marks: str) -> bool:
        """Whether a run whose last mark is a comma, semicolon, colon or dash is a pause."""
        text, mark = self.text, marks[-1]
        before, following = text[first - 1], text[cut]
        if mark in DASHES or mark == "-":
            return self._stops_before_dash(cut, marks) or self._dash_is_pause(first, cut, mark)
        if mark in WIDE_PAUSES:
            if before.isdigit() and following.isdigit():  # 1，234 and 12：30
                return False
            short = first - self.start < 8 and mark in "、､"
            return not (short and _WIDE_ENUMERATOR.match(text[self.start : first].strip()))  # "一、概述"
        if not following.isspace():
            return self.chinese and (_is_east_asian(before) or _is_east_asian(following))
        if marks == ".," and self._token(first).lower() in NEVER_LAST:  # "e.g., apples"
            return False
        if before.isdigit() and mark == "," and _YEAR.match(text, cut):  # "July 4, 1776"
            return not _MONTH_DAY.search(text[max(self.begin, first - 5) : first])
        return True

    def _stops_before_dash(self, cut: int, marks: str) -> bool:
        """A sentence ends before the dash, and the next begins right after it: “Was it so?—Nobody knew.”"""
        return marks[0] in STOPS and self.text[cut].isupper()

    def _dash_is_pause(self, first: int, cut: int, mark: str) -> bool:
        text = self.text
        before, following = text[first - 1], text[cut]
        space_before, space_after = before.isspace(), following.isspace()
        if mark == "–" and not (space_before and space_after):  # a range: 1914–1918
            return False
        if space_before and not space_after:  # "--option", "—Hamlet"
            return False
        if before.isdigit() and following.isdigit() or before == "<" or following == ">":
            return False
        if not (space_after or following.isalnum() or following in OPENERS):
            return False
        if _is_east_asian(before) or _is_east_asian(following):
            return first - self.start > 1
        return len(text[max(self.start, first - 200) : first].split(None, 2)) > 1  # "I—I never" is no pause

    def _ends_sentence(self, first: int, cut: int, marks: str) -> bool:
        """Whether a run whose last mark is a stop or an ellipsis ends a sentence, or at least a clause."""
        text, clause = self.text, self.clause
        before, following = text[first - 1], text[cut]
        quoted = text[cut - 1] in QUOTE_CLOSERS
        if any(mark in WIDE_STOPS for mark in marks):
            if text[cut - 1] in ")）" and marks[-1] not in "。｡":
                return text[self.start : first].lstrip()[0] in "(（"  # an aside goes on: 他（可怜！）病了
            return clause or not (quoted and _WIDE_SPEAKER.match(text, cut, self.end))
        spaced = following.isspace()
        if not spaced and not (self.chinese and (_is_east_asian(before) or _is_east_asian(following))):
            return False
        next_at = _SKIP.match(text, cut, self.end).end()
        next_character = text[next_at : min(next_at + 1, self.end)]
        opened = next_at > cut and text[next_at - 1] in OPENERS
        if marks[-1] in ELLIPSES or marks[-2:] in ("..", "…."):
            if clause:
                return True
            if not spaced and _is_east_asian(before):
                return quoted or opened
            # "Well... I think" goes on; with a full stop of its own (four dots, ".…") the sentence has ended.
            stopped = len(set(marks)) > 1 or marks == "...."
            return not next_character.islower() and (stopped or opened or self._next_word(next_at) not in _I)
        if next_character.islower():  # “Go!” he said. He (poor man!) wept.
            if marks == text[cut - 1] == "." and spaced:
                return self._is_careless(first)
            return clause and (quoted or (marks[-1] != "." and text[cut - 1] not in ")]"))
        if marks[-1] not in ".．":
            return clause or not (quoted and self._names_speaker(next_at))
        if not spaced and (before.isdigit() or not (_is_east_asian(following) or opened)):
            return False  # "3.介绍" and "使用.NET", but not "使用 Rust.然后"
        if marks[-1] == "．" and len(self._token(first)) == 1:  # "A．苹果 B．香蕉"
            return False
        return not self._is_abbreviation(first, next_at, opened)

    def _is_careless(self, stop: int) -> bool:
        """Whether a sentence ends before a lower-case word: after plain words (`i like it. it is good`)."""
        token = self._token(stop)
        if not _PLAIN_WORD.match(token):
            return False
        return not (token in NEVER_LAST or token in TITLES or token in SOMETIMES_LAST or token in _SHORTENED)

    def _names_speaker(self, at: int) -> bool:
        speaker = _SPEAKER.match(self.text, at, self.end)
        return speaker is not None and speaker.group(1) in SPEECH_VERBS

    def _is_abbreviation(self, stop: int, next_at: int, opened: bool) -> bool:
        """Whether the full stop at `stop` belongs to an abbreviation, initial or list number that goes on."""
        token = self._token(stop)
        if not token or len(token) > 12:
            return False
        token_at = stop - len(token)
        lower = token.lower()
        if lower in NEVER_LAST or token in TITLES:
            return True
        if _ENUMERATOR.match(token) and self._is_list_number(token_at, token):
            return True
        word = self._next_word(next_at)
        after = next_at + len(word)
        starts = opened or (word in STARTERS and self.text[after : after + 1] != ".")
        if lower in NUMBERED:
            if self.text[next_at : next_at + 1].isdigit() or (_ROMAN.match(word) and word != "I"):
                return True
            if token in NUMBERED_TITLES:
                return not starts
        if len(token) == 1 and token.isalpha() and token.isascii():
            return self._is_initial(token_at, token, starts)
        return not starts and (lower in SOMETIMES_LAST or _ACRONYM.match(token) is not None)

    def _is_list_number(self, token_at: int, token: str) -> bool:
        """Whether the number or letter opens the line or follows another sentence: `1. Open. 2. Close.`"""
        previous = self.text[max(self.begin, token_at - 40) : token_at].rstrip()
        if not previous.strip(OPENERS):
            return True
        if previous[-1] == ".":  # not "J. R." and not "No. 5."
            return not token.isalpha() and _TOKEN.search(previous[:-1]).group().lower() not in NUMBERED
        return previous[-1] in ":;!?。！？：；"

    def _is_initial(self, token_at: int, token: str, starts: bool) -> bool:
        previous = self.text[max(self.begin, token_at - 24) : token_at].split()
        last = previous[-1] if previous else ""
        if token.islower():
            return token == "v" and not starts
        if token == "I" and last.islower():  # "taller than I. Jim went on"
            return False
        return not starts or last.endswith(".")

    def _token(self, stop: int) -> str:
        """What stands before `stop` back to white space, a bracket, quote, dash or Chinese character."""
        return _TOKEN.search(self.text[max(self.begin, stop - 24) : stop]).group()

    def _next_word(self, at: int) -> str:
        word = _NEXT_WORD.match(self.text, at, self.end)
        return word.group() if word else ""


def _is_east_asian(character: str) -> bool:
    return character >= "\u2e80" and _EAST_ASIAN.match(character) is not None
