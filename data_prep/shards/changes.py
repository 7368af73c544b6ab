"""What differs between a started or finished run and the command that would resume it, in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from data_prep.common.errors import counted
from data_prep.common.results import RECORD, WorkFolder
from data_prep.corpus.inputs import Piece

SHOWN = 5


def describe_facts(old: dict, new: dict) -> str:
    """`another tokenizer` or `other settings`, with the values that differ; "" for none."""
    found = list(_differences({key: old.get(key) for key in new}, new, ()))
    if not found:
        return ""
    head = "another tokenizer" if all(one.startswith("tokenizer") for one in found) else "other settings"
    return f"{head}: {_listed(found)}"


def describe_inputs(old: Iterable[tuple[str, int]], new: Iterable[tuple[str, int]]) -> str:
    """`other input`, with the files that differ in name, size or order; "" for none. (name, size) each."""
    old, new = list(old), list(new)
    if old == new:
        return ""
    before, now = dict(old), dict(new)
    found = [f"{name} is missing" for name in before if name not in now]
    found += [f"{name} is new" for name in now if name not in before]
    found += [f"{name} had {counted(size, 'byte')}" for name, size in old if now.get(name, size) != size]
    return f"other input: {_listed(found or ['another order of the files'])}"


def changed_input(work: WorkFolder, units: dict[int, list[Piece]], touched: set[str]) -> str | None:
    """The name of a touched file whose content is not what finished units have read; None for none."""
    for phase in ("hash", "shard"):
        for unit in work.done(phase):
            try:
                record = json.loads((work.result(phase, unit) / RECORD).read_bytes())
            except (OSError, ValueError):  # cut short by a crash: it is made again
                continue
            read = record.get("sha256") or [piece["sha256"] for piece in record["pieces"]]
            for piece, sha256 in zip(units[unit], read, strict=True):
                if piece.file.name in touched and piece.sha256() != sha256:
                    return piece.file.name
    return None


def _differences(old: object, new: object, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(new if path == ("tokenizer",) else old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), (*path, key))
    elif old != new:
        name = ".".join(path).removeprefix("settings.").removeprefix("hygiene.")
        yield f"{name} ({_short(old)} there, {_short(new)} here)"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _listed(found: list[str]) -> str:
    more = len(found[SHOWN:])
    return ", ".join(found[:SHOWN]) + (f" and {more:,} more" if more else "")
