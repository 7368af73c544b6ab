"""`data-prep stage`: a verified copy of shard sets on a node's own disk.

In: shard folders and a local folder. Out: `LOCAL/NAME-FINGERPRINT/` for each, every file of it compared with
the manifest's sha256 while it was copied. One process a node does it; a copy that is there is read again and
used, one that does not fit is made anew. A copy appears whole or not at all, and processes that copy the same
set at the same time do not disturb each other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import file_sha256
from data_prep.shards.layout import MANIFEST, QUARANTINE, TOKENIZER_FOLDER
from data_prep.shards.reader import ShardSet

BLOCK = 1 << 22


def stage(folder: str | Path, local: str | Path) -> Path:
    """Copy one shard set; returns the copy's folder. UserError names a file whose bytes are not the
    manifest's, or a disk that is too small."""
    shards = ShardSet.open(folder)
    source, local = Path(folder).resolve(), Path(local)
    target = local / f"{source.name}-{shards.fingerprint[:12]}"
    files = _files(shards)
    if target.is_dir():
        if _is_whole(target, files, source):
            return target
        shutil.rmtree(target)
    local.mkdir(parents=True, exist_ok=True)
    needed = sum(entry["size"] for entry in shards.manifest["shards"])
    free = shutil.disk_usage(local).free
    if free < needed:
        raise UserError(f"{local} has {free / 1e9:.3g} GB free, {source} needs {needed / 1e9:.3g}")
    aside = local / f".{target.name}.{os.uname().nodename}-{os.getpid()}.partial"
    try:
        for name, sha256 in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            if _copy(source / name, aside / name) != sha256:
                raise UserError(f"{source / name} is not what its manifest says (its sha256 differs)")
        shutil.copyfile(source / MANIFEST, aside / MANIFEST)
        try:
            os.rename(aside, target)
        except OSError:
            if not target.is_dir():  # else another process of this node was quicker
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _files(shards: ShardSet) -> dict[str, str]:
    """Every file of a set but the manifest, with its sha256."""
    files = {QUARANTINE: shards.manifest["quarantine_sha256"]}
    for name, sha256 in shards.manifest["tokenizer"]["files"].items():
        files[f"{TOKENIZER_FOLDER}/{name}"] = sha256
    for entry in shards.manifest["shards"]:
        files |= {entry["file"]: entry["sha256"], entry["index"]: entry["index_sha256"]}
    return files


def _is_whole(target: Path, files: dict[str, str], source: Path) -> bool:
    try:
        if (target / MANIFEST).read_bytes() != (source / MANIFEST).read_bytes():
            return False
        return all(file_sha256(target / name) == sha256 for name, sha256 in files.items())
    except OSError:
        return False


def _copy(source: Path, target: Path) -> str:
    """Copies a file; the sha256 of what was read."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(BLOCK):
            digest.update(block)
            writer.write(block)
    return digest.hexdigest()
