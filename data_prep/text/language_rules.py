"""What is special to a language: the words in `languages/<code>.yaml`, and the choice of a line's language.

docs/segmentation.md explains the keys. A change of a file changes cuts: raise `segment_rules.VERSION` in the
same commit.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from data_prep.text.marks import CASELESS, EAST_ASIAN, FAR_LETTERS, KANA, LATIN_LETTERS

_FILES = resources.files("data_prep.text") / "languages"
CODES = tuple(sorted(file.name[:-5] for file in _FILES.iterdir() if file.name.endswith(".yaml")))

_LISTS = (
    "never_last numbered numbered_titles sometimes_last last units shortened starters speech after_ellipsis "
    "names continuers endings"
).split()


@dataclass(frozen=True, eq=False)
class Rules:
    """One language. A word in lower case stands for any case, one with a capital for itself only."""

    code: str
    name: str
    script: re.Pattern | None = None  # its letters; None: Latin
    chosen_by_script: bool = False  # lines of this script are this language unless labelled
    chinese: bool = False  # ASCII marks without a space cut beside East Asian characters
    english: bool = False  # quotation marks open and close one way, and dashes open no dialogue
    japanese: bool = False  # particles continue a sentence after a bracket
    spaces: bool = False  # spaces end sentences
    ordinals: str = (
        ""  # 3. is an ordinal: "lower" before lower case and numbers, "any" unless a starter follows
    )
    roman: bool = False  # XIV. is an ordinal unless a starter follows
    short: int = 0  # words up to this length are abbreviations before a full stop
    never_last: frozenset[str] = frozenset()
    numbered: frozenset[str] = frozenset()
    numbered_titles: frozenset[str] = frozenset()
    sometimes_last: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    units: frozenset[str] = frozenset()
    shortened: frozenset[str] = frozenset()
    starters: frozenset[str] = frozenset()
    speech: frozenset[str] = frozenset()
    after_ellipsis: frozenset[str] = frozenset()
    continuers: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()

    @functools.cached_property
    def continuing(self) -> tuple[str, ...]:
        """For `str.startswith`, as `starting`."""
        return tuple(self.continuers)

    @functools.cached_property
    def starting(self) -> tuple[str, ...]:
        return tuple(self.starters)

    @functools.cached_property
    def name_marks(self) -> frozenset[str]:
        return frozenset(name[-1] for name in self.names)

    @functools.cached_property
    def compounds(self) -> frozenset[str]:
        """Listed words of several parts, without spaces and in lower case: z.b, v.chr."""
        listed = self.never_last | self.numbered | self.sometimes_last | self.last | self.units
        return frozenset(word.lower() for word in listed if "." in word)

    @functools.cached_property
    def judged(self) -> frozenset[str]:
        """Parts of listed words: a full stop after one needs a closer look."""
        listed = self.never_last | self.numbered | self.numbered_titles | self.sometimes_last | self.last
        parts = re.compile(rf"[\w{CASELESS}]+")  # vowel signs are no letters to `re`
        return frozenset(part.lower() for word in listed | self.units for part in parts.findall(word))

    @property
    def first_word(self) -> str:
        """A word that starts sentences."""
        return min(self.starters, default="The")

    def starts(self, word: str) -> bool:
        """Whether `word` starts sentences and follows no abbreviation as part of a name."""
        if word in self.starters or word.isalpha():
            return word in self.starters
        head, mark, _ = word.replace("'", "’").partition("’")
        return bool(mark) and head + "’" in self.starters


@functools.cache
def rules_for(code: str) -> Rules:
    """The rules of the language `code`, one of `CODES`."""
    values = _read(code)
    cldr = values.pop("cldr", "").split()
    words: dict[str, Any] = {key: frozenset(values.pop(key, "").split()) for key in _LISTS}
    plain = frozenset(values.pop("words", "").split())
    words["sometimes_last"] |= {word for word in cldr if word not in plain}
    words |= {key: tuple(sorted(words[key])) for key in ("names", "endings")}
    if script := values.pop("script", None):
        values["script"] = re.compile(f"[{script}]")
    return Rules(code, **values, **words)


def _read(code: str) -> dict[str, Any]:
    values = yaml.load((_FILES / f"{code}.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    base = values.pop("base", None)
    return {**_read(base), **values} if base else values


@functools.cache
def _by_script() -> dict[str, re.Pattern]:
    """The scripts by which lines are chosen, by language."""
    values = {code: _read(code) for code in CODES}
    return {
        code: re.compile(f"[{one['script']}]") for code, one in values.items() if one.get("chosen_by_script")
    }


def line_rules(language: str, text: str, begin: int, end: int, kana: bool = True) -> tuple[Rules, bool]:
    """The rules for one line of a document in `language`, and whether those for ASCII marks beside East Asian
    characters apply.

    A line without a letter of the document's own script is chosen by its script, as all lines are by `auto`
    and, but for Latin ones, by `other`. `kana`: the text may have some.
    """
    if language not in ("auto", "other"):
        rules = rules_for(language)
        if rules.script is None or rules.script.search(text, begin, end):
            return rules, rules.chinese
    latin = "other" if language == "other" else "en"
    # The common case in a text that has a few other letters.
    if text[begin] < "\u0370" and text[begin:end].isascii():
        return rules_for(latin), False
    if EAST_ASIAN.search(text, begin, end):
        return rules_for("ja" if kana and KANA.search(text, begin, end) else "zh"), True
    far = FAR_LETTERS.findall(text, begin, end)
    if not far or sum(map(len, far)) <= sum(map(len, LATIN_LETTERS.findall(text, begin, end))):
        return rules_for(latin), False
    letter = max(far, key=len)[0]
    code = next((code for code, script in _by_script().items() if script.match(letter)), "other")
    return rules_for(code), False
