"""`data-prep split`: one shard set into several, by document hash.

A document's part is a function of the seed and the hash of its text (or id), never of its place: more
documents, another order or another tokenizer move none, and equal texts stay together. Nothing is tokenized
again. Parts are written to `.unfinished/` and moved when all are complete; after a kill the same command
resumes with the finished parts, and an error leaves no partial ones.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.files import file_sha256, json_bytes, write_atomically
from data_prep.shards.layout import (
    COUNTS,
    MANIFEST,
    PLAN,
    QUARANTINE,
    TOKENIZER_FOLDER,
    UNFINISHED,
    fingerprint,
    hash64,
    seal_manifest,
    shard_names,
)
from data_prep.shards.reader import ShardSet
from data_prep.shards.writer import ShardSeries


def parse_parts(given: list[str]) -> dict[str, float]:
    """`["train=0.98", "valid=0.02"]` → names and shares. Raises `UserError` unless the shares add up to 1."""
    parts: dict[str, float] = {}
    for text in given:
        name, _, share = text.partition("=")
        try:
            parts[name] = float(share)
        except ValueError:
            parts[name] = float("nan")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not 0 < parts[name] <= 1:
            raise UserError(f"--parts {text!r}: write NAME=SHARE with a share above 0, such as train=0.98")
    if len(parts) != len(given) or abs(sum(parts.values()) - 1) > 1e-9:
        raise UserError(f"--parts {' '.join(given)}: names must differ and shares add up to 1")
    return parts


def split(
    folder: str | Path, output: str | Path, parts: dict[str, float], by: str = "text", seed: int = 0
) -> dict[str, dict[str, int]]:
    """Write `output/NAME` for every part. Returns name → shards, documents, sentences, tokens and bytes.

    Parts that the same split has written before are kept.

    Raises:
        UserError: `output` holds anything else, or a part would be empty.
    """
    shards, output = ShardSet.open(folder), Path(output)
    if output.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"output {output} lies inside the shard folder {folder}; choose another place")
    settings = {
        name: {"of": shards.fingerprint, "part": name, "parts": parts, "by": by, "seed": seed}
        for name in parts
    }
    work = output / UNFINISHED
    finished = _finished_parts(shards, output, settings)
    try:
        shutil.rmtree(work, ignore_errors=True)
        if missing := [name for name in parts if name not in finished]:
            finished |= _write(shards, work, settings, missing)
        for name in missing:
            os.rename(work / name, output / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
    return {name: finished[name] for name in parts}


def _finished_parts(shards: ShardSet, output: Path, settings: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Counts of the parts that an earlier run of the same split has finished.

    Raises `UserError` when `output` holds anything else.
    """
    finished = {}
    for path in sorted(output.iterdir()) if output.exists() else ():
        if path.name == UNFINISHED:
            if (path / PLAN).exists():
                raise UserError(f"{output} holds an unfinished run of `data-prep shard`; choose another one")
        elif path.name in settings and (path / MANIFEST).is_file():
            part = ShardSet.open(path)  # sealed by its checksum, and written last
            if part.fingerprint != _fingerprint(shards, settings[path.name]):
                raise UserError(f"{path} is a part of another split; choose another --output")
            finished[path.name] = {"shards": len(part), **part.manifest["totals"]}
        else:
            raise UserError(f"output folder {output} is not empty; choose another one")
    return finished


def _write(
    shards: ShardSet, work: Path, settings: dict[str, dict], missing: list[str]
) -> dict[str, dict[str, int]]:
    """Write the missing parts to `work` in one pass. Returns their counts."""
    parts, by, seed = (settings[missing[0]][key] for key in ("parts", "by", "seed"))
    writers = {name: _Part(shards, work / name) for name in missing}
    order = [writers.get(name) for name in parts]
    # A uniform number in [0, 2^64) per document, cut at the cumulative shares.
    sums = np.cumsum(list(parts.values()))[:-1].tolist()
    bounds = np.array([min(int(share * 2**64), 2**64 - 1) for share in sums], dtype=np.uint64)
    for i in range(len(shards)):
        shard = shards.shard(i)
        hashes = shard.index["text_hash" if by == "text" else "key_hash"]
        numbers = np.array([_mix(int(value), seed) for value in hashes], dtype=np.uint64)
        for n, part in enumerate(np.searchsorted(bounds, numbers, side="right").tolist()):
            if order[part] is not None:
                order[part].series.add(shard.document(n))
    result = {name: writer.finish(settings[name]) for name, writer in writers.items()}
    for name, counts in result.items():
        if not counts["documents"]:
            raise UserError(
                f"part {name!r} would be empty: {shards.folder} has too few documents for its share"
            )
    return result


def _fingerprint(shards: ShardSet, settings: dict) -> str:
    # The order of the parts matters as well, and JSON objects do not keep it.
    return fingerprint(shards.fingerprint, settings, list(settings["parts"]))


def _mix(value: int, seed: int) -> int:
    """A different hash for every seed, so that splits with different seeds are independent."""
    size = max(8, seed.bit_length() // 8 + 1)
    return hash64(value.to_bytes(8, "little") + seed.to_bytes(size, "little", signed=True))


class _Part:
    """Writes one part."""

    def __init__(self, shards: ShardSet, folder: Path):
        self.shards, self.folder = shards, folder
        settings = shards.manifest["settings"]
        limits = settings["shard_bytes"], settings["shard_documents"]
        self.series = ShardSeries(folder / "shard-", 6, shards.dtype, shards.compression, *limits)
        folder.mkdir(parents=True)

    def finish(self, settings: dict) -> dict[str, int]:
        """Close the last shard and write the rest of the set. Returns its counts."""
        self.series.close()
        entries = [shard_names(n) | {"unit": n} | entry for n, entry in enumerate(self.series.entries)]
        source = self.shards.manifest
        write_atomically(self.folder / QUARANTINE, b"")
        self.shards.tokenizer().save(self.folder / TOKENIZER_FOLDER)
        files = {p.name: file_sha256(p) for p in sorted((self.folder / TOKENIZER_FOLDER).iterdir())}
        totals = {name: sum(entry[name] for entry in entries) for name in COUNTS}
        facts = {key: source[key] for key in ("format_version", "settings", "settings_fingerprint")}
        manifest = facts | {
            "fingerprint": _fingerprint(self.shards, settings),
            "tokenizer": source["tokenizer"] | {"files": files},
            "split": settings,
            "shards": entries,
            "totals": totals,
            "languages": dict(sorted(self.series.languages.items())),
            "sources": dict(sorted(self.series.sources.items())),
            "rejected": {},
            "repaired": {},
            "damaged": [],
            "marked": dict(self.series.marked),
            "quarantine_sha256": file_sha256(self.folder / QUARANTINE),
            "inputs": [],
            "not_read": [],
        }
        write_atomically(self.folder / MANIFEST, json_bytes(seal_manifest(manifest)))
        return {"shards": len(entries), **totals}
