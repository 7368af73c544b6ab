"""Parts of a manifest, from the records of units (`data_prep/jobs/units.py`), and what belongs to it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_prep.common.files import file_sha256
from data_prep.corpus.inputs import InputFile, Piece
from data_prep.shards.layout import SHARD_ENDINGS, TOKENIZER_FOLDER
from data_prep.text.tokenizer import Tokenizer


def input_entries(files: list[InputFile], units: dict[int, list[Piece]], records: list[dict]) -> list[dict]:
    """One entry per input file: its counts, and which unit read which piece."""
    entries: dict[str, dict] = {
        file.path: {"file": file.name, "kind": file.kind, "size": file.size, "documents": 0, "rejected": 0}
        | {"pieces": []}
        for file in files
    }
    for unit, record in enumerate(records):
        for piece, read in zip(units[unit], record["pieces"], strict=True):
            entry = entries[piece.file.path]
            entry["documents"] += read["documents"]
            entry["rejected"] += sum(read["rejected"].values())
            if read["unverified"]:
                entry["unverified"] = read["unverified"]
            place = {name: read[name] for name in ("start", "end", "sha256", "lines")}
            entry["pieces"].append(place | {"unit": unit})
    return list(entries.values())


def damage_entries(records: list[dict]) -> list[dict]:
    """The parts of the input that were left out or salvaged, in order."""
    pieces = (piece for record in records for piece in record["pieces"])
    return [{"file": piece["file"]} | one for piece in pieces for one in piece["damage"]]


def sum_rejected(records: list[dict]) -> dict[str, int]:
    """Rejected records by reason."""
    return sum_counts(piece["rejected"] for record in records for piece in record["pieces"])


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sums by name, sorted by name."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def sum_groups(groups: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """As `sum_counts`, of counts in groups."""
    total: dict[str, Counter[str]] = {}
    for one in groups:
        for name, counts in one.items():
            total.setdefault(name, Counter()).update(counts)
    return {name: dict(total[name]) for name in sorted(total)}


def missing_units(output: Path, manifest: dict) -> set[int]:
    """The units of a finished set with a missing shard or index."""
    return {
        entry["unit"]
        for entry in manifest["shards"]
        for key in SHARD_ENDINGS
        if not (output / entry[key]).is_file()
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path, output: Path) -> dict[str, str]:
    """Write the tokenizer's files through `folder`. Returns their sha256 by name."""
    tokenizer.save(folder / TOKENIZER_FOLDER)
    (output / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    files = {path.name: file_sha256(path) for path in sorted((folder / TOKENIZER_FOLDER).iterdir())}
    for name in files:
        os.replace(folder / TOKENIZER_FOLDER / name, output / TOKENIZER_FOLDER / name)
    return files
