"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.errors import UserError, log

LOCK = "run.lock"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if need be (rank 0 only).

    The kernel holds the lock, or the server of a network disk. A process that dies in any way releases it, so
    a file that it leaves is no obstacle. NFS 4 releases the locks of a crashed machine after its lease, about
    90 s. Where a disk has no locks, a warning is printed and the run starts.

    Raises: UserError with the process and machine that hold the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    try:
        handle = _open_locked(path, run_dir)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log(f"{run_dir} cannot be locked ({error.strerror}): start no second run there")
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a full disk: the run's first file reports it
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):  # a run that was refused leaves no folder
            run_dir.rmdir()


def _open_locked(path: Path, run_dir: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 500, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(
                f"{run_dir} is in use by {holder}: wait for its end, or choose another --output_dir"
            ) from None
        with contextlib.suppress(FileNotFoundError):  # its holder removed it in between
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)
