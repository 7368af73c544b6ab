"""Files that are complete or absent, and the same bytes for the same content.

In: paths and bytes. Out: files that appear by rename, once they are on the disk for good. Called by whoever
writes something that a crash must not leave half done, in `data_prep` and in `pipeline`. Imports nothing but
the standard library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_bytes(value: object) -> bytes:
    """JSON as all our files hold it: sorted keys, indented, ASCII, so that equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode("ascii")


def write_atomically(path: Path, data: bytes, aside: Path | None = None) -> None:
    """Write a file that is complete or absent, also after a crash or when two processes write the same one.
    After an error (a full disk) nothing is left of it.

    aside: the folder, on the same file system, for the file while it is incomplete; else beside `path`.
    """
    partial = partial_name((aside or path.parent) / path.name)
    try:
        partial.write_bytes(data)
        flush_and_rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def partial_name(path: Path) -> Path:
    """Where this process writes a file that will be `path`."""
    return path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")


def flush_and_rename(partial: Path, path: Path) -> None:
    """Give a file its name once it is on the disk."""
    flush_to_disk(partial)
    os.replace(partial, path)


def flush_to_disk(path: Path) -> None:
    """Have a file's bytes, or a folder's list of names, on the disk for good."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
