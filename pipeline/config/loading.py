"""Text to values of the right type: a recipe's YAML file, its bases, overrides, and dataclasses made of them.

In: a YAML file that may start from another one (`base`), `--key value` arguments. Out: plain values, and
dataclasses built from them, with a UserError for what is unreadable, unknown or of another type. Which keys
there are is `recipe.py`'s, which calls this.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError


def parse_overrides(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """`["--a.b", "1", "--c=x"]` → `[("a.b", ["1"]), ("c", ["x"])]`; UserError for anything else."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            found.append((key, [value] if equals else []))
        elif found:
            found[-1][1].append(argument)
        else:
            raise UserError(
                f"unexpected argument {argument!r}: recipe overrides look like --training.max_steps 10"
            )
    for key, values in found:
        if not values:
            raise UserError(f"--{key} needs a value: --{key} VALUE")
    return found


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's mapping, merged over its `base` (a path relative to the file). seen: the files that led
    here."""
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"recipe {path}: `base` leads back to itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"recipe {path} does not exist: see pipeline/recipes/ for the ones that come along"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} is not a mapping of keys to values")
    base = values.pop("base", None)
    if base is None:
        return values
    return _merge(read_yaml(path.parent / str(base), (*seen, resolved)), values, "")


def _merge(under: dict[str, Any], over: dict[str, Any], where: str) -> dict[str, Any]:
    """`over` wins key by key; a model part that brings a path replaces the sizes below it."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        replaces = where == "model." and isinstance(value, dict) and value.get("path")
        if isinstance(value, dict) and isinstance(below, dict) and not replaces:
            merged[key] = _merge(below, value, f"{where}{key}.")
        else:
            merged[key] = value
    return merged


def parse_value(text: str) -> Any:
    """A command line value as YAML would read it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def build(kind: type, values: dict[str, Any], known: Sequence[str], where: str = "") -> Any:
    """A dataclass out of plain values, which may hold others. known: all keys, dotted, for what a message
    suggests; where: the dotted prefix of `kind` itself.

    Raises: UserError for an unknown or missing key and a value of another type.
    """
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise unknown_key(f"{where}{key}", known)
    built = {}
    for item in dataclasses.fields(kind):
        if item.name in values:
            built[item.name] = coerce(hints[item.name], values[item.name], f"{where}{item.name}", known)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UserError(f"recipe: {where}{item.name} is missing")
        elif dataclasses.is_dataclass(hints[item.name]):
            built[item.name] = build(hints[item.name], {}, known, f"{where}{item.name}.")
    return kind(**built)


def coerce(kind: Any, value: Any, key: str, known: Sequence[str] = ()) -> Any:
    """`value` as the annotated type, or UserError. YAML reads `1e-4` as text, so numbers may come as text."""
    if isinstance(kind, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return None if value is None else coerce(inner, value, key, known)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"recipe: {key} must be a mapping, not {value!r}")
        return build(kind, value, known, f"{key}.")
    origin = typing.get_origin(kind)
    if origin is list:
        (inner,) = typing.get_args(kind)
        return [coerce(inner, one, key, known) for one in (value if isinstance(value, list) else [value])]
    if origin is dict:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise UserError(f"recipe: {key} must be a mapping, not {value!r}")
        return dict(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float or number == int(number):
                return kind(number)
        except (TypeError, ValueError, OverflowError):
            pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise UserError(f"recipe: {key} must be {names[kind]}, not {value!r}")


def unknown_key(key: str, known: Sequence[str]) -> UserError:
    """What to raise: with the nearest known key, or all of them."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # people often forget the section: --max_steps instead of --training.max_steps
        last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        near = [
            last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.75)
        ]
    hint = f": did you mean {near[0]!r}?" if near else f": known keys are {', '.join(known)}"
    return UserError(f"unknown recipe key {key!r}{hint}")
