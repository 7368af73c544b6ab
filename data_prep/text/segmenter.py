"""Cuts a text into sentences without losing a character (docs/segmentation.md has the rules).

`sentence` cuts at sentence ends, `clause` also at commas, semicolons, colons and dashes (the mechanism of the
SentenceVAE paper, arXiv 2408.00655).

Every line is scanned once for runs of punctuation marks. The scanning expression accepts or skips a run in
plain surroundings (a comma between two words; a full stop after a long lower-case word, before a capital).
All other runs are judged by what is before and after them. The expression knows only certain cases, so it
changes the speed and no cut (`Segmenter.judge_all` disables it; a test compares). The rules are not a
library's because cut positions are part of a shard's fingerprint: they may change only with `VERSION`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.common.errors import UserError
from data_prep.text.language_rules import CODES, Rules, line_rules, rules_for
from data_prep.text.marks import WORD_CHARACTER
from data_prep.text.scanners import has_far_stops, judging_scanner, scanner
from data_prep.text.segment_rules import VERSION, Judge, unit_signs
from data_prep.text.spaces import spaced_cuts

NAMES = ("clause", "sentence")
LANGUAGES = (*CODES, "auto")


@dataclass(frozen=True)
class Segmenter:
    """Cuts texts; stateless. Made by `get_segmenter`.

    `judge_all` sends every run of marks to the judge: the same cuts at a third of the speed. For tests.
    """

    name: str
    language: str
    version: int = VERSION
    judge_all: bool = False

    def __call__(self, text: str) -> list[str]:
        """Sentences of `text`, in order. `"".join(result) == text`; no empty string; `""` gives `[]`.

        White space and line breaks belong to the front of the sentence that follows; at the end of the text
        they belong to the last sentence. A text without words is one sentence.
        """
        cuts = self.cuts(text)
        return [text[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]

    def cuts(self, text: str) -> list[int]:
        """Sentence ends in characters, ascending; the last is `len(text)`. [] for ""."""
        cuts: list[int] = []
        rules, chinese = _fixed_rules(self.language)
        varied = kana = rules.script is not None
        plain = rules, False  # of lines without far letters
        places: list[int] = []
        if by_line := self.language in ("auto", "other"):
            places, kana = _far_letters(text)
            varied = bool(places)
        far_letters = iter(places)
        judge = Judge(text, self.name == "clause")
        far = not rules.english and has_far_stops(text)
        found = current = opening = None
        signs: dict[Rules, list[str]] = {}  # of units, in lines of a language
        foreign = -1  # place of the next far letter
        for begin, end in _lines(text):
            if not (text[begin].isalnum() or WORD_CHARACTER.search(text, begin, end)):
                if cuts:  # marks alone belong to the sentence before, with their line break
                    cuts[-1] = end
                continue
            if varied:
                while by_line and foreign < begin:
                    foreign = next(far_letters, len(text))
                if foreign < end or "\u036f" < text[begin] < "\u2000" or text[begin] > "\u2bff":
                    rules, chinese = line_rules(self.language, text, begin, end, kana)
                else:
                    rules, chinese = plain
            if rules is not current:
                current = rules
                found = judging_scanner(rules, far) if self.judge_all else scanner(self.name, rules, far)
                if rules not in signs:
                    signs[rules] = unit_signs(rules, text)
                opening = signs[rules]
            units = opening and any(text.find(sign, begin, end) >= 0 for sign in opening)
            before = len(cuts)
            opened = units
            if units:
                judge.open_line(begin, end, rules, chinese, True)
            for run in found.finditer(text, begin, end):
                if run.lastindex is None:
                    if not (units and judge.in_unit(run.start())):
                        cuts.append(run.end())
                    continue
                if not opened:
                    judge.open_line(begin, end, rules, chinese, False)
                    opened = True
                start = cuts[-1] if len(cuts) > before else begin
                cut, joins = judge.cut(run, start)
                if joins:
                    cuts[-1] = cut
                elif cut:
                    cuts.append(cut)
            if rules.spaces:
                cuts[before:] = spaced_cuts(text, begin, end, rules, cuts[before:])
            # Most lines end in a letter and a stop.
            if len(cuts) > before and not (cuts[-1] < end - 1 and text[end - 2].isalnum()):
                if not WORD_CHARACTER.search(text, cuts[-1], end):
                    cuts.pop()
            cuts.append(end)
        if text:
            cuts[-1:] = [len(text)]
        return cuts

    def is_complete(self, text: str) -> bool:
        """Whether `text`, without trailing spaces, ends at a sentence end if more text follows.

        For a prompt, False means that the next words belong to its last sentence. A text that ends in a line
        break is complete when it has words; an empty text is complete.
        """
        body = text.rstrip()
        space = text[len(body) :]
        if not body:
            return True
        if "".join(space.splitlines()) != space:
            return WORD_CHARACTER.search(body) is not None
        line = body.splitlines()[-1].lstrip()
        rules, chinese = line_rules(self.language, line, 0, len(line))
        # What follows is unknown: a text is complete when no ordinary continuation changes its last cut.
        probes = [" " + rules.first_word] + (["下一句"] if chinese else [])
        fixed = Segmenter(self.name, rules.code)
        return all(len(line) in fixed.cuts(line + probe)[:-1] for probe in probes)


def get_segmenter(name: str, language: str = "auto") -> Segmenter:
    """The segmenter `name` (`clause` or `sentence`) for `language`: a code of `LANGUAGES`, `other` for
    languages without rules of their own, or `auto` (chosen line by line).

    Raises:
        UserError: another name or language.
    """
    if name not in NAMES:
        raise UserError(f"unknown segmenter {name!r}: use one of {', '.join(NAMES)}")
    if language not in LANGUAGES:
        raise UserError(f"unknown language {language!r} for the segmenter: use one of {', '.join(LANGUAGES)}")
    return Segmenter(name, language)


def _fixed_rules(language: str) -> tuple[Rules, bool]:
    rules = rules_for("en" if language == "auto" else language)
    return rules, rules.chinese


def _lines(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each line of `text` without surrounding white space; skips empty lines."""
    at = 0
    for line in text.splitlines(keepends=True):
        body = line.strip()
        if body:
            begin = at if body[0] == line[0] else at + len(line) - len(line.lstrip())
            yield begin, begin + len(body)
        at += len(line)


def _far_letters(text: str) -> tuple[list[int], bool]:
    """Starts of runs of characters that may be neither Latin nor general punctuation, and whether one may be
    kana; lines without such a run need no check of their language. Compares all characters at once: a regex
    search would cost as much as the scan."""
    if text.isascii():
        return [], False
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), dtype="<u2")
    highest = units.max()
    # Unsigned: what is below a range's start becomes large.
    if highest < 0x370 or highest < 0x2C00 and not (units - np.uint16(0x370) < 0x1C90).any():
        return [], False
    if units.size > len(text):
        units = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    far = (units >= 0x370) & (units - units.dtype.type(0x2000) >= 0xC00)
    far[1:] &= ~far[:-1]
    return np.flatnonzero(far).tolist(), bool((units - units.dtype.type(0x3041) < 0xBA).any())
