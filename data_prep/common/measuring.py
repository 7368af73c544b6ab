"""What measurements share: turns, medians, memory of a process, a new process."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_prep.common.errors import UserError

T = TypeVar("T")


def alternate(runs: int, sides: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """The results of each side. Sides take turns (A B A B …), so that a slow moment of the machine affects
    all."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, measure in sides.items():
            found[name].append(measure())
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median of the values, and the values."""
    return {"median": statistics.median(values), "values": list(values)}


def memory_field(name: str, pid: int | str = "self") -> int:
    """Bytes of a field of /proc/PID/status, such as VmRSS. Raises: OSError for a process that has ended."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a module's function, computed in a new process, which holds no memory of this one."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise UserError("the measured process was killed (out of memory?)") from None
