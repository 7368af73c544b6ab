"""The rules by which a run of punctuation marks ends a sentence, a clause, or nothing."""

from __future__ import annotations

import re

from data_prep.text.abbreviations import (
    LOWER_CASE,
    NEVER_LAST,
    NUMBERED,
    NUMBERED_TITLES,
    SOMETIMES_LAST,
    SPEECH_VERBS,
    STARTERS,
    TITLES,
    TITLES_ELSEWHERE,
)

# Raise it whenever any text could be cut differently: shards made by different rules must not be mixed.
VERSION = 2

# Stops and pauses of scripts that have their own. Stops: Unicode's Sentence_Terminal, less Myanmar's little
# section (a comma to its readers), and with the Hebrew sof pasuq and Tibetan shads. Armenian, Arabic, Syriac,
# NKo, Samaritan, Indic dandas, Tibetan, Myanmar, Ethiopic, Canadian syllabics, Philippine, Khmer, Mongolian,
# Limbu, Tai Tham, Balinese, Lepcha, Ol Chiki, rare Latin marks, Lisu, Vai, Bamum, Phags-pa, Saurashtra,
# Kayah Li, Javanese, Cham, Meetei Mayek.
_OTHER_STOPS = (
    "\u0589\u05c3\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965"
    "\u0f0d\u0f0e\u0f0f\u0f10\u0f11\u0f12\u0f14\u104b\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803"
    "\u1809\u1944\u1945\u1aa8\u1aa9\u1aaa\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d\u1b7e\u1c3b\u1c3c\u1c7e\u1c7f"
    "\u203d\u2e2e\u2e3c\u2e53\u2e54\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9"
    "\uaa5d\uaa5e\uaa5f\uaaf0\uaaf1\uabeb\ufe12\ufe15\ufe16\ufe52\ufe56\ufe57"
)

_OTHER_PAUSES = (
    "\u055d\u060c\u061b\u0703\u0704\u0705\u0706\u0707\u0708\u0709\u07f8\u104a\u1363\u1364\u1365\u1366\u1802"
    "\u1804\u1808\u17d6\u1b5d\u2e32\u2e34\u2e35\u2e41\ua4fe\ua60d\ua6f4\ua6f5\ua9c7\ufe10\ufe11\ufe13\ufe14"
    "\ufe50\ufe51"
)

# Sentence_Terminal above U+FFFF, scanned for by `other` alone: they slow the search in every other text.
_FAR_STOPS = "".join(
    chr(code)
    for first, last in (
        (0x10A56, 0x10A57), (0x10F55, 0x10F59), (0x10F86, 0x10F89), (0x11047, 0x11048), (0x110BE, 0x110C1),
        (0x11141, 0x11143), (0x111C5, 0x111C6), (0x111CD, 0x111CD), (0x111DE, 0x111DF), (0x11238, 0x11239),
        (0x1123B, 0x1123C), (0x112A9, 0x112A9), (0x1144B, 0x1144C), (0x115C2, 0x115C3), (0x115C9, 0x115D7),
        (0x11641, 0x11642), (0x1173C, 0x1173E), (0x11944, 0x11944), (0x11946, 0x11946), (0x11A42, 0x11A43),
        (0x11A9B, 0x11A9C), (0x11C41, 0x11C42), (0x11EF7, 0x11EF8), (0x11F43, 0x11F44), (0x16A6E, 0x16A6F),
        (0x16AF5, 0x16AF5), (0x16B37, 0x16B38), (0x16B44, 0x16B44), (0x16E98, 0x16E98), (0x1BC9F, 0x1BC9F),
        (0x1DA88, 0x1DA88),
    )
    for code in range(first, last + 1)
)  # fmt: skip

WIDE_STOPS = "。！？｡" + _OTHER_STOPS + _FAR_STOPS  # end a sentence whatever follows
STOPS = WIDE_STOPS + ".!?．‽⁇⁈⁉‼\u037e"
ELLIPSES = "…⋯"
WIDE_PAUSES = "，；：、､﹐﹔﹕"
PAUSES = WIDE_PAUSES + ",;:" + _OTHER_PAUSES
DASHES = "—–―⸺"
QUOTE_CLOSERS = "\"'”’」』»﹂﹄"

# What may be between a mark and the cut: closing quotes and brackets, Markdown's emphasis, and characters
# that join the one before them (accents, joiners, variation selectors), which no cut may separate from it.
EXTENDERS = "\u200b\u200c\u200d\u2060\u20e3\ufeff"
EXTENDER_RANGES = "\u0300-\u036f\ufe00-\ufe0f"
CLOSERS = QUOTE_CLOSERS + ")]}）］｝】》〉〕〗〙〛*_`~" + EXTENDERS
OPENERS = "\"'“‘「『«﹁﹃([{（［｛【《〈〔〖〘〚*_`~#¿¡"

# Quotes that open in English and close elsewhere: „Komm!“ and »Komm!«
TWO_WAY_QUOTES = "“‘«‹"
_MARK = re.escape("".join(c for c in STOPS if c not in _FAR_STOPS) + ELLIPSES + PAUSES + DASHES)
_CLOSE = re.escape(CLOSERS) + EXTENDER_RANGES
_PAUSES_AND_DASHES = PAUSES + DASHES + "-"


def _scanner(sure: tuple[str, ...] = (), passed: tuple[str, ...] = (), english: bool = True) -> re.Pattern:
    """The expression that finds the runs of marks in a line. Group 1 matches when a run must be judged.

    A run is marks and closers in any order (`?!`, `!”,`, `.)`), spaced dots (`. . .`), and note references
    (`.[12]`). `sure` and `passed` match after a run's first mark: the ends of certain cuts, and what follows
    a mark that is certainly no cut. The expression starts with one set of characters, which the regex engine
    finds several times faster than alternatives.
    """
    mark, close, space_close = _MARK, _CLOSE, ""
    if not english:
        mark += re.escape(_FAR_STOPS)
        close += re.escape(TWO_WAY_QUOTES + "›")
        space_close = rf"(?:[ \u00a0\u202f][»›][{close}]*)*"  # « Viens ! » dit-il.
    run = (
        rf"()[{mark}{close}-]*{space_close}"
        rf"(?:[ \u00a0]\.(?=[ \u00a0]\.|[\s{close}]|$)[{close}]*)*(?:\[\d{{1,3}}\][{close}]*)*"
    )
    not_passed = rf"(?!{'|'.join(passed)})" if passed else ""
    return re.compile(rf"[{mark}-](?:{'|'.join((*sure, not_passed + run))})")


def _listed(length: int, longer: bool = False) -> str:
    """For a lookbehind: listed words of `length` letters, with `longer` also the ends of longer words."""
    words = filter(str.isalpha, NEVER_LAST | TITLES | NUMBERED | SOMETIMES_LAST)
    fitting = {w[-length:].lower() for w in words if len(w) == length or (longer and len(w) > length)}
    return "|".join(sorted(fitting))


# Certain cuts: the judge accepts each of these, whatever else is in the line.
_HAN = "\u3400-\u9fff"
_STARTS = r"(?=\s[“‘\"(]?[A-Z0-9])"

_SURE_STOPS = (
    # A full stop after a word (or its end) that is in no list and is no Roman numeral.
    rf"(?<=\.)(?:(?<=[a-z]{{4}}\.)(?<!(?:{_listed(4, longer=True)}|[ivxl]{{4}})\.)"
    rf"|(?<=[\s“‘(—][A-Za-z][a-z]{{2}}\.)(?<!(?i:{_listed(3)}|[ivxl]{{3}})\.)"
    rf"|(?<=[\s“‘(—][a-z]{{2}}\.)(?<!(?:{_listed(2)}|[ivxl]{{2}})\.))[”’\"')]*{_STARTS}"
)

_WIDE_CONTINUES = r"(?=[^\W_]|[“‘「『（]|\s[^.])"

_SURE = {
    "clause": (
        r"(?<=[^\W\d_][,;:!?])[”’\"']*(?=\s[“‘\"(]?[^\W_])",
        _SURE_STOPS,
        rf"(?<=[{_HAN}A-Za-z][，；：]){_WIDE_CONTINUES}",
        rf"(?<=[{_HAN}]、)(?<![一二三四五六七八九十]、){_WIDE_CONTINUES}",
        rf"(?<=[{_HAN}A-Za-z][。！？])(?:[”’」』]+(?![的之这這一二两兩三四几幾为為云]))?{_WIDE_CONTINUES}",
    ),
    "sentence": (
        _SURE_STOPS,
        rf"(?<=[^\W\d_][!?]){_STARTS}",
        rf"(?<=[{_HAN}A-Za-z][。！？]){_WIDE_CONTINUES}",
    ),
}

# Certainly no cut: marks at the line's end, Mr. Fox, well-known, 3.14, 12:30; for `sentence` a pause before
# more of the line, and “Go!” he said.
_LINE_END = rf"[{_MARK}{_CLOSE}-]*\Z"
_TITLED = r"(?<=\.)(?:(?<=[\s“‘(—][MD]r\.)|(?<=[\s“‘(—]Mrs\.))\s[^.]"

_PASSED = {
    "clause": (_LINE_END, _TITLED, r"(?<=-)[^\W_]", r"(?<=\d[.,:])\d"),
    "sentence": (
        rf"(?:(?<=[{re.escape(PAUSES)}])[{_CLOSE}]*|(?<=[{DASHES}-]))(?:[^\W_]|[“‘「『]|\s[^.])",
        _LINE_END,
        _TITLED,
        r"(?<=[!?])[”’\"']*\s[a-z]",
        r"(?<=\d\.)\d",
    ),
}

# Scanners by [segmenter][English word lists apply]. Without the lists, full stops are judged, a semicolon may
# be the Greek question mark, and « may close.
SCANNERS = {
    "clause": {
        True: _scanner(_SURE["clause"], _PASSED["clause"]),
        False: _scanner((r"(?<=[^\W\d_][,:!?])(?=\s[^\W_])",), (r"(?<=-)[^\W_]",), english=False),
    },
    "sentence": {
        True: _scanner(_SURE["sentence"], _PASSED["sentence"]),
        False: _scanner((), (r"(?<=[,:-])\s?[^\W_]",), english=False),
    },
}

JUDGE_ALL = {english: _scanner(english=english) for english in (True, False)}

# 。——然后 and 、-b: the dash or minus opens what follows.
_BEFORE_DASH = re.compile(
    rf"[{_MARK}]*?(?:[{re.escape(WIDE_STOPS)}][{_CLOSE}]*(?=[{DASHES}-])|[{WIDE_PAUSES}][{_CLOSE}]*(?=-))"
)
_ANY_MARK = re.compile(rf"[{_MARK}-]")
_DOUBLE_QUOTE = re.compile('["“”]')
_NOT_MARKS = re.compile(rf"[^{_MARK}{_FAR_STOPS}-]+")
WORD_CHARACTER = re.compile(r"[^\W_]")
_OPENING = re.compile(r"[“‘「『«﹁﹃(\[{（［｛【《〈〔〖〘〚]|(?<!\S)[\"']")
_NEXT_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_SKIP_DASH = re.compile(rf"[{DASHES}\s]*[{re.escape(OPENERS)}\s]*")
_SKIP = re.compile(rf"\s*[{re.escape(OPENERS)}\s]*")
_NOT_TOKEN = re.compile(
    rf"[\s/{re.escape(OPENERS + DASHES + WIDE_STOPS + WIDE_PAUSES + _OTHER_PAUSES)}\u2e80-\U0003ffff]"
)
_ACRONYM = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,3}\Z")
_ENUMERATOR = re.compile(r"(?:\d{1,3}(?:\.\d{1,2})*|[^\W\d_]|[ivxlIVXL]{2,6})\Z")
_WIDE_ENUMERATOR = re.compile(r"(?:\d{1,3}|[一二三四五六七八九十]{1,3}|[①-⑳⑴-⑽])\Z")
_ROMAN = re.compile(r"[IVXLC]+\Z")
_YEAR = re.compile(r" ?\d{4}\b")
_MONTH_DAY = re.compile(r"(?:[^\W\d_]|\.) \d\d?\Z")
_PLAIN_WORD = re.compile(r"(?=.*[aeiouy])[a-z]{2,}\Z")
_SHORTENED = NUMBERED | LOWER_CASE
_I = ("I", "I'm", "I’m", "I'll", "I’ll", "I've", "I’ve", "I'd", "I’d")

# Dr, Nr, bzw, стр: no vowel, not all capitals.
_NO_VOWEL = re.compile(
    r"[B-DF-HJ-NP-TV-XZb-df-hj-np-tv-xz][b-df-hj-np-tv-xz]{1,3}\Z"
    r"|[БВГДЖЗЙКЛМНПРСТФХЦЧШЩбвгджзйклмнпрстфхцчшщ][бвгджзйклмнпрстфхцчшщ]{1,3}\Z"
)

_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]")
EAST_ASIAN = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]")
LATIN = re.compile(
    r"[A-Za-zªºÀ-ÖØ-öø-\u02b8\u1d00-\u1dbf\u1e00-\u1eff\u2c60-\u2c7f\ua720-\ua7ff\uab30-\uab6f]"
)

FAR_LETTER = re.compile(  # letters of other scripts
    r"[\u0370-\u1cff\u1f00-\u1fff\u2c00-\u2c5f\u2c80-\u2dff\ua000-\ua71f\ua800-\uab2f\uab70-\ud7ff"
    r"\ufb13-\ufdff\ufe70-\ufefc\U00010000-\U0001efff]"
)

# Inline code, formulas and titles of works: one unit, whatever marks they contain.
_UNIT = re.compile(
    r"《[^《》\n]{1,60}》|`[^`。！？．，；\n]{1,200}`|\$(?![\s\d{$])[^$。！？．，；\n]{0,200}(?<!\s)\$(?!\d)"
)
_SPEAKER = re.compile(r"(?:I|(?:[A-Z][^\W\d_]*\.? ){0,2}[A-Z][^\W\d_]+) ([a-z]+)\b")

# A quotation that is a term of the sentence around it: “为什么？”这个问题很难。
_QUOTED_TERM = re.compile(
    r"的|之|[这這](?:[个個]|一)?(?:问题|問題|词|詞|字|句?话|句?話|说法|說法)|一[词詞]|[二两兩三四几幾][个個]?字|[为為]题|云云"
)

# “你好！”他说。 but not 「……。」那妖精聽說，……
_WIDE_SPEAKER = re.compile(
    r"[\u4e00-\u9fff]{1,4}?(?<![听聽不再小所分知难難味街地])[说說道問问喊叫答]道?[。，！]"
)


class Judge:
    """Judges the runs of marks in one line, `text[begin:end]`, in order.

    In the methods, `first` and `cut` are the start and end of a run with its closing quotes, `marks` the
    run's marks alone, and `start` the start of the current sentence. Every look back has a bounded length, so
    the time is linear in the line's length.
    """

    def __init__(self, text: str, clause: bool) -> None:
        self.text, self.clause = text, clause

    def open_line(self, begin: int, end: int, english: bool, chinese: bool, units: bool) -> None:
        self.begin, self.end, self.english, self.chinese = begin, end, english, chinese
        self.start = self._seen = begin  # no letter or digit between `start` and `_seen`
        self._counted, self._quoted = begin, False  # whether a double quotation is open at `_counted`
        self._units = _UNIT.finditer(self.text, begin, end) if units else None
        self._unit_begin, self._unit_end = 0, begin  # the last unit (see _UNIT) that starts before the mark

    def cut(self, run: re.Match, start: int) -> tuple[int, bool]:
        """(where a sentence ends at `run`, or 0; whether it has no words and joins the one before)."""
        text = self.text
        first, cut = run.span()
        if cut >= self.end:
            return 0, False
        if self._units is not None and self.in_unit(first):
            after = _ANY_MARK.search(text, self._unit_end, cut) if cut > self._unit_end else None
            if after is None:
                return 0, False
            first = after.start()  # `a.b();`， the unit itself ends in marks
        self.start = start
        marks = text[first:cut]
        if cut - first > 1:
            cut = self._closed(first, cut, marks)
            stopped = _BEFORE_DASH.match(text, first, cut)
            if stopped is not None:
                cut = stopped.end()
            marks = _NOT_MARKS.sub("", text[first:cut])
        mark = marks[-1]
        if mark == "-" and (marks[-2:] != "--" or marks[-3:] == "---"):
            return 0, False
        pause = mark in _PAUSES_AND_DASHES
        if mark == ";" and not self.english and _GREEK.match(text[first - 1]):
            pause = False
        if pause and not self.clause and (mark in PAUSES or not self._stops_at_dash(cut, marks)):
            return 0, False
        worded = WORD_CHARACTER.search(text, max(self._seen, start), first) is not None
        if not worded:
            self._seen = first
            if start == self.begin or not self._joins_before(start, cut, mark):
                return 0, False
        if self._ends_clause(first, cut, marks) if pause else self._ends_sentence(first, cut, marks):
            return cut, not worded
        return 0, False

    def _joins_before(self, start: int, cut: int, mark: str) -> bool:
        """Whether marks without words belong to the text before them; not when they open the next: “… so"""
        opened = _OPENING.search(self.text, start, cut) is not None
        return not (mark in DASHES or mark == "-" or (opened and self.text[cut - 1] not in CLOSERS))

    def _closed(self, first: int, cut: int, run: str) -> int:
        """The end of a run without the quotes that open what follows."""
        text = self.text
        if text[cut].isspace():
            return cut
        if '"' in run:  # a straight quote opens what follows unless one is open (“Go!" he said)
            quote = first + run.index('"')
            for sign in _DOUBLE_QUOTE.findall(text, self._counted, quote):
                self._quoted = sign == "“" or (sign == '"' and not self._quoted)
            self._counted = quote
            if not self._quoted:
                return quote
        if not self.english:
            for at in range(first + 1, cut):
                if text[at] in TWO_WAY_QUOTES:
                    return at
        return cut

    def in_unit(self, first: int) -> bool:
        while self._unit_end <= first and (unit := next(self._units, None)) is not None:
            self._unit_begin, self._unit_end = unit.span()
        return self._unit_begin < first < self._unit_end

    def _ends_clause(self, first: int, cut: int, marks: str) -> bool:
        """Whether a run whose last mark is a comma, semicolon, colon or dash is a pause."""
        text, mark = self.text, marks[-1]
        before, following = text[first - 1], text[cut]
        if mark in DASHES or mark == "-":
            return self._stops_at_dash(cut, marks) or self._dash_is_pause(first, cut, mark)
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

    def _stops_at_dash(self, cut: int, marks: str) -> bool:
        """Whether a sentence starts right after the dash (“Was it so?—He knew.”), or speech breaks off."""
        text = self.text
        if marks[0] in STOPS and text[cut].isupper():
            return True
        if text[cut - 1] not in QUOTE_CLOSERS:
            return False
        if text[cut].isspace():  # “I never—” The door opened.
            next_at = _SKIP.match(text, cut, self.end).end()
            character = text[next_at : next_at + 1]
            return (character.isupper() or _is_east_asian(character)) and not self._names_speaker(next_at)
        return _is_east_asian(text[cut]) and not _WIDE_SPEAKER.match(text, cut, self.end)  # “我——”门开了。

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
            return first - self.start > 1 and not (mark == "-" and following.isascii())  # 使用--all
        return len(text[max(self.start, first - 200) : first].split(None, 2)) > 1  # "I—I never" is no pause

    def _ends_sentence(self, first: int, cut: int, marks: str) -> bool:
        """Whether a run whose last mark is a stop or an ellipsis ends a sentence, or at least a clause."""
        text, clause = self.text, self.clause
        before, following = text[first - 1], text[cut]
        quoted = text[cut - 1] in QUOTE_CLOSERS
        if not marks.isascii() and any(mark in WIDE_STOPS for mark in marks):
            if text[cut - 1] in ")）" and marks[-1] not in "。｡":
                return (
                    text[self.start : first].lstrip()[0] in "(（"
                )  # the sentence continues after an aside: 他（可怜！）病了
            if quoted and marks[-1] not in "。｡" and _QUOTED_TERM.match(text, cut, self.end):
                return False
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
            # "Well... I think" continues; with a further full stop (four dots, ".…") the sentence has ended.
            stopped = len(set(marks)) > 1 or marks == "...."
            continues = self.english and not (stopped or opened) and self._next_word(next_at) in _I
            return not (next_character.islower() or continues)
        if not self.english and next_character in DASHES and spaced:  # — Иди! — сказал он.
            after = _SKIP_DASH.match(text, next_at, self.end).end()
            if text[after : min(after + 1, self.end)].islower():
                return clause
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
        if not self.english or not _PLAIN_WORD.match(token):
            return False
        return not (token in NEVER_LAST or token in TITLES or token in SOMETIMES_LAST or token in _SHORTENED)

    def _names_speaker(self, at: int) -> bool:
        if not self.english:
            return False
        speaker = _SPEAKER.match(self.text, at, self.end)
        return speaker is not None and speaker.group(1) in SPEECH_VERBS

    def _is_abbreviation(self, stop: int, next_at: int, opened: bool) -> bool:
        """Whether the full stop at `stop` belongs to an abbreviation, initial or list number."""
        token = self._token(stop)
        if not token or len(token) > 12:
            return False
        if not self.english:
            return self._is_abbreviation_elsewhere(token, next_at)
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

    def _is_abbreviation_elsewhere(self, token: str, next_at: int) -> bool:
        """Without English lists: initials, `т. е.`, `EE.UU.`, `am 3. Mai`, `Nr.`, `art. 5`, titles."""
        if len(token) == 1 and token.isalpha() and token.lower() != token.upper():
            return True
        if token.isdecimal() and len(token) <= 2 or token in TITLES_ELSEWHERE:
            return True
        if _ACRONYM.match(token) or _NO_VOWEL.match(token):
            return True
        return len(token) <= 4 and token.isalpha() and self.text[next_at : next_at + 1].isdecimal()

    def _is_list_number(self, token_at: int, token: str) -> bool:
        """Whether the number or letter opens the line or follows a sentence: `1. Open. 2. Close.`"""
        previous = self.text[max(self.begin, token_at - 40) : token_at].rstrip()
        if not previous.strip(OPENERS):
            return True
        if previous[-1] == ".":  # not "J. R." and not "No. 5."
            return not token.isalpha() and _NOT_TOKEN.split(previous[:-1])[-1].lower() not in NUMBERED
        return previous[-1] in ":;!?。！？：；"

    def _is_initial(self, token_at: int, token: str, starts: bool) -> bool:
        previous = self.text[max(self.begin, token_at - 24) : token_at].split()
        last = previous[-1] if previous else ""
        if token.islower():
            return token == "v" and not starts
        if token == "I" and last.islower():  # "taller than I. Jim left"
            return False
        return not starts or (last.endswith(".") and len(last) == 2)  # J. R. R. In ..., but not Mr. X. The

    def _token(self, stop: int) -> str:
        """The text before `stop` back to white space, a bracket, quote, dash or Chinese character."""
        piece = self.text[max(self.begin, stop - 24) : stop]
        if not piece or piece[-1].isspace():
            return ""
        word = piece.rsplit(None, 1)[-1]
        if word.isascii() and word.replace(".", "").isalnum():  # the common case, ten times faster
            return word
        return _NOT_TOKEN.split(word)[-1]

    def _next_word(self, at: int) -> str:
        word = _NEXT_WORD.match(self.text, at, self.end)
        return word.group() if word else ""


def _is_east_asian(character: str) -> bool:
    return character >= "\u2e80" and EAST_ASIAN.match(character) is not None
