"""Types of the keys of a recipe, and what they are in words, for messages, `--help` and docs."""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
LARGEST = 2**63 - 1  # of a seed, and of what numpy and torch count with
BOUNDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


def read_number(value: Any) -> Any:
    """Text as a number where it is one: YAML reads `1e-4` as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _whole(value: Any) -> Any:
    number = read_number(value)
    if isinstance(number, (int, float)) and LARGEST < number < math.inf:
        raise ValueError(f"must be below 2^63, not {value}")
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _dict(value: Any) -> Any:
    return {} if value is None else value


Item = TypeVar("Item")
List = Annotated[list[Item], BeforeValidator(_list)]
Dict = Annotated[dict[str, Item], BeforeValidator(_dict)]
# Strict after reading text, so that true and false are no numbers.
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0)]
Count = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=1)]
Number = Annotated[float, BeforeValidator(read_number), Field(strict=True, ge=0)]
AtLeast1 = Annotated[float, BeforeValidator(read_number), Field(strict=True, ge=1)]
Above1 = Annotated[float, BeforeValidator(read_number), Field(strict=True, gt=1)]
Positive = Annotated[float, BeforeValidator(read_number), Field(strict=True, gt=0)]
Share = Annotated[float, BeforeValidator(read_number), Field(strict=True, ge=0, le=1)]
Below1 = Annotated[float, BeforeValidator(read_number), Field(strict=True, ge=0, lt=1)]
Decay = Annotated[float, BeforeValidator(read_number), Field(strict=True, gt=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
# No file has a name with a zero byte.
Text = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]
# Every section of a recipe may be left out; its cross-checks run all the same.
SECTION: Any = Field(default_factory=dict, validate_default=True)


class Section(BaseModel):
    """A group of keys. Unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    def problems(self) -> Iterator[str]:
        """What does not fit together, when each value by itself is right."""
        return iter(())

    @model_validator(mode="after")
    def _fits_together(self) -> Section:
        if found := "; ".join(self.problems()):
            raise ValueError(found)
        return self


def keys_of(kind: type[BaseModel], where: str = "") -> dict[str, FieldInfo]:
    """The keys of a model itself, without its sections, which have no description. where: their prefix."""
    return {where + name: field for name, field in kind.model_fields.items() if field.description}


def expected(field: FieldInfo) -> str:
    """What a value must be: `a number of at least 0 and below 1`."""
    kind, arguments = field.annotation, typing.get_args(field.annotation)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return f"null or {expected(FieldInfo.from_annotation(arguments[0]))}"
    if origin is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if origin is list:
        count = next((f" of {one.min_length}" for one in field.metadata if hasattr(one, "min_length")), "")
        return f"a list{count}, each {expected(FieldInfo.from_annotation(arguments[0]))}"
    if kind not in NAMES:
        return "a mapping"
    limits = " and ".join(
        f"{words} {getattr(one, name):g}"
        for name, words in BOUNDS.items()
        for one in field.metadata
        if hasattr(one, name)
    )
    return f"{NAMES[kind]} {limits}".rstrip()


def explain(error: ValidationError, keys: Mapping[str, FieldInfo], where: str = "") -> list[str]:
    """All problems of a recipe, a clause each. where: prefix of the keys of the model that was validated."""
    return [_clause(dict(one), keys, where) for one in error.errors(include_url=False)]


def _clause(problem: dict[str, Any], keys: Mapping[str, FieldInfo], where: str) -> str:
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key(where + ".".join(map(str, problem["loc"])), keys)
    # An item of a list is called by its list.
    key = where + ".".join(part for part in problem["loc"] if isinstance(part, str))
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])
        return f"{key} {reason}" if reason.startswith("must be") else reason
    kind = expected(keys[key]) if key in keys else "a mapping"
    return f"{key} must be {kind}, not {problem['input']!r}"


def unknown_key(key: str, known: Collection[str]) -> str:
    """What to say about a key: the nearest known one, or all of them."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # people often forget the section: --max_steps instead of --training.max_steps
        last = {name.rsplit(".", 1)[-1]: name for name in reversed(list(known))}
        named = difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.75)
        near = [last[name] for name in named]
    hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
    return f"unknown recipe key {key!r}: {hint}"


def default(field: FieldInfo) -> str:
    """A key's default as YAML has it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) else json.dumps(value)


def as_text(keys: Mapping[str, FieldInfo]) -> str:
    """Every key with its type, default and meaning, for `--help`."""
    return "\n".join(
        f"  --{key} ({expected(field)}; default {default(field)})\n      {field.description}"
        for key, field in keys.items()
    )
