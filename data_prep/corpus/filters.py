"""Text and language of a record, cleaning rules, and filters that leave records out.

`Filters` is part of a shard set's settings; rules that change bytes or drop documents are off by default.
Its fields are options of the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators

from data_prep.common.errors import UserError, counted
from data_prep.common.identify import identifier, identify, labels
from data_prep.common.language import detect_language
from data_prep.common.language_codes import normal_language, require_language
from data_prep.corpus.unwrap import unwrap

MAX_TEXT_MB = 4.0  # docs/inputs.md, Measured
MIN_CONFIDENCE = 0.5
UNDETERMINED = "und"
NORMAL_FORMS = ("NFC", "NFKC")
OPTIONS = tuple("abcde")  # of a question in WanJuan's Exam-cn
EXAM_FIELDS = ("q_main", *(f"option_{letter}" for letter in OPTIONS), "std_ans", "answer", "answer_detail")
TEXT_FIELDS = ("content", "text", "q_main")  # the first one that a record has decides its schema

_MISSING = object()

# Control characters that break a line become a line feed; others are removed, except tab and line feed.
_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]+")
_CRLF = re.compile("\r+\n")
_TRAILING = re.compile(r"[ \t]+(?=\n|\Z)")
_SPACES = re.compile(r"[ \t]{2,}")
_FEEDS = re.compile(r"\n{3,}")

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}

_FILTER = re.compile(r"\s*([^\s<>=!]+)\s*(<=|>=|==|!=|<|>)\s*([^\s<>=!](?:.*\S)?)\s*")


@dataclass(frozen=True)
class Filter:
    """`FIELD OP VALUE` over a record's fields: records for which it is true are kept."""

    field: str
    comparison: str
    value: str

    @classmethod
    def parse(cls, expression: str) -> Filter:
        """Raises `UserError` unless `expression` reads like `toxic_score<0.5`."""
        if not (match := _FILTER.fullmatch(expression)):
            raise UserError(
                f"filter {expression!r} is not FIELD OP VALUE, with OP one of < <= > >= == !=; "
                "write for example --filter 'toxic_score<0.5'"
            )
        field, comparison, value = match.groups()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        return cls(field, comparison, value)

    def __str__(self) -> str:
        return f"{self.field}{self.comparison}{self.value}"

    def refusal(self, record: dict) -> str | None:
        """Why the record is left out, or None."""
        found = look_up(record, self.field)
        if found is _MISSING or found is None:
            return f"filter: no {self.field}"
        wanted = _number(self.value)
        if isinstance(found, bool):
            found = "true" if found else "false"
        elif hasattr(found, "isoformat"):  # dates in tables
            found = found.isoformat()
        # Compared as numbers if both are, else as strings. "n/a" is neither below nor above a number.
        if wanted is not None and (number := _number(found)) is not None:
            holds = _COMPARISONS[self.comparison](number, wanted)
        elif wanted is not None or not isinstance(found, str):
            holds = self.comparison == "!="
        else:
            holds = _COMPARISONS[self.comparison](found, self.value)
        return None if holds else f"filter: {self}"


DUPLICATE, NEAR_DUPLICATE, SHARES_WORDS = "duplicate", "near-duplicate", "shares words with a test text"
# Starts of the reasons of `Filters.refusal`, and of comparisons: documents that the user did not want.
ASKED_FOR = ("too short", "too long", "language: ", "filter: ", DUPLICATE, NEAR_DUPLICATE, SHARES_WORDS)


@dataclass(frozen=True)
class Filters:
    """Cleaning rules and filters of records, all off by default.

    Args:
        text_field: field that holds the text, a.b looks inside (default: found)
        filters: keep records for which 'FIELD OP VALUE' holds, such as 'toxic_score<0.5'; may be repeated
        strip_control: remove control characters but line feed and tab
        white_space: one space for runs, none at line ends, one empty line
        normal_form: Unicode normal form of the text
        min_chars: leave out shorter documents
        max_chars: leave out longer documents (0: no limit)
        keep_languages: leave out documents in other languages (default: keep all)
        max_text_mb: reject texts of more UTF-8 bytes: the tokenizer takes up to 40 bytes of memory per byte
        identify_language: find the language of documents without a label by their letters (extra `lang`), not
            by folder and script
        min_confidence: with --identify-lang: below, a document has its folder's language, or und
        unwrap: join hard-wrapped lines

    Raises:
        UserError: a value is invalid.
    """

    text_field: str | None = None
    filters: Annotated[tuple[str, ...], Parameter(name="--filter")] = ()
    strip_control: bool = False
    white_space: bool = False
    normal_form: Literal["NFC", "NFKC"] | None = None
    min_chars: int = 0
    max_chars: int = 0
    keep_languages: Annotated[tuple[str, ...], Parameter(name="--keep-lang", consume_multiple=1)] = ()
    max_text_mb: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=1000))] = MAX_TEXT_MB
    identify_language: Annotated[bool, Parameter(name="--identify-lang")] = False
    min_confidence: Annotated[float, Parameter(validator=validators.Number(gte=0, lte=1))] = MIN_CONFIDENCE
    unwrap: bool = False

    def __post_init__(self) -> None:
        if not self.identify_language and self.min_confidence != MIN_CONFIDENCE:
            raise UserError("--min-confidence is for --identify-lang: give both")
        object.__setattr__(self, "filters", tuple(str(parsed) for parsed in self._parsed))
        languages = {require_language(language, "--keep-lang") for language in self.keep_languages}
        object.__setattr__(self, "keep_languages", tuple(sorted(languages)))
        if self.identify_language:  # loads the model, before other processes are forked
            known = sorted(filter(None, map(normal_language, labels())))
            if unknown := languages - set(known):
                raise UserError(
                    f"--identify-lang cannot find {', '.join(sorted(unknown))}; it knows {' '.join(known)}"
                )
        if self.normal_form not in (None, *NORMAL_FORMS):
            raise UserError(f"normal form {self.normal_form!r} is unknown; use NFC or NFKC")
        if self.min_chars < 0 or self.max_chars < 0 or 0 < self.max_chars < self.min_chars:
            raise UserError(
                f"no text has at least {self.min_chars} and at most {counted(self.max_chars, 'character')}; "
                "check --min-chars and --max-chars"
            )
        if self.text_field == "":
            raise UserError("the text field has no name; write for example --text-field body.text")

    @functools.cached_property
    def _parsed(self) -> tuple[Filter, ...]:
        return tuple(map(Filter.parse, self.filters))

    def to_dict(self) -> dict:
        """The rules as JSON values, for the manifest and the settings fingerprint."""
        lists = {"filters": list(self.filters), "keep_languages": list(self.keep_languages)}
        settings = dataclasses.asdict(self) | lists
        if self.max_text_mb == MAX_TEXT_MB:  # sets made before there was a setting have the same fingerprint
            del settings["max_text_mb"]
        if self.identify_language:
            settings |= {"identifier": identifier()}
        else:  # sets made before there was an identifier have the same fingerprint
            del settings["identify_language"], settings["min_confidence"]
        if not self.unwrap:  # settings of older shards have none
            del settings["unwrap"]
        # The normal form of a new character depends on the version of Unicode.
        return settings | ({"unicode": unicodedata.unidata_version} if self.normal_form else {})

    @classmethod
    def from_dict(cls, settings: dict) -> Filters:
        """The inverse of `to_dict`. Raises: UserError for languages found by another identifier."""
        if (found := settings.get("identifier")) and found != identifier():
            raise UserError(
                f"the languages were identified by {found}, which is not installed ({identifier()} is)"
            )
        settings = {name: value for name, value in settings.items() if name not in ("unicode", "identifier")}
        lists = {name: tuple(settings[name]) for name in ("filters", "keep_languages") if name in settings}
        return cls(**settings | lists)

    def fields(self) -> set[str]:
        """Names of all fields that the rules, the text, the id and the language may need."""
        names = {"id", "language", *((self.text_field,) if self.text_field else (*TEXT_FIELDS, *EXAM_FIELDS))}
        names |= {one.field for one in self._parsed}
        return names | {name.split(".")[0] for name in names}

    def text_of(self, record: dict, language: str | None = None) -> tuple[str, str | None]:
        """(text as stored, None), or ("", the reason why there is no text).

        Args:
            language: of the folder of an exam question, for its labels.
        """
        if self.text_field is not None:
            found = look_up(record, self.text_field)
        elif "content" in record:
            found = record["content"]
        elif "text" in record:
            found = record["text"]
        elif "q_main" in record:
            if isinstance(record["q_main"], str):
                return exam_text(record, language), None
            found = record["q_main"]
        else:
            found = _MISSING
        if found is _MISSING:
            return "", "no content"
        if isinstance(found, bytes):  # of a table, and not UTF-8
            return "", "undecodable bytes"
        return (found, None) if isinstance(found, str) else ("", "content is not text")

    def clean(self, text: str) -> tuple[str, list[str]]:
        """The cleaned text, and the names of the rules that changed it."""
        changed = []
        if self.strip_control and text != (clean := _CONTROL.sub("", _BREAKS.sub("\n", text))):
            text = clean
            changed.append("control characters removed")
        if self.unwrap and text != (clean := unwrap(text)):
            text = clean
            changed.append("lines joined")
        if (form := self.normal_form) and text != (clean := unicodedata.normalize(form, text)):
            text = clean
            changed.append("normal form")
        if self.white_space:  # last: normal forms turn other spaces into plain ones
            clean = _TRAILING.sub("", _CRLF.sub("\n", text))
            clean = _FEEDS.sub("\n\n", _SPACES.sub(" ", clean))
            if text != clean:
                text = clean
                changed.append("white space")
        return text, changed

    def language_of(self, record: dict, text: str, folder: str | None) -> tuple[str, float | None]:
        """The language that the record names, else its folder, else its script. With `identify_language` the
        language of its letters comes before the folder, with a confidence."""
        if named := normal_language(record.get("language")):
            return named, None
        if not self.identify_language:
            return folder or detect_language(text), None
        found, confidence = identify(text)
        language = normal_language(found) if confidence >= self.min_confidence else None
        return language or folder or UNDETERMINED, confidence

    def refusal(self, record: dict, text: str, language: str) -> str | None:
        """Why a document is filtered out, or None. `text` is the cleaned text."""
        if self.min_chars and len(text) < self.min_chars:
            return "too short"
        if self.max_chars and len(text) > self.max_chars:
            return "too long"
        if self.keep_languages and language not in self.keep_languages:
            return f"language: {language}"
        for one in self._parsed:
            if reason := one.refusal(record):
                return reason
        return None


def look_up(record: dict, field: str) -> Any:
    """The value of a field, by its exact name or by the path `a.b`; `_MISSING` if absent."""
    if field in record:
        return record[field]
    found: Any = record
    for part in field.split("."):
        if not isinstance(found, dict) or part not in found:
            return _MISSING
        found = found[part]
    return found


def exam_text(record: dict, language: str | None = None) -> str:
    """A question of Exam-cn as text: question, options, answer, explanation.

    Empty fields and repeated values are left out. Labels are Chinese where the folder's `language` or
    the question is.
    """
    fields = {name: _plain(record.get(name)) for name in EXAM_FIELDS}
    lines = [fields["q_main"]] if fields["q_main"] else []
    for letter in OPTIONS:
        if option := fields[f"option_{letter}"]:
            lines.append(f"{letter.upper()}. {option}")
    chinese = language == "zh" or detect_language("\n".join(fields.values())) == "zh"
    labels = ("答案：", "解答：", "解析：") if chinese else ("Answer: ", "Solution: ", "Explanation: ")
    seen = {""}
    for label, name in zip(labels, ("std_ans", "answer", "answer_detail"), strict=True):
        value = fields[name]
        if value not in seen:
            # `answer` replaces a missing standard answer.
            label = labels[0] if name == "answer" and not fields["std_ans"] else label
            lines.append(label + value)
            seen.add(value)
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return ", ".join(filter(None, map(_plain, value)))
    return ""


def encodable(text: str) -> bool:
    """Whether the text has UTF-8 bytes: no lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _number(value: Any) -> float | int | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    try:  # decimals in tables
        return float(value) if hasattr(value, "as_tuple") else None
    except (TypeError, ValueError):
        return None
