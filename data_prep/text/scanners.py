"""The expressions that find the runs of marks in a line, for each segmenter and language."""

from __future__ import annotations

import functools
import re

from data_prep.text.language_rules import Rules
from data_prep.text.marks import (
    CASELESS,
    CLOSE,
    DASHES,
    FAR_STOPS,
    LOWER,
    MARK,
    NOTES,
    PAUSES,
    TWO_WAY_QUOTES,
    UPPER,
)

_HAN = "\u3400-\u9fff"
_START = rf"[{UPPER}{CASELESS}\d]"
_INNER = rf"[{LOWER}{CASELESS}]"
_OPEN = r"[“‘«„\"(]?"
_LINE_END = rf"[{MARK}{CLOSE}-]*\Z"


@functools.cache
def scanner(segmenter: str, rules: Rules) -> re.Pattern:
    """Finds runs and decides the certain cases: a run without group 1 is a cut, one with it must be judged.

    A pattern that follows a run's first mark is a certain cut (`sure`) or certainly none (`passed`). The judge
    accepts each of the former and refuses each of the latter, whatever else is in the line.
    """
    plain = not any((rules.spaces, rules.short))
    clause = segmenter == "clause"
    sure, passed = ([*_sure_stops(rules)] if plain else []), [_LINE_END]
    if rules.english:
        sure += _sure_english(clause, rules)
        passed += _passed_english(clause)
    else:
        # A semicolon may be the Greek question mark, and « may close.
        sure += [r"(?<=[^\W\d_][,:])(?=\s[^\W_])"] if clause else []
        passed += [r"(?<=-)[^\W_]", r"(?<=\d[.,:])\d"] if clause else [rf"(?<=[,:،{DASHES}-])\s?[^\W_]"]
    return _scanner(sure, passed, rules.english)


@functools.cache
def judging_scanner(english: bool) -> re.Pattern:
    """Finds runs and leaves each to the judge."""
    return _scanner([], [], english)


def _scanner(sure: list[str], passed: list[str], english: bool) -> re.Pattern:
    """A run is marks and closers in any order (`?!`, `!”,`, `.)`), spaced dots (`. . .`), and references to notes
    (`.[12]`). The expression starts with one set of characters, which the regex engine finds several times
    faster than alternatives."""
    mark, close, space_close = MARK, CLOSE, ""
    if not english:
        mark += re.escape(FAR_STOPS)
        close += re.escape(TWO_WAY_QUOTES + "›")
        space_close = rf"(?:[ \u00a0\u202f][»›][{close}]*)*"  # « Viens ! » dit-il.
    run = rf"()[{mark}{close}-]*{space_close}(?:[ \u00a0]\.(?=[ \u00a0]\.|[\s{close}]|$)[{close}]*)*{NOTES}"
    not_passed = rf"(?!{'|'.join(passed)})" if passed else ""
    return re.compile(rf"[{mark}-](?:{'|'.join((*sure, not_passed + run))})")


def _listed(words: frozenset[str], length: int, longer: bool = False) -> str:
    """For a lookbehind: listed words of `length` letters, with `longer` also the ends of longer words."""
    fitting = {w[-length:] for w in words if len(w) == length or (longer and len(w) > length)}
    return "|".join(sorted(map(re.escape, fitting))) or "\0" * length


def _names(rules: Rules) -> str:
    """A lookbehind: not the end of a name such as Yahoo!"""
    ends = sorted({re.escape(name[-4:]) for name in rules.names})
    return rf"(?<!{'|'.join(ends)})" if ends else ""


def _sure_stops(rules: Rules) -> list[str]:
    """A full stop after a word (or its end) that is in no list and is no Roman numeral."""
    words = rules.judged
    letter, inner, before = f"[{UPPER}{LOWER}{CASELESS}]", _INNER, r"[\s“‘(—«„]"
    four = rf"(?<={inner}{{4}}\.)(?<!(?:{_listed(words, 4, longer=True)}|[ivxlcm]{{4}})\.)"
    three = rf"(?<={before}{letter}{inner}{{2}}\.)(?<!(?i:{_listed(words, 3)}|[ivxlcm]{{3}})\.)"
    two = rf"(?<={before}{inner}{{2}}\.)(?<!(?:{_listed(words, 2)}|[ivxlcm]{{2}})\.)"
    endings = "".join(rf"(?<!{ending}\.)" for ending in rules.endings)
    start = rf"(?=\s{_OPEN}(?:[{UPPER}{CASELESS}]|\d(?!\d?\d?\))))"
    return [
        rf"(?<=\.)(?:{four}|{three}|{two}){endings}[”’\"')]*{start}",
        rf"(?<={inner}[।؟۔])(?=\s[{CASELESS}])",
    ]


def _sure_english(clause: bool, rules: Rules) -> list[str]:
    continues = r"(?=[^\W_¹²³⁰⁴-⁹]|[“‘「『（]|\s[^.])"
    names = _names(rules)
    closed = r"(?:[”’」』]+(?![的之这這一二两兩三四几幾為为云然就便而又也并並却卻才再接随隨と-をがにで]))?"
    if not clause:
        return [
            rf"(?<=[^\W\d_][!?]){names}(?=\s{_OPEN}{_START})",
            rf"(?<=[{_HAN}A-Za-z][。！？]){names}{continues}",
        ]
    return [
        rf"(?<=[^\W\d_][,;:!?]){names}[”’\"']*(?=\s[“‘\"(]?[^\W_])",
        rf"(?<=[{_HAN}A-Za-z][，；：]){continues}",
        rf"(?<=[{_HAN}]、)(?<![一二三四五六七八九十]、){continues}",
        rf"(?<=[{_HAN}A-Za-z][。！？]){names}{closed}{continues}",
    ]


def _passed_english(clause: bool) -> list[str]:
    """Certainly no cut: Mr. Fox, well-known, 3.14, 12:30; for `sentence` a pause before more of the line, and
    “Go!” he said."""
    titled = r"(?<=\.)(?:(?<=[\s“‘(—][MD]r\.)|(?<=[\s“‘(—]Mrs\.))\s[^.]"
    if clause:
        return [titled, r"(?<=-)[^\W_]", r"(?<=\d[.,:])\d"]
    return [
        rf"(?:(?<=[{re.escape(PAUSES)}])[{CLOSE}]*|(?<=[{DASHES}-]))(?:[^\W_]|[“‘「『]|\s[^.])",
        titled,
        r"(?<=[!?])[”’\"']*\s[a-z]",
        r"(?<=\d\.)\d",
    ]
