"""Resident memory of this process (Linux), and a benchmark command run in a separate process.

Memory that one model leaves behind would count for the next, so each is measured in a fresh process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError


def resident() -> int:
    """Bytes resident now, without freed memory that the C library keeps."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # only glibc has it
        pass
    return _field("VmRSS")


def peak() -> int:
    """Peak of resident bytes since `reset_peak`."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Reset `peak` to what is resident now. Raises: UserError if Linux's /proc is missing or not writable."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(f"memory cannot be measured on this system ({error}): use --no-memory") from None


def _field(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024


def in_own_process(kind: str, side: str, arguments: argparse.Namespace, names: Sequence[str]) -> Any:
    """The result of `sllm benchmark KIND --memory-of SIDE`, with the values of these `arguments`, run in its
    own process. Raises: UserError with its last line when it fails."""
    command = ["benchmark", kind, "--memory-of", side]
    for name in names:
        value, flag = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command += [flag] if value else []
        elif value is not None:
            command += [flag, *map(str, value if isinstance(value, list) else [value])]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *command, "--json"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"measuring the memory of {side} ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
