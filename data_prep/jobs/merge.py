"""The end of a run of `data-prep shard`: units' results become the shard set, its manifest last.

Every step may run again after a kill, or in two processes at once: files that have moved are skipped, and
all others are made in a process's own folder and renamed, with the same bytes.
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
from data_prep.jobs.job import Job
from data_prep.jobs.results import RECORD, Incomplete, WorkFolder
from data_prep.shards.layout import (
    COUNTS,
    MANIFEST,
    QUARANTINE,
    SHARD_ENDINGS,
    TOKENIZER_FOLDER,
    fingerprint,
    seal_manifest,
    shard_names,
)
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import Tokenizer


def merge(
    job: Job, work: WorkFolder, tokenizer: Tokenizer, folder: Path, heartbeat: Callable[[], None]
) -> None:
    """Move the shards to their final names; write quarantine, tokenizer and, last, the manifest.

    Raises:
        UserError: there is no document.
        Incomplete: a crash of the machine truncated units, which were discarded.
    """
    output, facts = job.output, job.facts
    records = _complete_records(job, work)
    if not any(record["parts"] for record in records):
        shutil.rmtree(job.work)
        if not any(output.iterdir()):
            output.rmdir()
        reasons = ", ".join(f"{n} × {reason}" for reason, n in _rejected(records).items())
        files = ", ".join(file.name for file in job.files[:5])
        raise UserError(f"no usable document in {files}: {reasons or 'the files are empty'}")
    shards: list[dict] = []
    for unit, record in enumerate(records):
        for number, part in enumerate(record["parts"]):
            names = shard_names(len(shards))
            for key, ending in SHARD_ENDINGS.items():
                _move(work.result("shard", unit) / f"part-{number:03d}{ending}", output / names[key])
            shards.append(names | {"unit": unit} | part)
            heartbeat()
    _write_quarantine(job, work, records, folder, heartbeat)
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


def restore_shards(job: Job, work: WorkFolder, heartbeat: Callable[[], None]) -> None:
    """Move rebuilt shards to the places where they are missing.

    Raises:
        UserError: they differ from the manifest.
        Incomplete: as in `merge`.
    """
    manifest = ShardSet.open(job.output).manifest
    for unit in job.only:
        shards = [entry for entry in manifest["shards"] if entry["unit"] == unit]
        places = {
            f"part-{number:03d}{ending}": job.output / entry[key]
            for number, entry in enumerate(shards)
            for key, ending in SHARD_ENDINGS.items()
        }
        if not work.is_complete("shard", unit, places.get):
            work.discard("shard", unit)
            raise Incomplete
        record = json.loads((work.result("shard", unit) / RECORD).read_bytes())
        if [part["sha256"] for part in record["parts"]] != [entry["sha256"] for entry in shards]:
            raise UserError(
                f"{job.output}: its input gives other shards now; delete the folder and run again"
            )
        for part, place in places.items():
            _move(work.result("shard", unit) / part, place)
        heartbeat()
    shutil.rmtree(job.work, ignore_errors=True)


def _move(made: Path, place: Path) -> None:
    """Rename, unless an interrupted run or another process has done so already."""
    try:
        os.replace(made, place)
    except FileNotFoundError:
        if not place.is_file():
            raise


def _complete_records(job: Job, work: WorkFolder) -> list[dict]:
    """The units' records. Raises `Incomplete` after discarding truncated units.

    Only `verify` finds flipped bits: finding them here would read all shards again.
    """
    broken: list[int] = []
    records: list[dict] = []
    shards = 0
    for unit in range(len(job.units)):
        try:
            record = json.loads((work.result("shard", unit) / RECORD).read_bytes())
        except (OSError, ValueError):
            work.discard("shard", unit)
            raise Incomplete from None
        places = {
            f"part-{number:03d}{ending}": job.output / f"shard-{shards + number:06d}{ending}"
            for number in range(len(record["parts"]))
            for ending in SHARD_ENDINGS.values()
        }
        if not work.is_complete("shard", unit, places.get):
            broken.append(unit)
        records.append(record)
        shards += len(record["parts"])
    for unit in broken:
        work.discard("shard", unit)
    if broken:
        raise Incomplete
    return records


def _write_quarantine(
    job: Job, work: WorkFolder, records: list[dict], folder: Path, heartbeat: Callable[[], None]
) -> None:
    """Concatenate the units' quarantines. Their line numbers count from the start of each piece."""
    before: Counter[str] = Counter()  # lines of a file, by path, in the pieces so far
    with open(folder / QUARANTINE, "wb") as out:
        for unit, record in enumerate(records):
            with open(work.result("shard", unit) / QUARANTINE, "rb") as stream:
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
            heartbeat()
        out.flush()
        os.fsync(out.fileno())
    os.replace(folder / QUARANTINE, job.output / QUARANTINE)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, output: Path) -> dict[str, str]:
    """Write the tokenizer's files through `folder`. Returns their sha256 by name."""
    tokenizer.save(folder / TOKENIZER_FOLDER)
    (output / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    files = {path.name: file_sha256(path) for path in sorted((folder / TOKENIZER_FOLDER).iterdir())}
    for name in files:
        os.replace(folder / TOKENIZER_FOLDER / name, output / TOKENIZER_FOLDER / name)
    return files


def _input_entries(job: Job, records: list[dict]) -> list[dict]:
    """One entry per input file: its counts, and which unit read which piece."""
    entries: dict[str, dict] = {
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
