"""Saving: every rank copies its state, and a thread writes, hashes and flushes the copy in a temporary folder
while training continues; one rename makes it current.

After a kill at any moment, or a full disk on any rank, the checkpoint before is still current and whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from data_prep.common.errors import UserError, counted, first_line
from data_prep.common.files import file_sha256, flush_to_disk, write_atomically
from pipeline.checkpoints import store
from pipeline.checkpoints.store import Meta
from pipeline.parallel.agreement import AgreedError, agree
from pipeline.parallel.deepspeed_compat import saving_through

_SAYS = (
    "rank {rank} cannot write its part of a checkpoint: {message}; the checkpoint before it is whole: "
    "make room and start the same command again"
)


class Task(threading.Thread):
    """Work beside the training, in a daemon thread: its result or its error once `is_alive` is false."""

    def __init__(self, work: Callable[[], Any]):
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self.error: UserError | OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except (UserError, OSError) as error:
            self.error = error
        except Exception as error:  # of torch: no rank may end alone
            self.error = UserError(first_line(error))


class Saver:
    """Writes a run's checkpoints, at most one at a time. Every rank has one and calls the same methods.

    `busy` tells whether this rank's thread has work. Once no rank's has, every rank calls `proceed`: the
    threads take part in no collective. In the background or not, the same bytes are written.

    Args:
        keep: how many checkpoints stay, beside the best one.
        background: copy the state and let training continue; else a save ends with the write.
        on_gpu: the state is copied to the host in any case.
        published: called by every rank with the step, the seconds for which training waited, and the seconds
            until the checkpoint was current.
        held: names of checkpoints that stay for now, because they are being uploaded.
    """

    def __init__(
        self,
        run_dir: str | Path,
        keep: int,
        background: bool,
        on_gpu: bool,
        published: Callable[[int, float, float], None],
        held: Callable[[], Collection[str]] = tuple,
    ):
        self._folder, self._keep, self._background = store.checkpoints_folder(run_dir), keep, background
        self._published, self._held, self._on_gpu = published, held, on_gpu
        self._first = torch.distributed.get_rank() == 0
        self._stager = _Stager(pin_memory=on_gpu) if background or on_gpu else None
        self._stages: Iterator[Task] = iter(())
        self._task: Task | None = None
        self._step, self._began, self._stall = 0, 0.0, 0.0

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._task is not None

    @property
    def busy(self) -> bool:
        return self._task is not None and self._task.is_alive()

    def save(
        self,
        engine: Any,
        meta: Meta,
        flush_records: Callable[[], None],
        abandoned: Collection[str] = (),
    ) -> None:
        """Start a checkpoint, which becomes `latest`; then all but the last `keep` whole ones and the best
        one are removed. Waits for the one before. A collective.

        Args:
            meta: `meta.best["step"]` names the best checkpoint.
            flush_records: called by rank 0 to fsync the records of the steps so far: after a machine's crash
                no checkpoint is newer than the records.
            abandoned: names of later checkpoints that the run did not resume from; they do not count
                (`prune`).
        Raises: AgreedError on every rank when one cannot write, here or later; the run can be started again
            from the checkpoint before.
        """
        self.finish()
        self._step, self._began, self._stall = meta.step, time.perf_counter(), 0.0
        self._stages = self._write(engine, meta, flush_records, set(abandoned))
        self.proceed()
        if not self._background:
            self.finish()

    def proceed(self) -> None:
        """Start the next stage, when every rank has finished the last one. A collective."""
        began = time.perf_counter()
        try:
            self._task = next(self._stages, None)
        except AgreedError:
            self._task = None
            raise
        self._stall += time.perf_counter() - began
        if self._task is None:
            self._published(self._step, self._stall, time.perf_counter() - self._began)

    def finish(self) -> None:
        """Wait until the checkpoint in flight is current. A collective."""
        while self._task is not None:
            began = time.perf_counter()
            self._task.join()
            self._stall += time.perf_counter() - began
            self.proceed()

    def _write(
        self, engine: Any, meta: Meta, flush_records: Callable[[], None], abandoned: set[str]
    ) -> Iterator[Task]:
        """What all ranks do together; between two stages each has a task of its own."""
        name = store.step_name(meta.step)
        aside = self._folder / f"{store.TMP}{name}"
        writer = _Writer(self._stager)
        if self._first:
            shutil.rmtree(aside, ignore_errors=True)
        with saving_through(engine, writer):
            engine.save_checkpoint(str(self._folder), tag=aside.name, save_latest=False)
        if self._on_gpu:
            torch.cuda.synchronize()  # the copies are there
        if self._first:
            writer.attempt(flush_records)

        def publish() -> None:
            meta.files = _files(aside, {path: file for written in everyone for path, file in written.items()})
            store.write_meta(aside, meta)
            flush_to_disk(aside)
            _make_current(self._folder, aside, name, meta)
            best = store.step_name(meta.best["step"]) if meta.best else None
            store.prune(self._folder, name, best, self._keep, abandoned - {name}, self._held())

        try:
            yield (task := Task(writer.write))
            everyone = agree(task.error, writer.written, _SAYS)
            yield (task := Task(publish if self._first else lambda: None))
            agree(task.error, says=_SAYS)
        except AgreedError:
            if self._first:
                shutil.rmtree(aside, ignore_errors=True)
            raise


class _Stager(StateDictStager):
    """torch's copier of states into host memory. It keeps its buffers, pinned for GPUs, from save to save."""

    def _offload_tensor(self, x: Any, memo: Any, non_blocking: bool = False) -> Any:
        copied = super()._offload_tensor(x, memo, non_blocking)
        return copied.requires_grad_() if x.requires_grad else copied


class _Writer(TorchCheckpointEngine):
    """Takes DeepSpeed's files and writes them; records each one's size and sha256, and the first error.

    An error must not end `save_checkpoint` on one rank alone: the others would wait in its barriers.

    stager: copies the state, so that it can be written after training has changed it; None: `save` writes.
    """

    def __init__(self, stager: _Stager | None) -> None:
        super().__init__()
        self._stager = stager
        self._copies: list[tuple[Any, str]] = []
        self.written: dict[str, list[Any]] = {}
        self.error: UserError | OSError | None = None

    def attempt(self, work: Callable[..., Any], *arguments: Any) -> None:
        try:
            work(*arguments)
        except (UserError, OSError) as error:
            self.error = self.error or error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        if self._stager is None:
            self.attempt(self._write_file, state_dict, path)
        else:
            self._copies.append((self._stager.stage(state_dict, non_blocking=True), path))

    def write(self) -> None:
        """Write what `save` has copied. Raises the first error of all."""
        for state_dict, path in self._copies:
            if self.error is None:
                self.attempt(self._write_file, state_dict, path)
        self._copies.clear()
        if self.error is not None:
            raise self.error

    def _write_file(self, state_dict: Any, path: str) -> None:
        try:
            with open(path, "wb") as file:
                stream: Any = _Stream(file)
                torch.save(state_dict, stream)
                if stream.error is not None:
                    raise stream.error
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or path
            raise
        self.written[path] = [stream.size, stream.digest.hexdigest()]


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
