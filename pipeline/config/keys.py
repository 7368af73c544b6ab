"""The keys of a recipe in words: what each must be, what is wrong with a value, and its default."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


def keys_of(
    kind: type[BaseModel], parts: Mapping[str, Iterable[type[BaseModel]]] | None = None, where: str = ""
) -> dict[str, FieldInfo]:
    """Every dotted key of a model and of the models below it, in order.

    Args:
        parts: by key, the models that check a plain dict.
        where: prefix of the keys of `kind` itself.
    """
    found: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        key, inner = where + name, field.annotation
        below = (parts or {}).get(key, ())
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            below = [inner]
        for part in below:
            found |= keys_of(part, parts, f"{key}.")
        if not below:
            found[key] = field
    return found


def expected(field: FieldInfo) -> str:
    """What a value must be: `a number of at least 0 and below 1`."""
    kind, arguments = field.annotation, typing.get_args(field.annotation)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return f"null or {expected(FieldInfo.from_annotation(arguments[0]))}"
    if origin is typing.Literal:
        return f"one of {', '.join(arguments)}"
    limits = {name: getattr(one, name) for one in field.metadata for name in BOUNDS if hasattr(one, name)}
    if origin is list:
        count = next((f" of {one.min_length}" for one in field.metadata if hasattr(one, "min_length")), "")
        return f"a list{count}, each {expected(FieldInfo.from_annotation(arguments[0]))}"
    if kind not in NAMES:
        return "a mapping"
    return " ".join(
        [NAMES[kind], " and ".join(f"{BOUNDS[name]} {limits[name]:g}" for name in limits)]
    ).strip()


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
