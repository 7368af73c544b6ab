"""The end of a run of `data-prep shard`: units' results → the shard set, its manifest last.

In: a `Job` whose units are all done. Out: on disk, the shards under their final names, quarantine, tokenizer
and manifest; or, when a finished set is mended, the missing shards in their places. Called by `units.py`.

Every step may be done again after a kill, or by two processes at the same time: what has been moved is passed
over, everything else is made in a folder of one's own and renamed, and it is the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import file_sha256, json_bytes, write_atomically
from data_prep.jobs.executor import RECORD, Board, Incomplete
from data_prep.jobs.job import Job
from data_prep.shards.layout import (
    COUNTS,
    MANIFEST,
    QUARANTINE,
    SHARD_ENDINGS,
    TOKENIZER_FOLDER,
    fingerprint,
    seal_manifest,
)
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import Tokenizer

Beat = Callable[[dict], None]


def merge(job: Job, board: Board, tokenizer: Tokenizer, folder: Path, beat: Beat) -> None:
    """Move the shards to their final names and write quarantine, tokenizer and, last, the manifest.

    Raises `UserError` when there is no document at all, and `Incomplete` after dropping units that a crash of
    the machine cut short.
    """
    output, facts = job.output, job.facts
    records = _whole_records(job, board)
    if not any(record["parts"] for record in records):
        shutil.rmtree(job.work)
        if not any(output.iterdir()):
            output.rmdir()
        said = (
            ", ".join(f"{n} × {reason}" for reason, n in _rejected(records).items()) or "the files are empty"
        )
        raise UserError(f"no usable document in {', '.join(file.name for file in job.files[:5])}: {said}")
    shards = []
    for unit, record in enumerate(records):
        for number, part in enumerate(record["parts"]):
            names = {key: f"shard-{len(shards):06d}{ending}" for key, ending in SHARD_ENDINGS.items()}
            for key, ending in SHARD_ENDINGS.items():
                _move(board.result("shard", unit) / f"part-{number:03d}{ending}", output / names[key])
            shards.append(names | {"unit": unit} | part)
            beat({})
    _write_quarantine(job, board, records, folder, beat)
    tokenizer_files = _save_tokenizer(tokenizer, folder, output)
    inputs = _input_entries(job, records)
    content = [[entry["file"], [piece["sha256"] for piece in entry["pieces"]]] for entry in inputs]
    damaged = [
        {"file": p["file"], "damage": p["damage"]} for r in records for p in r["pieces"] if p["damage"]
    ]
    manifest = facts | {
        "fingerprint": fingerprint(facts, content),
        "settings_fingerprint": fingerprint(facts),
        "tokenizer": facts["tokenizer"] | {"files": tokenizer_files},
        "shards": shards,
        "totals": {name: sum(shard[name] for shard in shards) for name in COUNTS},
        "languages": _sum_groups(record["languages"] for record in records),
        "sources": _sum_groups(record["sources"] for record in records),
        "rejected": _rejected(records),
        "repaired": _sum_counts(record["repaired"] for record in records),
        "damaged": damaged,
        "quarantine_sha256": file_sha256(output / QUARANTINE),
        "inputs": inputs,
        "not_read": job.not_read,
    }
    write_atomically(output / MANIFEST, json_bytes(seal_manifest(manifest)), aside=folder)
    shutil.rmtree(job.work, ignore_errors=True)


def put_back(job: Job, board: Board, beat: Beat) -> None:
    """Move shards that were made again to where they are missing.

    Raises `UserError` when they differ from what the manifest says, `Incomplete` like `merge`.
    """
    manifest = ShardSet.open(job.output).manifest
    for unit in job.only:
        shards = [entry for entry in manifest["shards"] if entry["unit"] == unit]
        places = {
            f"part-{number:03d}{ending}": job.output / entry[key]
            for number, entry in enumerate(shards)
            for key, ending in SHARD_ENDINGS.items()
        }
        if not board.whole("shard", unit, places.get):
            board.drop("shard", unit)
            raise Incomplete
        record = json.loads((board.result("shard", unit) / RECORD).read_bytes())
        if [part["sha256"] for part in record["parts"]] != [entry["sha256"] for entry in shards]:
            raise UserError(
                f"{job.output}: its input gives other shards now; delete the folder and run again"
            )
        for part, place in places.items():
            _move(board.result("shard", unit) / part, place)
        beat({})
    shutil.rmtree(job.work, ignore_errors=True)


def _move(made: Path, place: Path) -> None:
    """Rename, unless an interrupted run, or another process this very moment, has done so already."""
    try:
        os.replace(made, place)
    except FileNotFoundError:
        if not place.is_file():
            raise


def _whole_records(job: Job, board: Board) -> list[dict]:
    """The units' records. Raises `Incomplete` after dropping units that a crash of the machine cut short.

    Bits that flipped without a change of size are `verify`'s business: looking for them here would read all
    shards again.
    """
    broken, records, shards = [], [], 0
    for unit in range(len(job.units)):
        try:
            record = json.loads((board.result("shard", unit) / RECORD).read_bytes())
        except (OSError, ValueError):
            board.drop("shard", unit)
            raise Incomplete from None
        places = {
            f"part-{number:03d}{ending}": job.output / f"shard-{shards + number:06d}{ending}"
            for number in range(len(record["parts"]))
            for ending in SHARD_ENDINGS.values()
        }
        if not board.whole("shard", unit, places.get):
            broken.append(unit)
        records.append(record)
        shards += len(record["parts"])
    for unit in broken:
        board.drop("shard", unit)
    if broken:
        raise Incomplete
    return records


def _write_quarantine(job: Job, board: Board, records: list[dict], folder: Path, beat: Beat) -> None:
    """One file out of all. Lines of a file read in pieces were counted within each piece until now."""
    before: Counter[str] = Counter()  # lines of a file, by path, in the pieces so far
    with open(folder / QUARANTINE, "wb") as out:
        for unit, record in enumerate(records):
            with open(board.result("shard", unit) / QUARANTINE, "rb") as stream:
                for piece, read in zip(job.units[unit], record["pieces"], strict=True):
                    end = stream.tell() + read["quarantine_bytes"]
                    while stream.tell() < end:
                        line = stream.readline()
                        if before[piece.file.path]:
                            entry = json.loads(line)
                            entry["line"] += before[piece.file.path]
                            line = json.dumps(entry).encode("ascii") + b"\n"
                        out.write(line)
                    if piece.file.kind == "jsonl":
                        before[piece.file.path] += read["lines"]
            beat({})
        out.flush()
        os.fsync(out.fileno())
    os.replace(folder / QUARANTINE, job.output / QUARANTINE)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, output: Path) -> dict[str, str]:
    """Write the tokenizer's files by way of `folder`; their sha256 by name."""
    tokenizer.save(folder / TOKENIZER_FOLDER)
    (output / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    files = {path.name: file_sha256(path) for path in sorted((folder / TOKENIZER_FOLDER).iterdir())}
    for name in files:
        os.replace(folder / TOKENIZER_FOLDER / name, output / TOKENIZER_FOLDER / name)
    return files


def _input_entries(job: Job, records: list[dict]) -> list[dict]:
    """One entry per input file: what it gave, and which unit read which piece of it."""
    entries = {
        file.path: {"file": file.name, "kind": file.kind, "size": file.size, "documents": 0, "rejected": 0}
        | {"pieces": []}
        for file in job.files
    }
    for unit, record in enumerate(records):
        for piece, read in zip(job.units[unit], record["pieces"], strict=True):
            entry = entries[piece.file.path]
            entry["documents"] += read["documents"]
            entry["rejected"] += sum(read["rejected"].values())
            place = {name: read[name] for name in ("start", "end", "sha256", "lines")}
            entry["pieces"].append(place | {"unit": unit})
    return list(entries.values())


def _rejected(records: list[dict]) -> dict[str, int]:
    return _sum_counts(piece["rejected"] for record in records for piece in record["pieces"])


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def _sum_groups(groups: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = {}
    for one in groups:
        for name, counts in one.items():
            total.setdefault(name, Counter()).update(counts)
    return {name: dict(total[name]) for name in sorted(total)}
