"""Saving: every rank writes, hashes and flushes its part in a temporary folder; one rename makes it current.

After a kill at any moment, or a full disk on any rank, the checkpoint before is still current and whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from data_prep.common.errors import counted
from data_prep.common.files import file_sha256, flush_to_disk, write_atomically
from pipeline.checkpoints import store
from pipeline.checkpoints.store import Meta
from pipeline.parallel.agreement import AgreedError, agree, do_and_agree
from pipeline.parallel.deepspeed_compat import saving_through

_SAYS = (
    "rank {rank} cannot write its part of a checkpoint: {message}; the checkpoint before it is whole: "
    "make room and start the same command again"
)


def save(
    engine: Any,
    run_dir: str | Path,
    meta: Meta,
    keep: int,
    flush_records: Callable[[], None],
    abandoned: Collection[str] = (),
) -> Path:
    """Write a checkpoint, make it `latest`, and remove all but the last `keep` whole ones and the best one.
    Called by every rank.

    Args:
        meta: `meta.best["step"]` names the best checkpoint.
        flush_records: called by rank 0 to fsync the records of the steps so far: after a machine's crash no
            checkpoint is newer than the records.
        abandoned: names of later checkpoints that the run did not resume from; they do not count (`prune`).
    Raises: AgreedError on every rank when one cannot write; the run can be started again from the checkpoint
        before.
    """
    folder = store.checkpoints_folder(run_dir)
    name = store.step_name(meta.step)
    aside = folder / f"{store.TMP}{name}"
    first = torch.distributed.get_rank() == 0
    writer = _Writer()
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    with saving_through(engine, writer):
        engine.save_checkpoint(str(folder), tag=aside.name, save_latest=False)

    def publish() -> None:
        flush_records()
        meta.files = _files(aside, {path: file for written in everyone for path, file in written.items()})
        store.write_meta(aside, meta)
        flush_to_disk(aside)
        _make_current(folder, aside, name, meta)

    try:
        everyone = agree(writer.error, writer.written, _SAYS)
        do_and_agree(publish if first else lambda: None, _SAYS)
    except AgreedError:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if first:
        best = store.step_name(meta.best["step"]) if meta.best else None
        store.prune(folder, name, best, keep, set(abandoned) - {name})
    return folder / name


class _Writer(TorchCheckpointEngine):
    """Writes DeepSpeed's files; records each one's size and sha256, and the first error.

    An error must not end `save_checkpoint` on one rank alone: the others would wait in its barriers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, list[Any]] = {}
        self.error: OSError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        try:
            with open(path, "wb") as file:
                stream: Any = _Stream(file)
                torch.save(state_dict, stream)
                if stream.error is not None:
                    raise stream.error
                file.flush()
                os.fsync(file.fileno())
            self.written[path] = [stream.size, stream.digest.hexdigest()]
        except OSError as error:
            error.filename = error.filename or path
            self.error = error


class _Stream:
    """A file that hashes what is written to it. After an error it drops the rest: torch.save aborts the
    process when a write fails while it closes its archive."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        length = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
                self.digest.update(data)
                self.size += length
            except OSError as error:
                self.error = error
        return length

    def flush(self) -> None:
        """Does nothing: the file is flushed once, at the end."""


def _files(aside: Path, written: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Name → (size, sha256) of all files in the folder, as they were written.

    Files that DeepSpeed copies itself (NVMe offload) are hashed here. Raises OSError when another rank's file
    is not visible or has another size than was written.
    """
    files = {}
    listed = {path for path in aside.rglob("*") if path.is_file()}
    for path in sorted(listed | {Path(name) for name in written}):
        if not path.exists():
            reason = "was written by another rank and is not there (put --output_dir on a shared disk)"
            raise OSError(None, reason, str(path))
        size, sha256 = written.get(str(path)) or (path.stat().st_size, None)
        if path.stat().st_size != size:
            found = counted(path.stat().st_size, "byte")
            raise OSError(None, f"has {found}, {size:,} were written", str(path))
        if sha256 is None:
            flush_to_disk(path)
            sha256 = file_sha256(path)
        files[path.relative_to(aside).as_posix()] = [size, sha256]
    return files


def _make_current(folder: Path, aside: Path, name: str, meta: Meta) -> None:
    shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier start
    os.rename(aside, folder / name)
    flush_to_disk(folder)
    write_atomically(folder / "latest", f"{name}\n".encode())
    best = store.step_name(meta.best["step"]) if meta.best else None
    if best and (folder / best).is_dir():
        write_atomically(folder / "best", f"{best}\n".encode())
    elif best is None:  # none yet, or not comparable any more: the next evaluation names one
        (folder / "best").unlink(missing_ok=True)
