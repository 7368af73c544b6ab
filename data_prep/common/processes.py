"""Commands as subprocesses, a failed one is reported by its last line; the memory of this process."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 2 << 20  # bytes


def run_command(command: Sequence[str], what: str, **options: Any) -> str:
    """The standard output of a command. Raises: UserError when it fails (`require_success`)."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    require_success(done.returncode, done.stderr, what)
    return done.stdout


def require_success(status: int, printed: str, what: str) -> None:
    """UserError with the last line that a command printed, unless its exit status is 0."""
    if status:
        raise UserError(f"{what} ended with status {status}: {last_line(printed)}")


def last_line(printed: str) -> str:
    return (printed.strip() or "no message").splitlines()[-1].strip()


def start_logged(
    command: Sequence[str], log: Path, capture: bool = False, **options: Any
) -> subprocess.Popen[str]:
    """Start a command in a separate session (Ctrl-C does not reach it); the command line and its output are
    appended to a log. capture: its standard output is a pipe instead."""
    with open(log, "a", encoding="utf-8") as file:
        print("$", shlex.join(command), file=file, flush=True)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else file,
            stderr=file,
            text=True,
            start_new_session=True,
            **options,
        )


def return_large_blocks() -> None:
    """Let glibc return large blocks to the system when they are freed; this process and its children.

    It would keep more and more of them, up to 32 MB each, once one was freed.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, LARGE)
        # As glibc sets it itself. Else it stays at 128 kB, and small blocks come and go by system calls.
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE)
