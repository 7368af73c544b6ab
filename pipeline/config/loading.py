"""A recipe's YAML file with its bases, and overrides from the command line, as plain values."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError
from pipeline.config.library import RECIPES, like

MOST_BASES = 20
TRAIN_ARGS = "SLLM_TRAIN_ARGS"


class _Loader(yaml.SafeLoader):
    """YAML in which no key of a mapping is given twice and numbers are decimal.

    What YAML 1.1 also takes for a number or date stays text: `010` (octal), `1:30` (base 60), `2026-01-31`.
    """

    def compose_mapping_node(self, anchor: str) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, before = key.start_mark.line + 1, lines.get((key.tag, key.value))
            if before is not None:
                raise yaml.YAMLError(f"key {key.value!r} is given twice, in lines {before} and {line}")
            lines[key.tag, key.value] = line
        return node


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    whole, text = node.tag.endswith(":int"), node.value
    if re.search(r":|_|^[-+]?0[0-9a-z]", text):
        return text
    return int(text) if whole else loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)


def load_yaml(text: str) -> Any:
    """Plain values. Raises: yaml.YAMLError, also for a key that is given twice or for deep nesting."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def environment_overrides() -> list[str]:
    """Overrides of a training's recipe from SLLM_TRAIN_ARGS: for batch systems, and to shorten a command."""
    try:
        return shlex.split(os.environ.get(TRAIN_ARGS, ""))
    except ValueError as error:
        raise UserError(f"{TRAIN_ARGS}: {error}: give words as on a command line") from None


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


def set_override(values: dict[str, Any], key: str, texts: list[str], is_text: bool) -> None:
    """Put one command line value where it belongs: as it is if the key holds text, else as YAML reads it."""
    *sections, last = key.split(".")
    node = values
    for section in sections:
        if not isinstance(node.get(section), dict):
            node[section] = {}
        node = node[section]
    if sections[:1] == ["model"] and (last == "path" or node.get("path")):
        node.clear()
    parsed = [_parse_value(text, is_text) for text in texts]
    node[last] = parsed[0] if len(parsed) == 1 else parsed


def _parse_value(text: str, is_text: bool) -> Any:
    # `run #2`, `a: b` and `2026` may be names of folders; a list and null are none.
    if is_text and text not in ("", "null", "~") and text[0] not in "['\"":
        return text
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's mapping, merged over its `base` (a path relative to the file).

    Args:
        seen: the files that led here.
    Raises: UserError for a file that is missing, no mapping, or its own base.
    """
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"recipe {path}: `base` leads back to itself")
    if len(seen) > MOST_BASES:
        raise UserError(f"recipe {path}: more than {MOST_BASES} recipes are based on each other")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist: {like(path, RECIPES)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
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
