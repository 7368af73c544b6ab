"""Distributes units of work over processes, on any number of machines that share one folder.

Every process runs the same loop: lock the first unit that is neither done nor locked, run it in a staging
folder, publish the result by renaming that folder. When all units are locked it waits, because a holder may
die. Local workers, MPI ranks and Slurm array tasks differ only in how they start. They may be mixed, and
killed at any moment.

A lock is a file that names its holder and is rewritten while the work runs (the heartbeat). It is stale when
the holder's process has ended (same machine), or when it has not changed for `STALE_SECONDS` by the reader's
clock (another machine: no common clock is needed). A stale lock stays in place; the process that creates the
lock with the next number gets the unit. So no process removes a live lock of another, and exactly one takes
over from a dead holder. A holder that was only paused may run its unit together with its successor. So units
must be deterministic and work in their own folder: the second result to be published is dropped.

A result records the sizes of its files. Before a result is used, `WorkFolder.is_complete` finds what a crash
of the machine has truncated; the reader discards it and raises `Incomplete`, and all phases run again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, describe
from data_prep.common.files import flush_to_disk

STALE_SECONDS = 60.0
HEARTBEAT_SECONDS = 0.5  # between two writes of a lock, and between two reads of other locks
POLL_SECONDS = 0.1
RECORD = "record.json"
SIZES = "sizes.json"  # in every result: its files and their sizes

Heartbeat = Callable[[dict], None]


class Incomplete(Exception):
    """A result that was needed was missing or truncated, and has been discarded."""


@dataclass(frozen=True)
class Phase:
    """Units of one kind, in the order in which to start them.

    `run(unit, folder, heartbeat)` writes its result, including `record.json`, to the empty `folder`, and
    regularly calls `heartbeat(counts)` with numbers to display.
    """

    name: str
    units: Sequence[int]
    run: Callable[[int, Path, Heartbeat], None]


class WorkFolder:
    """Locks and results, as files below `folder`; the process that finishes the work removes it.

    Args:
        is_finished: whether all of the work is done.
    """

    def __init__(self, folder: Path, is_finished: Callable[[], bool]):
        self.folder, self.is_finished = folder, is_finished
        self._seen: dict[Path, tuple[bytes, float]] = {}  # other processes' locks: content, when first seen
        self._held: dict[tuple[str, int], int] = {}  # numbers of the locks held here

    def result(self, phase: str, unit: int) -> Path:
        """The folder of a unit's published result."""
        return self.folder / phase / f"{unit:06d}"

    def done(self, phase: str) -> set[int]:
        """The units whose results are published."""
        try:
            return {int(entry.name) for entry in os.scandir(self.folder / phase)}
        except FileNotFoundError:
            return set()

    def locks(self) -> Iterator[tuple[str, int, dict]]:
        """(phase, unit, content) of the locks of units that are, or were, in progress."""
        for (phase, unit), number in sorted(self._newest_locks().items()):
            try:
                yield phase, unit, json.loads(self._lock(phase, unit, number).read_bytes())
            except (OSError, ValueError):
                continue  # released or just being written

    def has_live_lock(self) -> bool:
        """Whether a process holds a lock, or may hold one on another machine."""
        newest = self._newest_locks().items()
        return any(not self._is_stale(self._lock(phase, unit, number)) for (phase, unit), number in newest)

    def is_complete(
        self, phase: str, unit: int, elsewhere: Callable[[str], Path | None] | None = None
    ) -> bool:
        """Whether all files of a result have their full size. `elsewhere(name)`: where one may have moved."""
        folder = self.result(phase, unit)
        try:
            sizes = json.loads((folder / SIZES).read_bytes())
        except (OSError, ValueError):
            return False
        for name, size in sizes.items():
            found = _size(folder / name)
            if found is None and elsewhere is not None and (moved := elsewhere(name)) is not None:
                found = _size(moved)
            if found != size:
                return False
        return True

    def discard(self, phase: str, unit: int) -> None:
        """Remove a result."""
        shutil.rmtree(self.result(phase, unit), ignore_errors=True)

    def acquire(self, phase: str, units: Sequence[int]) -> int | None:
        """Lock the first free unit of `units`; None when there is none."""
        newest = self._newest_locks()
        for unit in units:
            number = newest.get((phase, unit), -1)
            path = self._lock(phase, unit, number + 1)
            try:
                if number >= 0 and not self._is_stale(self._lock(phase, unit, number)):
                    continue
                path.parent.mkdir(exist_ok=True)
                self._create_lock(path)
            except FileExistsError:  # another process was faster
                continue
            except FileNotFoundError:  # another process finished the work and removed the folder
                return None
            self._held[phase, unit] = number + 1
            return unit
        return None

    @contextmanager
    def hold(self, phase: str, unit: int) -> Iterator[tuple[Path, Heartbeat]]:
        """(folder, heartbeat) for a locked unit; the folder's content becomes the result.

        Errors are ignored once another process has finished all of the work.
        """
        number, sent = self._held.pop((phase, unit)), time.monotonic()
        lock = self._lock(phase, unit, number)
        staging = self._staging(phase, unit, _signature())

        def heartbeat(counts: dict) -> None:
            nonlocal sent
            if time.monotonic() - sent >= HEARTBEAT_SECONDS:
                sent = time.monotonic()
                self._write_lock(lock, counts)

        try:
            self._remove_leftovers(phase, unit, number)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging, heartbeat
            if not self.is_finished():
                self._publish(staging, self.result(phase, unit))
        except Exception:
            if not self.is_finished():
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            for gone in range(number + 1):  # the newest last: otherwise an older one would be valid
                self._lock(phase, unit, gone).unlink(missing_ok=True)

    def _remove_leftovers(self, phase: str, unit: int, number: int) -> None:
        """Remove staging folders of earlier holders on this machine, which have ended."""
        for earlier in range(number):
            with suppress(OSError):
                holder = _holder(self._lock(phase, unit, earlier).read_bytes())
                if holder is not None and holder["machine"] == _machine():
                    leftover = self._staging(phase, unit, _signature(holder["pid"], holder["start"]))
                    shutil.rmtree(leftover, ignore_errors=True)

    def _publish(self, staging: Path, target: Path) -> None:
        sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        (staging / SIZES).write_text(json.dumps(sizes), encoding="ascii")
        for path in [*staging.iterdir(), staging]:
            flush_to_disk(path)
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(staging, target)
        except OSError:
            if not target.is_dir():  # another process has published it
                raise
        flush_to_disk(target.parent)

    def _staging(self, phase: str, unit: int, signature: str) -> Path:
        return self.folder / "aside" / f"{phase}-{unit:06d}-{signature}"

    def _lock(self, phase: str, unit: int, number: int) -> Path:
        return self.folder / "claims" / f"{phase}-{unit:06d}-{number}"

    def _newest_locks(self) -> dict[tuple[str, int], int]:
        """The highest lock number of each unit: the only valid lock."""
        newest: dict[tuple[str, int], int] = {}
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder / "claims"):
                phase, unit, number = entry.name.rsplit("-", 2)
                newest[phase, int(unit)] = max(int(number), newest.get((phase, int(unit)), 0))
        return newest

    def _create_lock(self, path: Path) -> None:
        """Create a lock together with its content: the holder of an empty lock could not be checked.

        Raises:
            FileExistsError: the unit has this lock already.
        """
        beside = self.folder / f"claim-{_signature()}"
        beside.write_bytes(_lock_bytes({}))
        try:
            os.link(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _write_lock(self, path: Path, counts: dict) -> None:
        beside = self.folder / f"claim-{_signature()}"
        try:
            beside.write_bytes(_lock_bytes(counts))
            os.replace(beside, path)
        except FileNotFoundError:
            pass  # another process finished the work and removed the folder

    def _is_stale(self, path: Path) -> bool:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False  # released in the meantime
        seen, since = self._seen.get(path, (None, 0.0))
        if seen != content:
            since = time.monotonic()
            self._seen[path] = content, since
        holder = _holder(content)
        if holder is not None and holder["machine"] == _machine():
            return _start_time(holder["pid"]) != holder["start"]
        return time.monotonic() - since > STALE_SECONDS


def run_phases(work: WorkFolder, phases: Sequence[Phase]) -> None:
    """Run units until all of the work is done.

    Raises:
        UserError: another process gave up and removed the folder. Errors of `run` pass through.
    """
    while True:
        try:
            return _run_phases(work, phases)
        except Incomplete:
            continue


def _run_phases(work: WorkFolder, phases: Sequence[Phase]) -> None:
    for phase in phases:
        while not work.is_finished():
            done = work.done(phase.name)
            missing = [unit for unit in phase.units if unit not in done]
            if not missing:
                break
            unit = work.acquire(phase.name, missing)
            if unit is None:
                if not work.folder.is_dir() and not work.is_finished():
                    raise UserError(f"{work.folder} is gone: another process gave up, see its message")
                time.sleep(POLL_SECONDS)
                continue
            with work.hold(phase.name, unit) as (folder, heartbeat):
                # It may have been published before this process got the lock.
                if unit not in work.done(phase.name):
                    phase.run(unit, folder, heartbeat)


def run_in_processes(workers: int, start: Callable[[], None], watch: Callable[[], None]) -> None:
    """Run `start()` in `workers` new processes until all have ended, and call `watch()` here regularly.

    Raises:
        UserError: a process was killed, or `start` raised a `UserError`.
    """
    # A fork starts faster, but it would copy mutexes that other threads hold.
    alone = len(os.listdir("/proc/self/task")) == 1
    context: Any = get_context("fork" if alone else "spawn")
    errors = context.SimpleQueue()
    processes = [context.Process(target=_process, args=(start, errors)) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        while True:
            # Checked first, so that every failure of processes that ended early is seen below.
            working = any(process.is_alive() for process in processes)
            ended = [process for process in processes if process.exitcode not in (None, 0)]
            if ended:
                if not errors.empty():
                    raise UserError(errors.get())
                if ended[0].exitcode < 0:
                    raise UserError(
                        "a worker process was killed (out of memory?); "
                        "rerun the same command to resume, perhaps with fewer --workers"
                    )
                raise RuntimeError("a worker process failed, see its message above")
            if not working:
                return
            watch()
            wait([process.sentinel for process in processes if process.is_alive()], HEARTBEAT_SECONDS)
    finally:
        # Processes are alive here only after an error or Ctrl-C; the next run resumes their units.
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()


def _process(start: Callable[[], None], errors: Any) -> None:
    # Ctrl-C reaches the whole process group; only the parent reports it. End when the parent has ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        start()
    except (UserError, OSError) as error:
        errors.put(describe(error))
        raise SystemExit(2) from None


def _exit_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _lock_bytes(counts: dict) -> bytes:
    holder = {"machine": _machine(), "pid": os.getpid(), "start": _start_time(os.getpid())}
    return json.dumps({"holder": holder, "at": time.monotonic(), **counts}).encode("ascii")


def _holder(lock: bytes) -> dict | None:
    try:
        return json.loads(lock)["holder"]
    except (ValueError, KeyError, TypeError):
        return None


def _signature(pid: int | None = None, start: str | None = None) -> str:
    """A name that is unique to this process across machines."""
    pid = os.getpid() if pid is None else pid
    identity = f"{_machine()} {pid} {_start_time(pid) if start is None else start}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@functools.cache
def _machine() -> str:
    """One boot of one kernel and one PID namespace: containers on one machine count as several machines."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str | None:
    """When the process started, in kernel ticks; None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]
