"""`data-prep stage`: verified copies of shard sets on a node's local disk, as `LOCAL/NAME-FINGERPRINT/`.

One process per node copies. An existing copy is verified and used, or replaced if it differs. A copy appears
complete or not at all, and processes that copy the same set at the same time do not conflict. Sets behind a
URL (s3://bucket/set) are copied like this before anything reads them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from data_prep.common.errors import UserError, first_line
from data_prep.common.files import file_sha256
from data_prep.common.remote import is_url, open_remote, without_login
from data_prep.shards.layout import MANIFEST
from data_prep.shards.reader import ShardSet

BLOCK = 1 << 22
CACHE = "SLLM_SHARD_CACHE"  # environment variable: folder for copies of sets behind URLs


def stage(source: str | Path, local: str | Path, check: bool = True) -> Path:
    """Copy one shard set, from a folder or URL. Returns the copy's folder.

    Args:
        check: read an existing copy's files to compare their sha256, not only their sizes.
    Raises:
        UserError: a file differs from the manifest, or the disk is too small.
    """
    if not is_url(str(source)):
        ShardSet.open(source)  # refuses what is no shard set
        source = Path(source).resolve()
    base, local = str(source).rstrip("/"), Path(local)
    name = base.rsplit("/", 1)[-1]
    local.mkdir(parents=True, exist_ok=True)
    partial = local / f".{name}.{os.uname().nodename}-{os.getpid()}.partial"
    try:
        partial.mkdir()
        _copy(f"{base}/{MANIFEST}", partial / MANIFEST)
        shards = ShardSet.open(partial)
        target = local / f"{name}-{shards.fingerprint[:12]}"
        files = shards.files()
        if target.is_dir():
            if _is_complete(target, shards, check):
                return target
            shutil.rmtree(target)
        needed = sum(entry["size"] for entry in shards.manifest["shards"])
        free = shutil.disk_usage(local).free
        if free < needed:
            raise UserError(
                f"{local} has {free / 1e9:.3g} GB free, {without_login(base)} needs {needed / 1e9:.3g}"
            )
        for file, sha256 in files.items():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            if _copy(f"{base}/{file}", partial / file) != sha256:
                shown = without_login(f"{base}/{file}")
                raise UserError(f"{shown} is not what its manifest says (its sha256 differs)")
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():  # another process of this node was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def local_copy(url: str) -> Path:
    """The copy of a set behind a URL in `$SLLM_SHARD_CACHE` (default: ~/.cache/sentence-llm/shards).

    The first process of a node copies, others wait for it.
    """
    cache = Path(os.environ.get(CACHE) or Path("~/.cache/sentence-llm/shards").expanduser())
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return stage(url, cache, check=False)


def _is_complete(target: Path, source: ShardSet, check: bool) -> bool:
    try:
        if (target / MANIFEST).read_bytes() != (source.folder / MANIFEST).read_bytes():
            return False
        if check:
            return all(file_sha256(target / name) == sha256 for name, sha256 in source.files().items())
        sizes = [
            ((target / entry["file"]).stat().st_size, entry["size"]) for entry in source.manifest["shards"]
        ]
        return all(found == size for found, size in sizes) and all(
            (target / f).is_file() for f in source.files()
        )
    except OSError:
        return False


def _copy(source: str, target: Path) -> str:
    """Copy a file. Returns the sha256 of the bytes read."""
    digest = hashlib.sha256()
    with _open(source) as reader, open(target, "wb") as writer:
        while block := reader.read(BLOCK):
            digest.update(block)
            writer.write(block)
    return digest.hexdigest()


def _open(source: str) -> BinaryIO:
    if not is_url(source):
        return open(source, "rb")
    try:
        return open_remote(source)
    except OSError as error:
        raise UserError(f"cannot read {without_login(source)}: {first_line(error)}") from error
