"""The rules by which a run of punctuation marks ends a sentence, a clause, or nothing."""

from __future__ import annotations

import re

from data_prep.text.language_rules import Rules
from data_prep.text.marks import (
    CASELESS,
    CLOSE,
    CLOSERS,
    DASHES,
    EAST_ASIAN,
    ELLIPSES,
    FAR_STOPS,
    LOWER,
    MARK,
    OPENERS,
    OTHER_PAUSES,
    PAUSES,
    QUOTE_CLOSERS,
    STOPS,
    TWO_WAY_QUOTES,
    UPPER,
    WIDE_PAUSES,
    WIDE_STOPS,
    WORD_CHARACTER,
)

# Raise it whenever any text could be cut differently: shards made by different rules must not be mixed.
VERSION = 5

LONGEST_QUOTATION = 400  # characters

# 。——然后 and 、-b: the dash or minus opens what follows.
_BEFORE_DASH = re.compile(
    rf"[{MARK}]*?(?:[{re.escape(WIDE_STOPS)}][{CLOSE}]*(?=[{DASHES}-])|[{WIDE_PAUSES}][{CLOSE}]*(?=-))"
)
_ANY_MARK = re.compile(rf"[{MARK}-]")
_DOUBLE_QUOTE = re.compile('["“”]')
_PAUSES_AND_DASHES = PAUSES + DASHES + "-"
_WIDE_STOPS = frozenset(WIDE_STOPS)
_NOT_MARKS = re.compile(rf"[^{MARK}{FAR_STOPS}-]+")
_OPENING = re.compile(r"[“‘「『«﹁﹃(\[{（［｛【《〈〔〖〘〚]|(?<!\S)[\"']")
# With the vowel signs of Indic scripts and Thai, which are no letters to `re`.
_NEXT_WORD = re.compile(r"(?:[^\W\d_]|[\u0900-\u0963\u0966-\u0e7f])+(?:['’][^\W\d_]+)?")
_SKIP_DASH = re.compile(rf"[{DASHES}\s]*[{re.escape(OPENERS)}\s]*")
_SKIP = re.compile(rf"\s*[{re.escape(OPENERS)}\s]*")
# ד"ר is one token.
_NOT_TOKEN = re.compile(
    r'(?!(?<=[\u05d0-\u05ea])"[\u05d0-\u05ea])'
    rf"[\s/{re.escape(OPENERS + DASHES + WIDE_STOPS + WIDE_PAUSES + OTHER_PAUSES)}\u2e80-\U0003ffff]"
)
_ACRONYM = re.compile(r"(?:[^\W\d_]{1,2}\.-?)+[^\W\d_]{1,3}\Z")
_ENUMERATOR = re.compile(r"(?:\d{1,3}(?:\.\d{1,2})*|[^\W\d_]|[ivxlIVXL]{2,6})\Z")
_WIDE_ENUMERATOR = re.compile(r"(?:\d{1,3}|[一二三四五六七八九十]{1,3}|[①-⑳⑴-⑽])\Z")
_ROMAN, _SMALL_ROMAN = re.compile(r"[IVXLCM]+\Z"), re.compile(r"[ivx]+\Z")
_DATE = re.compile(r"\d{1,2}\.|\d{4}\b|§")
_NEXT_ITEM = re.compile(r"(?:\d{1,3}|[^\W\d_])\)")
_YEAR = re.compile(r" ?\d{4}\b")
_MONTH_DAY = re.compile(r"(?:[^\W\d_]|\.) \d\d?\Z")
_PLAIN_WORD = re.compile(r"(?=.*[aeiouy])[a-z]{2,}\Z")

_VOWELS = "aeiouyáéíóúàèìòùâêîôûäöüőűýěůąęıаеёиоуыэюяіїє"
_LONG_WORD = re.compile(rf"[{UPPER}{LOWER}][{LOWER}]{{4,}}\Z|[{LOWER}]{{2,}}[{_VOWELS}][{LOWER}]?\Z")
_CASELESS = re.compile(f"[{CASELESS}]")
_SPACED = re.compile(r"(?<![^\W_])(?:[^\W\d_]{1,3}\.[ \u00a0\u202f]?)+[^\W\d_]{1,4}\Z")
_INITIAL = re.compile(r"[^\W\d_]\.")
_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]")

# Inline code, formulas and titles of works: one unit, whatever marks they contain.
_CODE = (
    r"《[^《》\n]{1,60}》|`[^`。！？．，；\n]{1,200}`|\$(?![\s\d{$])[^$。！？．，；\n]{0,200}(?<!\s)\$(?!\d)"
)
_UNIT = {
    "": re.compile(_CODE),
    # Titles in quotation marks, no speech: «Стихи. Поэмы. Проза»
    "foreign": re.compile(rf"{_CODE}|(?<=[^\W_] )[«„“] ?[^«»„“”:\n]{{1,80}}[^\W_] ?[»“”]"),
    # Asides, and titles before a particle: 『君の名は。』を
    "japanese": re.compile(
        rf"{_CODE}|(?<!^)（[^（）\n]{{1,100}}）(?=\w)|『[^『』\n]{{1,60}}』(?=[をのがはにへもで])"
    ),
}
_UNIT_SIGNS = {"": "`$《", "foreign": "`$《«„“", "japanese": "`$《（『"}
_SPEAKER = re.compile(r"(?:I|(?:[A-Z][^\W\d_]*\.? ){0,2}[A-Z][^\W\d_]+) ([a-z]+)\b")

# A quotation that is a term of the sentence around it: “为什么？”这个问题很难。
_QUOTED_TERM = re.compile(
    r"的|之|[这這](?:[个個]|一)?(?:问题|問題|词|詞|字|句?话|句?話|说法|說法)|一[词詞]|[二两兩三四几幾][个個]?字|[为為]题|云云"
)

# In Japanese a particle before anything but kana (or と, って, など) continues: 「行くよ。」と彼は言った。
_PARTICLE = re.compile(
    r"[をのがはにへもでや](?![\u3041-\u3096])|を|の(?=よう|中|前|後)|と(?![てこにりきなも])|って|という|など|です|だ[。、っとよ]"
)

# “好。”然后走了: the subject of the sentence around the quotation continues.
_GOES_ON = re.compile(r"[然随]后|[然隨]後|接[着著]|[随隨]即|就(?!是)")
_QUOTE_BEGINS = re.compile(r"[\u4e00-\u9fff][“「『][^“”「」『』]*\Z")

# “你好！”他说。 but not 「……。」那妖精聽說，……
_WIDE_SPEAKER = re.compile(
    r"[\u4e00-\u9fff]{1,4}?(?<![听聽不再小所分知难難味街地])[说說道問问喊叫答]道?[。，！]"
)


def _unit_kind(rules: Rules) -> str:
    return "japanese" if rules.japanese else "" if rules.english else "foreign"


def unit_signs(rules: Rules, text: str) -> list[str]:
    """The first characters of units, in lines of a language, that occur in `text`."""
    return [sign for sign in _UNIT_SIGNS[_unit_kind(rules)] if sign in text]


class Judge:
    """Judges the runs of marks in one line, `text[begin:end]`, in order.

    In the methods, `first` and `cut` are the start and end of a run with its closing quotes, `marks` the
    run's marks alone, and `start` the start of the current sentence. Every look back has a bounded length, so
    the time is linear in the line's length.
    """

    def __init__(self, text: str, clause: bool) -> None:
        self.text, self.clause = text, clause

    def open_line(self, begin: int, end: int, rules: Rules, chinese: bool, units: bool) -> None:
        self.begin, self.end, self.rules, self.chinese = begin, end, rules, chinese
        self.english = rules.english
        self.start = self._seen = begin  # no letter or digit between `start` and `_seen`
        self._counted, self._quoted = begin, False  # whether a double quotation is open at `_counted`
        self._units = _UNIT[_unit_kind(rules)].finditer(self.text, begin, end) if units else None
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
            marks = _NOT_MARKS.sub("", text[first:cut].partition("[")[0])
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
        if self.rules.japanese and (quote := text.find("'", first + 1, cut)) >= 0:  # 。'gdb' が
            opened = text.count("'", max(self.start, quote - LONGEST_QUOTATION), quote) % 2
            if text[quote - 1] in _WIDE_STOPS and not opened:
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
        if marks == ".,":  # "e.g., apples"
            token = self._token(first)
            if (token.islower() or "." in token) and token.lower() in self.rules.never_last:
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
        text, clause, rules = self.text, self.clause, self.rules
        before, following = text[first - 1], text[cut]
        quoted = text[cut - 1] in (QUOTE_CLOSERS if self.english else QUOTE_CLOSERS + TWO_WAY_QUOTES)
        if text[first] in rules.name_marks and text.endswith(
            rules.names, max(self.begin, first - 24), first + 1
        ):
            # Yahoo! JAPAN and “Yahoo!” I said.
            next_at = _SKIP.match(text, cut, self.end).end()
            starts = following.isspace() and rules.starts(self._next_word(next_at))
            return starts and (clause or not (quoted and self._names_speaker(next_at)))
        if not _WIDE_STOPS.isdisjoint(marks):
            return self._ends_at_wide_stop(cut, marks, quoted)
        spaced = following.isspace()
        if not spaced and not (self.chinese and (_is_east_asian(before) or _is_east_asian(following))):
            return False
        next_at = _SKIP.match(text, cut, self.end).end()
        next_character = text[next_at : min(next_at + 1, self.end)]
        opened = next_at > cut and text[next_at - 1] in OPENERS
        ellipsis = marks[-1] in ELLIPSES or marks[-2:] in ("..", "….")
        if ellipsis and clause:
            return True
        if (ellipsis or marks == ".") and self._continues_in_kana(before, next_at):
            return False
        if ellipsis:
            if not spaced and _is_east_asian(before):
                return quoted or opened
            # "Well... I think" continues; with a further full stop (four dots, ".…") the sentence has ended.
            word = self._next_word(next_at)
            if len(set(marks)) > 1 or marks == "...." or opened:
                return not _is_lower(next_character)
            if _CASELESS.match(next_character):
                return quoted or rules.starts(word)
            return not (_is_lower(next_character) or word in rules.after_ellipsis)
        if not self.english and next_character in DASHES and spaced:  # — Иди! — сказал он.
            after = _SKIP_DASH.match(text, next_at, self.end).end()
            if _is_lower(text[after : min(after + 1, self.end)]):
                return clause
        if _is_lower(next_character) and not _CASELESS.match(before):  # “Go!” he said. He (poor man!) wept.
            if marks == text[cut - 1] == "." and spaced:
                return self._is_careless(first)
            return clause and (quoted or (marks[-1] != "." and text[cut - 1] not in ")]"))
        if marks[-1] not in ".．":
            return clause or not (quoted and self._names_speaker(next_at))
        if not spaced and (before.isdigit() or not (_is_east_asian(following) or opened)):
            return False  # "3.介绍" and "使用.NET", but not "使用 Rust.然后"
        if marks[-1] == "．" and len(self._token(first)) == 1:  # "A．苹果 B．香蕉"
            return False
        if _NEXT_ITEM.match(text, next_at, self.end) and _NEXT_ITEM.match(text[self.start : first].lstrip()):
            return False  # 1) Open it. 2) Close it.
        return not self._is_abbreviation(first, next_at, opened)

    def _continues_in_kana(self, before: str, next_at: int) -> bool:
        """Whether a particle follows marks that are not after Japanese: “.”で始まる, 2. の場合, 1;...は"""
        kana = "\u3040" < self.text[next_at : next_at + 1] < "\u3100" and not _is_east_asian(before)
        return kana and _PARTICLE.match(self.text, next_at, self.end) is not None

    def _ends_at_wide_stop(self, cut: int, marks: str, quoted: bool) -> bool:
        text, clause = self.text, self.clause
        if text[cut - 1] in ")）" and marks[-1] not in "。｡":
            # the sentence continues after an aside: 他（可怜！）病了
            return text[self.start : cut].lstrip()[0] in "(（"
        kana = "\u3040" < text[cut] < "\u3100"
        if kana and self.chinese and text[cut - 1] in "」』”）" and _PARTICLE.match(text, cut, self.end):
            return False
        if quoted and marks[-1] not in "。｡" and _QUOTED_TERM.match(text, cut, self.end):
            return False
        if clause or not quoted:
            return True
        if _WIDE_SPEAKER.match(text, cut, self.end):
            return False
        if not self.english and self._names_speaker(_SKIP.match(text, cut, self.end).end()):
            return False
        # 他说“好。”然后走了。
        goes_on = text[cut] in "然随隨接就" and marks[-1] in "。｡" and self.chinese
        goes_on = goes_on and _GOES_ON.match(text, cut, self.end) is not None
        return not (goes_on and _QUOTE_BEGINS.search(text[max(self.start, cut - 60) : cut - 1]))

    def _is_careless(self, stop: int) -> bool:
        """Whether a sentence ends before a lower-case word: after plain words (`i like it. it is good`)."""
        token, rules = self._token(stop), self.rules
        # Unlisted abbreviations are short or end before a vowel.
        plain = _PLAIN_WORD if rules.shortened else _LONG_WORD
        if not plain.match(token) or _SMALL_ROMAN.match(token):
            return False
        lists = (rules.never_last, rules.sometimes_last, rules.numbered, rules.shortened)
        return not any(token in words for words in lists)

    def _names_speaker(self, at: int) -> bool:
        """Whether the words after a quotation say who spoke: “Who?” Jim asked."""
        speech = self.rules.speech
        if not speech:
            return False
        if self.english:
            speaker = _SPEAKER.match(self.text, at, self.end)
            return speaker is not None and speaker.group(1) in speech
        words = re.split(rf"[{MARK}]", self.text[at : min(at + 40, self.end)], maxsplit=1)[0].split()
        return not speech.isdisjoint(words[:4])

    def _is_abbreviation(self, stop: int, next_at: int, opened: bool) -> bool:
        """Whether the full stop at `stop` belongs to an abbreviation, initial, ordinal or list number."""
        text, rules, token = self.text, self.rules, self._token(stop)
        if not token or len(token) > 12:
            return False
        if rules.spaces and len(token) <= rules.short:
            return True
        token_at = stop - len(token)
        word = self._next_word(next_at)
        after = next_at + len(word)
        starts = opened or (rules.starts(word) and text[after : after + 1] != ".")
        whole, part = token, token.rpartition(".")[2]  # the end of PGS.TS.
        if len(token) < 5 and text[token_at - 2 : token_at - 1] == "." and text[token_at - 1].isspace():
            # z. B., т. е.
            joined = _SPACED.search(text[max(self.begin, stop - 24) : stop])
            if joined is not None and (spelled := "".join(joined.group().split())).lower() in rules.compounds:
                whole = part = spelled
        # DIR in capitals is no abbreviation of a word; English tells no difference.
        capitals = not self.english and len(whole) > 2 and whole.isalpha() and whole.isupper()
        forms = {whole} if capitals else {whole, whole.lower()}
        before = text[max(self.begin, token_at - 12) : token_at].rstrip()
        # यू. के.: letters of an abbreviation
        spelled_out = rules.short and before.endswith(".") and len(before.split()[-1]) <= rules.short + 1
        if whole in rules.last and not spelled_out:
            # J.-C. Dupont: nothing ends at the first word.
            return not (starts or self.text[self.start : token_at].strip(OPENERS + " "))
        if text[after : after + 1] == "." and f"{whole}.{word}".lower() in rules.compounds:  # v. Chr.
            return True
        if not rules.units.isdisjoint(forms) and before[-1:].isdigit():
            # "В 1985 г. Горбачёв" only opens a sentence.
            opening = len(text[self.start : stop].split(None, 5)) < 5
            return opening and not starts and not rules.never_last.isdisjoint(forms)
        if not rules.never_last.isdisjoint(forms | ({part, part.lower()} if part != whole else set())):
            return True
        if not (spelled_out or rules.last.isdisjoint(forms)):
            return False
        if _ENUMERATOR.match(token) and self._is_list_number(token_at, token):
            return True
        if self._is_numbered(whole):
            if text[next_at : next_at + 1].isdigit() or (_ROMAN.match(word) and word != "I"):
                return True
            if token in rules.numbered_titles:
                return not starts
        if len(token) == 1 and token.islower() and _INITIAL.match(text, next_at, self.end):  # z. B.
            return True
        if len(token) == 1 and (token.isupper() or _CASELESS.match(token)):
            return self._is_initial(token_at, token, starts)
        if token.isdecimal():
            return self._is_ordinal(token, before, next_at, starts)
        if len(token) <= rules.short or (rules.roman and _ROMAN.match(token)):
            return not starts
        return not starts and not (rules.sometimes_last.isdisjoint(forms) and _ACRONYM.match(token) is None)

    def _is_ordinal(self, token: str, before: str, next_at: int, starts: bool) -> bool:
        """Whether a number before a full stop is an ordinal: am 3. Mai, 15. 3. 2024; not in `Nr. 5.`"""
        ordinals = self.rules.ordinals
        if not ordinals or len(token) > 4:
            return False
        if _DATE.match(self.text, next_at, self.end):
            return True
        if len(token) > 2 or ordinals != "any":
            return False
        return not (starts or (before.endswith(".") and self._is_numbered(_NOT_TOKEN.split(before[:-1])[-1])))

    def _is_numbered(self, word: str) -> bool:
        """Whether `word` is an abbreviation before numbers: No., S., Goethestr."""
        lower = word.lower()
        return lower in self.rules.numbered or lower.endswith(self.rules.endings or ("\0",))

    def _is_list_number(self, token_at: int, token: str) -> bool:
        """Whether the number or letter opens the line or follows a sentence: `1. Open. 2. Close.`"""
        previous = self.text[max(self.begin, token_at - 40) : token_at].rstrip()
        if not previous.strip(OPENERS):
            return True
        if previous[-1] == ".":  # not "J. R." and not "No. 5."
            return not (token.isalpha() or self._is_numbered(_NOT_TOKEN.split(previous[:-1])[-1]))
        return previous[-1] in ":;!?。！？：；।؟۔"

    def _is_initial(self, token_at: int, token: str, starts: bool) -> bool:
        previous = self.text[max(self.begin, token_at - 24) : token_at].split()
        last = previous[-1] if previous else ""
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


def _is_lower(character: str) -> bool:
    """Whether the letter is small; not so in Georgian, whose letters begin sentences as they are."""
    return character.islower() and character.title() != character


def _is_east_asian(character: str) -> bool:
    return character >= "\u2e80" and EAST_ASIAN.match(character) is not None
