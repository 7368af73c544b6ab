"""`data-prep stage`: verified copies of shard sets on a node's local disk, as `LOCAL/NAME-FINGERPRINT/`.

One process per node copies. An existing copy is verified and used, or replaced if it differs. A copy appears
complete or not at all, and processes that copy the same set at the same time do not conflict.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import file_sha256
from data_prep.shards.layout import MANIFEST
from data_prep.shards.reader import ShardSet

BLOCK = 1 << 22


def stage(folder: str | Path, local: str | Path) -> Path:
    """Copy one shard set. Returns the copy's folder.

    Raises:
        UserError: a file differs from the manifest, or the disk is too small.
    """
    shards = ShardSet.open(folder)
    source, local = Path(folder).resolve(), Path(local)
    target = local / f"{source.name}-{shards.fingerprint[:12]}"
    files = shards.files()
    if target.is_dir():
        if _is_complete(target, files, source):
            return target
        shutil.rmtree(target)
    local.mkdir(parents=True, exist_ok=True)
    needed = sum(entry["size"] for entry in shards.manifest["shards"])
    free = shutil.disk_usage(local).free
    if free < needed:
        raise UserError(f"{local} has {free / 1e9:.3g} GB free, {source} needs {needed / 1e9:.3g}")
    partial = local / f".{target.name}.{os.uname().nodename}-{os.getpid()}.partial"
    try:
        for name, sha256 in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if _copy(source / name, partial / name) != sha256:
                raise UserError(f"{source / name} is not what its manifest says (its sha256 differs)")
        shutil.copyfile(source / MANIFEST, partial / MANIFEST)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():  # another process of this node was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _is_complete(target: Path, files: dict[str, str], source: Path) -> bool:
    try:
        if (target / MANIFEST).read_bytes() != (source / MANIFEST).read_bytes():
            return False
        return all(file_sha256(target / name) == sha256 for name, sha256 in files.items())
    except OSError:
        return False


def _copy(source: Path, target: Path) -> str:
    """Copy a file. Returns the sha256 of the bytes read."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(BLOCK):
            digest.update(block)
            writer.write(block)
    return digest.hexdigest()
