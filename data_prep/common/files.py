"""Atomic writes (a file is complete or absent, also after a crash), and readers of JSON with clear errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_bytes(value: object) -> bytes:
    """Canonical JSON: sorted keys, indented, ASCII, so that equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode("ascii")


def read_json(
    path: str | Path,
    what: str = "",
    missing: str = "does not exist",
    default: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        what: what the message calls the file; else its path.
        missing: what the message says when there is no such file.
        default: returned when there is no such file, instead of the error.
        options: of `json.loads`.
    Raises: UserError when the file is missing, unreadable or not a JSON object.
    """
    what = what or str(path)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), **options)
    except (FileNotFoundError, NotADirectoryError):
        if default is None:
            raise UserError(f"{what} {missing}") from None
        return default
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what} cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{what} is not a JSON object")
    return found


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line of a JSONL file; the value is None where a line is not JSON.
    The last line is left out if a killed process wrote only half of it. A missing file has no lines."""
    if not path.exists():
        return
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, last], 1):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            if number <= len(lines):
                yield number, None


def write_atomically(path: Path, data: bytes, aside: Path | None = None) -> None:
    """Write a file that is complete or absent, also after a crash or when two processes write the same one.
    After an error (a full disk) nothing is left of it.

    aside: the folder, on the same file system, for the file while it is incomplete; else beside `path`.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = partial_name((aside or path.parent) / path.name)
    try:
        partial.write_bytes(data)
        flush_and_rename(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):  # of a full disk: it knows no path, or that of the part
            error.filename = str(path)
        raise


def keep_umask(folder: Path) -> None:
    """Give the files of a folder the mode of any new file: safetensors writes 0600, which no other user of a
    cluster can read."""
    probe = partial_name(folder / "mode")
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)


def partial_name(path: Path) -> Path:
    """Where this process writes a file that will be `path`."""
    return path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")


def flush_and_rename(partial: Path, path: Path) -> None:
    """Rename a file once its bytes are on the disk."""
    flush_to_disk(partial)
    os.replace(partial, path)


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
