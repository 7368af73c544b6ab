"""Saving: every rank writes its part aside, hashed and flushed on the way; then one rename makes it current.

In: a DeepSpeed engine and a `Meta`. Out: a folder `step-…` under `RUN/checkpoints/`, and `latest` and `best`.
A kill at any moment, or a full disk on any rank, leaves the checkpoint before this one current and whole.
Called by every rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from data_prep.common.files import file_sha256, flush_to_disk, write_atomically
from pipeline.checkpoints import store
from pipeline.checkpoints.store import Meta
from pipeline.parallel.agreement import AgreedError, agree


def save(
    engine: Any,
    run_dir: str | Path,
    meta: Meta,
    keep: int,
    flush_records: Callable[[], None],
    abandoned: Collection[str] = (),
) -> Path:
    """Write a checkpoint, make it `latest`, and remove all but the last `keep` whole ones (and the best one).

    `meta.best["step"]` names the best, `abandoned` those that the run did not go on from though they were
    later: they do not count (`checkpoints.prune`). flush_records has the records of the steps up to here on
    the disk for good, so that no checkpoint outlives them when a machine dies; rank 0 calls it. Raises
    AgreedError on every rank alike when a rank cannot write: the run may be started again from the checkpoint
    before.
    """
    folder = store.checkpoints_folder(run_dir)
    name = store.step_name(meta.step)
    aside = folder / f"{store.TMP}{name}"
    first = torch.distributed.get_rank() == 0
    writer = _Writer()
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    with _written_by(engine, writer):
        engine.save_checkpoint(str(folder), tag=aside.name, save_latest=False)

    reports = _agree(writer.error, writer.written, lambda: _give_up(aside, first))
    error = None
    if first:
        try:
            flush_records()
            meta.files = _files(aside, {k: v for written in reports for k, v in written.items()})
            store.write_meta(aside, meta)
            flush_to_disk(aside)
            _make_current(folder, aside, name, meta)
        except OSError as failure:
            error = failure
    _agree(error, None, lambda: _give_up(aside, first))
    if first:
        best = store.step_name(meta.best["step"]) if meta.best else None
        store.prune(folder, name, best, keep, set(abandoned) - {name})
    return folder / name


class _Writer(TorchCheckpointEngine):
    """Writes what DeepSpeed hands over; remembers each file's size and sha256, and the first error.

    An error must not leave `save_checkpoint` on one rank alone: the others would wait in its barriers.
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
                stream = _Stream(file)
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
    """A file that hashes what is written to it. After an error it swallows the rest: torch.save aborts the
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
        """Nothing: flushed once, at the end."""


@contextlib.contextmanager
def _written_by(engine: Any, writer: _Writer) -> Any:
    """Have DeepSpeed write through `writer`, and leave out its recovery script (`sllm export` is ours)."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda _: None
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


def _agree(error: OSError | None, report: Any, give_up: Callable[[], None]) -> list[Any]:
    """Every rank's report, by rank; AgreedError on all of them when one has an error."""
    says = (
        "rank {rank} cannot write its part of a checkpoint: {message}; the checkpoint before it is whole: "
        "make room and start the same command again"
    )
    try:
        return agree(error, report, says)
    except AgreedError:
        give_up()
        raise


def _give_up(aside: Path, first: bool) -> None:
    if first:
        shutil.rmtree(aside, ignore_errors=True)


def _files(aside: Path, written: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Name → (size, sha256) of all files in the folder, as their writers meant them to be.

    Files that DeepSpeed copies by itself (NVMe offload) are hashed here. Raises OSError when one that another
    rank has written is not to be seen, or has not the size that was written.
    """
    files = {}
    listed = {path for path in aside.rglob("*") if path.is_file()}
    for path in sorted(listed | {Path(name) for name in written}):
        if not path.exists():
            reason = "was written by another rank and is not there (put --output_dir on a shared disk)"
            raise OSError(None, reason, str(path))
        size, sha256 = written.get(str(path)) or (path.stat().st_size, None)
        if path.stat().st_size != size:
            raise OSError(None, f"has {path.stat().st_size} bytes, {size} were written", str(path))
        if sha256 is None:
            flush_to_disk(path)
            sha256 = file_sha256(path)
        files[path.relative_to(aside).as_posix()] = [size, sha256]
    return files


def _make_current(folder: Path, aside: Path, name: str, meta: Meta) -> None:
    shutil.rmtree(folder / name, ignore_errors=True)  # left by a run that was continued from further back
    os.rename(aside, folder / name)
    flush_to_disk(folder)
    write_atomically(folder / "latest", f"{name}\n".encode())
    best = store.step_name(meta.best["step"]) if meta.best else None
    if best and (folder / best).is_dir():
        write_atomically(folder / "best", f"{best}\n".encode())
    elif best is None:  # none yet, or no longer comparable: the next evaluation names one
        (folder / "best").unlink(missing_ok=True)
