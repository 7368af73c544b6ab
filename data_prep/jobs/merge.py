"""The end of a run of `data-prep shard`: units' results become the shard set, its manifest last.

Every step may run again after a kill, or in two processes at once: files are made in a folder of the process
and renamed, with the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import file_sha256, json_bytes, write_atomically
from data_prep.common.results import RECORD, WorkFolder
from data_prep.jobs.job import Job
from data_prep.shards.layout import (
    COUNTS,
    FORMAT_VERSION,
    MANIFEST,
    MARKED_VERSION,
    QUARANTINE,
    SHARD_ENDINGS,
    fingerprint,
    seal_manifest,
    shard_names,
)
from data_prep.shards.manifest import (
    damage_entries,
    input_entries,
    save_tokenizer,
    sum_counts,
    sum_groups,
    sum_rejected,
)
from data_prep.shards.quarantine import join_quarantines
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import Tokenizer


def merge(
    tokenizer: Tokenizer, job: Job, work: WorkFolder, heartbeat: Callable[[], None], folder: Path
) -> None:
    """Give the shards their final names; write quarantine, tokenizer and, last, the manifest.

    Raises:
        UserError: there is no document, or the run's limits forbid the input.
        Incomplete: a crash of the machine truncated units, which were discarded.
    """
    output, facts = job.output, job.facts
    records = _complete_records(work, job.units)
    inputs, rejected = input_entries(job.files, job.units, records), sum_rejected(records)
    damaged = damage_entries(records)
    job.limits.refuse(damaged, inputs, rejected)
    if not any(record["parts"] for record in records):
        shutil.rmtree(job.work)
        if not any(output.iterdir()):
            output.rmdir()
        reasons = ", ".join(f"{n} × {reason}" for reason, n in rejected.items())
        files = ", ".join(file.name for file in job.files[:5])
        details = "".join(f"; {one['file']}: {one['damage']}" for one in damaged[:5])
        if damaged and not job.settings.salvage:
            details += "; --salvage takes what can be decoded"
        raise UserError(f"no usable document in {files}: {reasons or 'the files are empty'}{details}")
    shards: list[dict] = []
    for unit, record in enumerate(records):
        for number, part in enumerate(record["parts"]):
            shards.append(shard_names(len(shards)) | {"unit": unit} | part)
            _place(job, work, folder, number, shards[-1])
            heartbeat()
    parts = [
        (work.result("shard", unit) / QUARANTINE, job.units[unit], record["pieces"])
        for unit, record in enumerate(records)
    ]
    join_quarantines(parts, folder / QUARANTINE, heartbeat)
    os.replace(folder / QUARANTINE, output / QUARANTINE)
    tokenizer_files = save_tokenizer(tokenizer, folder, output)
    content = [[entry["file"], [piece["sha256"] for piece in entry["pieces"]]] for entry in inputs]
    marked = sum_counts(record["marked"] for record in records)
    manifest = facts | {
        "format_version": MARKED_VERSION if marked else FORMAT_VERSION,
        "fingerprint": fingerprint(facts, content),
        "settings_fingerprint": fingerprint(facts),
        "tokenizer": facts["tokenizer"] | {"files": tokenizer_files},
        "shards": shards,
        "totals": {name: sum(shard[name] for shard in shards) for name in COUNTS},
        "languages": sum_groups(record["languages"] for record in records),
        "sources": sum_groups(record["sources"] for record in records),
        "rejected": rejected,
        "repaired": sum_counts(record["repaired"] for record in records),
        "damaged": damaged,
        "marked": marked,
        "quarantine_sha256": file_sha256(output / QUARANTINE),
        "inputs": inputs,
        "not_read": job.found.not_read,
        "lost": job.found.lost,
        "passed_over": dict(sorted(job.found.passed_over.items())),
    }
    write_atomically(output / MANIFEST, json_bytes(seal_manifest(manifest)), aside=folder)
    shutil.rmtree(job.work, ignore_errors=True)


def restore_shards(job: Job, work: WorkFolder, heartbeat: Callable[[], None], folder: Path) -> None:
    """Put rebuilt shards where they are missing.

    Raises:
        UserError: they differ from the manifest.
        Incomplete: as in `merge`.
    """
    manifest = ShardSet.open(job.output).manifest
    for unit, record in zip(job.only, _complete_records(work, job.only), strict=True):
        shards = [entry for entry in manifest["shards"] if entry["unit"] == unit]
        if [part["sha256"] for part in record["parts"]] != [entry["sha256"] for entry in shards]:
            shutil.rmtree(job.work, ignore_errors=True)  # the set is as it was
            raise UserError(
                f"{job.output}: its input gives other shards now; delete the folder and run again"
            )
        for number, entry in enumerate(shards):
            _place(job, work, folder, number, entry)
        heartbeat()
    shutil.rmtree(job.work, ignore_errors=True)


def _place(job: Job, work: WorkFolder, folder: Path, number: int, entry: dict) -> None:
    """Link a unit's shard to its name in the set: the result stays whole until the set is."""
    for key, ending in SHARD_ENDINGS.items():
        link = folder / entry[key]
        os.link(work.result("shard", entry["unit"]) / f"part-{number:03d}{ending}", link)
        os.replace(link, job.output / entry[key])
        link.unlink(missing_ok=True)  # replacing a link to the same file does nothing


def _complete_records(work: WorkFolder, units: Iterable[int]) -> list[dict]:
    """The units' records. Raises `Incomplete` after discarding truncated units.

    Only `verify` finds flipped bits: finding them here would read all shards again.
    """
    work.require("shard", units)
    return [json.loads((work.result("shard", unit) / RECORD).read_bytes()) for unit in units]
