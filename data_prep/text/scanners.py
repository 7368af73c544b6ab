"""The expressions that find the runs of marks in a line, for each segmenter and language."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

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

_HAN, _KANA = "\u3400-\u9fff", "\u3041-\u3096\u30a1-\u30fa\u30fc"
_OPEN = r"[“‘«„\"(]?"
_LINE_END = rf"[{MARK}{CLOSE}-]*\Z"


_ABOVE = re.compile("[\U00010000-\U0010ffff]")


def has_far_stops(text: str) -> bool:
    """Whether stops above U+FFFF occur."""
    return not text.isascii() and not frozenset(FAR_STOPS).isdisjoint(_ABOVE.findall(text))


@functools.cache
def scanner(segmenter: str, rules: Rules, far: bool = False) -> re.Pattern:
    """Finds runs and decides the certain cases: a run without group 1 is a cut, one with it must be judged.

    A pattern that follows a run's first mark is a certain cut (`sure`) or certainly none (`passed`). The
    judge accepts each of the former and refuses each of the latter, whatever else is in the line. `far`:
    the text has stops above U+FFFF, with which the search takes ten times as long.
    """
    plain = not rules.spaces and rules.short < 3
    clause = segmenter == "clause"
    sure, passed = ([*_sure_stops(rules)] if plain else []), [_LINE_END]
    if rules.english:
        # The most frequent marks first.
        wide = _sure_wide(clause, rules)
        sure = _sure_english(clause, rules) + sure
        sure = wide + sure if rules.chinese else sure + wide
        passed += _passed_english(clause)
        if not clause:  # one look at a comma instead of several
            sure = [rf"(?<=[.!?。！？．])(?:{'|'.join(sure)})"]
    else:
        sure += _SURE_PAUSES if clause else []
        passed += _passed_elsewhere(clause)
    return _scanner(sure, passed, rules.english, far)


@functools.cache
def judging_scanner(rules: Rules, far: bool = False) -> re.Pattern:
    """Finds runs and leaves each to the judge."""
    return _scanner([], [], rules.english, far)


def _scanner(sure: list[str], passed: list[str], english: bool, far: bool) -> re.Pattern:
    """A run is marks and closers in any order (`?!`, `!”,`, `.)`), spaced dots (`. . .`), and references to
    notes (`.[12]`). The expression starts with one set of characters, which the regex engine finds several
    times faster than alternatives."""
    mark, close, space_close = MARK, CLOSE, ""
    if not english:
        mark += re.escape(FAR_STOPS) if far else ""
        close += re.escape(TWO_WAY_QUOTES + "›")
        space_close = rf"(?:[ \u00a0\u202f][»›](?=[\s.,;:!?…)\]]|\Z)[{close}]*)*"  # « Viens ! » dit-il.
    run = rf"()[{mark}{close}-]*{space_close}(?:[ \u00a0]\.(?=[ \u00a0]\.|[\s{close}]|$)[{close}]*)*{NOTES}"
    not_passed = rf"(?!{'|'.join(passed)})" if passed else ""
    return re.compile(rf"[{mark}-](?:{'|'.join((*sure, not_passed + run))})")


def _listed(words: Iterable[str], length: int, longer: bool = False) -> str:
    """For a lookbehind: listed words of `length` letters, with `longer` also the ends of longer words. As a
    tree, because alternatives are tried one by one."""
    tree: dict[str, set[str]] = {}
    for word in words:
        if len(word) == length or (longer and len(word) > length):
            tree.setdefault(word[-length], set()).add(word[len(word) - length + 1 :])
    branches = (f"{first}(?:{'|'.join(sorted(rests))})" for first, rests in sorted(tree.items()))
    return "|".join(branches) or "\0" * length


def _names(rules: Rules) -> str:
    """A lookbehind: not the end of a name such as Yahoo!"""
    ends = sorted({re.escape(name[-4:]) for name in rules.names})
    return rf"(?<!{'|'.join(ends)})" if ends else ""


def _sure_stops(rules: Rules) -> list[str]:
    """A full stop after a word (or its end) that is in no list and is no Roman numeral."""
    words, roman = rules.judged, "[ivxlcm]"
    capital = words | {word[0].upper() + word[1:] for word in words}
    # Small sets for English: the search is a tenth faster.
    upper, lower, caseless = ("A-Z", "a-z", "") if rules.english else (UPPER, LOWER, CASELESS)
    letter, inner, before = f"[{upper}{lower}{caseless}]", f"[{lower}{caseless}]", r"[\s“‘(—«„]"
    four = rf"(?<={inner}{{4}}\.)(?<!(?:{_listed(words, 4, longer=True)}|{roman}{{4}})\.)"
    numerals = f"[IVXLCMivxlcm]{roman}{{2}}"
    three = rf"(?<={before}{letter}{inner}{{2}}\.)(?<!(?:{_listed(capital, 3)}|{numerals})\.)"
    two = rf"(?<={before}{inner}{{2}}\.)(?<!(?:{_listed(words, 2)}|{roman}{{2}})\.)"
    endings = "".join(rf"(?<!{ending}\.)" for ending in rules.endings)
    start = rf"\s{_OPEN}(?:[{upper}{caseless}]|\d(?!\d?\d?\)))"
    long_enough = "|".join((four, three) if rules.short else (four, three, two))
    stop = rf"(?<=\.)(?=[”’\"')]*{start})(?:{long_enough}){endings}[”’\"')]*"
    return [stop] if rules.english else [stop, rf"(?<={inner}[।؟۔])(?=\s[{CASELESS}])"]


# A semicolon may be the Greek question mark, and « may close.
_SURE_PAUSES = [
    r"(?<=[^\W\d_][,:])(?=\s[^\s.»›])",
    r"(?<=[^\W\d_\u0370-\u03ff\u1f00-\u1fff];)(?=\s[^\s.»›])",
    r"(?<=\d[,:])(?=\s[^\W\d_])",
]


def _passed_elsewhere(clause: bool) -> list[str]:
    """Certainly no cut: 3.14, z.B., --help, a full stop before lower case; for `sentence` a pause before
    more of the line."""
    inside = [r"(?<=[.,:;!?])[^\W_¹²³⁰⁴-⁹]", rf"(?<=[{UPPER}{LOWER}\d]\.)(?<![{LOWER}]{{3}}\.)\s[{LOWER}]"]
    if clause:
        return [*inside, r"(?<=-)[^\W_]", r"(?<=\s-)-[^\W_]"]
    return [
        *inside,
        rf"(?<=[{UPPER}{LOWER}\d][!?])\s[{LOWER}]",
        r"(?<=[,:،])\s[^\s.»›]",
        rf"(?<=[{DASHES}])\s?[^\W_]",
        r"(?<=-)[ -]?[^\W_]",
    ]


def _sure_english(clause: bool, rules: Rules) -> list[str]:
    names = _names(rules)
    if not clause:
        return [rf"(?<=[^\W\d_][!?])(?=\s[“‘\"(]?[A-Z0-9]){names}"]
    # A dash after a second word.
    second = "|".join(rf"(?<=[A-Za-z] [A-Za-z]{{{length}}}—)" for length in range(1, 11))
    return [
        r"(?<=[^\W\d_][,;:])[”’\"']*(?=\s[“‘\"(]?[^\W_])",
        rf"(?<=[^\W\d_][!?]){names}[”’\"']*(?=\s[“‘\"(]?[^\W_])",
        rf"(?<=—)(?=[A-Za-z])(?:{second})",
    ]


def _sure_wide(clause: bool, rules: Rules) -> list[str]:
    """East Asian marks after a character that is no digit."""
    names, han = _names(rules), _HAN + _KANA if rules.japanese else _HAN
    continues = r"(?=[^\W_¹²³⁰⁴-⁹]|[“‘「『（]|\s[^.])"
    # Not before a particle, or words that may say who spoke.
    going_on = "的之这這一二两兩三四几幾为為云然就便而又也并並却卻才再接随隨と-をがにでっだ"
    speaker = "" if clause else r"(?![\u4e00-\u9fff]{1,4}[说說道問问喊叫答]道?[。，！])"
    stops = rf"(?<=[{han}A-Za-z][。！？]){names}(?:[”’」』]+(?![{going_on}]){speaker})?{continues}"
    # Beside Chinese characters alone, because it may also be a decimal point.
    full = [rf"(?<=[{han}]．)(?=[{han}][^)])"] if rules.chinese else []
    if not clause:
        return [stops, *full]
    return [
        rf"(?<=[{han}A-Za-z][，；：]){continues}",
        rf"(?<=[{han}A-Za-z]、)(?<![一二三四五六七八九十]、){continues}",
        stops,
        *full,
    ]


def _passed_english(clause: bool) -> list[str]:
    """Certainly no cut: Mr. Fox, well-known, 3.14, 12:30; for `sentence` a pause before more of the line, and
    “Go!” he said."""
    titled = r"(?<=\.)(?:(?<=[\s“‘(—][MD]r\.)|(?<=[\s“‘(—]Mrs\.))\s[^.]"
    inside = r"(?<=[A-Za-z]\.)[A-Za-z]"
    if clause:
        return [titled, r"(?<=-)[^\W_]", r"(?<=\d[.,:])\d", inside]
    return [
        rf"(?:(?<=[{re.escape(PAUSES)}])[{CLOSE}]*|(?<=[{DASHES}-]))(?:[^\W_]|[“‘「『]|\s[^.])",
        titled,
        r"(?<=[!?])[”’\"']*\s[a-z]",
        r"(?<=\d\.)\d",
        inside,
    ]
