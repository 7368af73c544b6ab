"""Resident memory of this process (Linux), and a benchmark command run in a separate process.

Memory that one model leaves behind would count for the next, so each is measured in a fresh process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.common.processes import last_line, run_command
from pipeline.costs.options import Benchmark


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


def in_own_process(kind: str, side: Any, options: Benchmark) -> Any:
    """The result of `sllm benchmark KIND --memory-of SIDE` with these options, run in a separate process.
    Raises: UserError with its last line when it fails."""
    command = ["benchmark", kind]
    for name, value in asdict(replace(options, memory_of=side, output=None, no_memory=False)).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command += [flag] if value else []
        elif value is not None:
            command += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    command = [sys.executable, "-m", "pipeline.cli", *command, "--json"]
    return json.loads(last_line(run_command(command, f"measuring the memory of {side}")))
