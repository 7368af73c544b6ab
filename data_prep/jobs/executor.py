"""Who runs which unit of work: any number of processes, on any number of machines that share one folder.

In: a `Board` (a folder) and `Phase`s, each a list of units and a function that runs one. Out: every unit done
exactly once as far as its result goes. Called by `sharding.py`; knows nothing of documents.

Every process, whoever started it, runs the same loop: take the first unit that is neither done nor claimed,
run it in a folder of its own, publish the result by renaming that folder, and so on. When all is claimed it
waits, since a holder may die; a phase is over, for everybody, when all its units are published. So local
worker processes, MPI ranks and the tasks of a Slurm array differ only in how they come to be; all may be
killed at any moment, and may even be mixed.

A claim is a file that names its holder and is rewritten while the work goes on. It is void when the holder's
process is gone (same machine), or when it has not changed for `STALE_SECONDS` by the watcher's own clock
(another machine: no common clock is needed). A void claim is left where it is; whoever creates the claim with
the next number has the unit. So no live claim is ever moved or removed by another, and of many who find a
dead holder one succeeds. A holder that was only paused may share its unit with its successor. Whatever runs
as a unit must stand that: it works in its own folder and makes the same bytes, the second to publish finds
the place taken, and who is late when all is finished goes home quietly.

A result carries the sizes of its files. What a crash of the machine has cut short is found out before it is
used: whoever reads a result asks `Board.whole`, drops what is not, and raises `Incomplete`; everybody then
goes through the phases again.
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
from pathlib import Path

from data_prep.common.errors import UserError, describe
from data_prep.common.files import flush_to_disk

STALE_SECONDS = 60.0
BEAT_SECONDS = 0.5  # between two rewritings of a claim, and between two looks at the others' claims
POLL_SECONDS = 0.1
RECORD = "record.json"
SIZES = "sizes.json"  # beside every result: its files and their sizes


class Incomplete(Exception):
    """A result that was needed is missing or was cut short, and has been dropped: make it again."""


@dataclass(frozen=True)
class Phase:
    """`run(unit, folder, beat)` leaves its result, `record.json` among it, in the empty `folder`, and now and
    then calls `beat(counts)` with numbers to show. `units`: in the order in which they are best begun."""

    name: str
    units: Sequence[int]
    run: Callable[[int, Path, Callable[[dict], None]], None]


class Board:
    """The state of the work, as files below `folder`, which whoever finishes it removes.

    is_finished: whether all of it is done.
    """

    def __init__(self, folder: Path, is_finished: Callable[[], bool]):
        self.folder, self.is_finished = folder, is_finished
        self._seen: dict[Path, tuple[bytes, float]] = {}  # claims of others: content, when first seen
        self._taken: dict[tuple[str, int], int] = {}  # numbers of claims taken here

    def result(self, phase: str, unit: int) -> Path:
        """Where the published result of a unit lies."""
        return self.folder / phase / f"{unit:06d}"

    def done(self, phase: str) -> set[int]:
        """The units whose results are published."""
        try:
            return {int(entry.name) for entry in os.scandir(self.folder / phase)}
        except FileNotFoundError:
            return set()

    def claims(self) -> Iterator[tuple[str, int, dict]]:
        """(phase, unit, claim) of the units somebody is, or was, at work on."""
        for (phase, unit), number in sorted(self._newest().items()):
            try:
                yield phase, unit, json.loads(self._claim(phase, unit, number).read_bytes())
            except (OSError, ValueError):
                continue  # released or just being written

    def is_busy(self) -> bool:
        """Whether somebody is at work, or may be: on another machine only time can tell."""
        newest = self._newest().items()
        return any(not self._is_void(self._claim(phase, unit, number)) for (phase, unit), number in newest)

    def whole(self, phase: str, unit: int, elsewhere: Callable[[str], Path | None] | None = None) -> bool:
        """Whether all files of a result are there in full size; `elsewhere(name)`: where one may be now."""
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

    def drop(self, phase: str, unit: int) -> None:
        """Forget a result."""
        shutil.rmtree(self.result(phase, unit), ignore_errors=True)

    def take(self, phase: str, units: Sequence[int]) -> int | None:
        """Claim the first of `units` that is free; None when there is none."""
        newest = self._newest()
        for unit in units:
            number = newest.get((phase, unit), -1)
            path = self._claim(phase, unit, number + 1)
            try:
                if number >= 0 and not self._is_void(self._claim(phase, unit, number)):
                    continue
                path.parent.mkdir(exist_ok=True)
                self._create_claim(path)
            except FileExistsError:  # somebody was quicker
                continue
            except FileNotFoundError:  # somebody has finished everything and tidied up
                return None
            self._taken[phase, unit] = number + 1
            return unit
        return None

    @contextmanager
    def work(self, phase: str, unit: int) -> Iterator[tuple[Path, Callable[[dict], None]]]:
        """(folder, beat) for a unit that was taken; what is in the folder afterwards becomes its result.

        Errors count for nothing once all is finished, by somebody else then.
        """
        number, told = self._taken.pop((phase, unit)), time.monotonic()
        claim = self._claim(phase, unit, number)
        aside = self._aside(phase, unit, _signature())

        def beat(counts: dict) -> None:
            nonlocal told
            if time.monotonic() - told >= BEAT_SECONDS:
                told = time.monotonic()
                self._write_claim(claim, counts)

        try:
            self._tidy_after_the_dead(phase, unit, number)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside, beat
            if not self.is_finished():
                self._publish(aside, self.result(phase, unit))
        except Exception:
            if not self.is_finished():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            for gone in range(number + 1):  # the newest last: without it, an older one would count
                self._claim(phase, unit, gone).unlink(missing_ok=True)

    def _tidy_after_the_dead(self, phase: str, unit: int, number: int) -> None:
        """Remove what earlier holders of this machine, certainly dead, have left aside."""
        for earlier in range(number):
            with suppress(OSError):
                holder = _holder(self._claim(phase, unit, earlier).read_bytes())
                if holder is not None and holder["machine"] == _machine():
                    leftover = self._aside(phase, unit, _signature(holder["pid"], holder["start"]))
                    shutil.rmtree(leftover, ignore_errors=True)

    def _publish(self, aside: Path, target: Path) -> None:
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        (aside / SIZES).write_text(json.dumps(sizes), encoding="ascii")
        for path in [*aside.iterdir(), aside]:
            flush_to_disk(path)
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(aside, target)
        except OSError:
            if not target.is_dir():  # else another one was here first
                raise
        flush_to_disk(target.parent)

    def _aside(self, phase: str, unit: int, signature: str) -> Path:
        return self.folder / "aside" / f"{phase}-{unit:06d}-{signature}"

    def _claim(self, phase: str, unit: int, number: int) -> Path:
        return self.folder / "claims" / f"{phase}-{unit:06d}-{number}"

    def _newest(self) -> dict[tuple[str, int], int]:
        """Of each unit that has claims, the number of the last one: the only one that counts."""
        newest: dict[tuple[str, int], int] = {}
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder / "claims"):
                phase, unit, number = entry.name.rsplit("-", 2)
                newest[phase, int(unit)] = max(int(number), newest.get((phase, int(unit)), 0))
        return newest

    def _create_claim(self, path: Path) -> None:
        """Make a claim that is not there yet, with its holder in it from the first moment: of one without a
        name nobody could say that its holder is dead. Raises FileExistsError when there is one."""
        beside = self.folder / f"claim-{_signature()}"
        beside.write_bytes(_claim_bytes({}))
        try:
            os.link(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _write_claim(self, path: Path, counts: dict) -> None:
        beside = self.folder / f"claim-{_signature()}"
        try:
            beside.write_bytes(_claim_bytes(counts))
            os.replace(beside, path)
        except FileNotFoundError:
            pass  # somebody has finished everything and tidied up

    def _is_void(self, path: Path) -> bool:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False  # there is none, or it was released this very moment
        seen, since = self._seen.get(path, (None, 0.0))
        if seen != content:
            since = time.monotonic()
            self._seen[path] = content, since
        holder = _holder(content)
        if holder is not None and holder["machine"] == _machine():
            return _start_time(holder["pid"]) != holder["start"]
        return time.monotonic() - since > STALE_SECONDS


def run_phases(board: Board, phases: Sequence[Phase]) -> None:
    """Take part in the work until all of it is done, by whomever.

    Raises what `run` raises, and `UserError` when somebody else has given up and removed the folder.
    """
    while True:
        try:
            return _run_phases(board, phases)
        except Incomplete:
            continue


def _run_phases(board: Board, phases: Sequence[Phase]) -> None:
    for phase in phases:
        while not board.is_finished():
            done = board.done(phase.name)
            missing = [unit for unit in phase.units if unit not in done]
            if not missing:
                break
            unit = board.take(phase.name, missing)
            if unit is None:
                if not board.folder.is_dir() and not board.is_finished():
                    raise UserError(f"{board.folder} is gone: another process gave up, see its message")
                time.sleep(POLL_SECONDS)
                continue
            with board.work(phase.name, unit) as (folder, beat):
                # It may have been published between the look and the claim.
                if unit not in board.done(phase.name):
                    phase.run(unit, folder, beat)


def run_in_processes(workers: int, start: Callable[[], None], watch: Callable[[], None]) -> None:
    """Run `start()` in `workers` new processes until all have ended; `watch()` is called now and then here.

    Raises `UserError` when a process was killed, and what `start` raised when it raised a `UserError`.
    """
    # A fork has all that is loaded here at once; but it would also copy locks that other threads hold.
    alone = len(os.listdir("/proc/self/task")) == 1
    context = get_context("fork" if alone else "spawn")
    errors = context.SimpleQueue()
    processes = [context.Process(target=_process, args=(start, errors)) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        while True:
            # Asked first: of processes that have all ended, however soon, every failure is seen below.
            working = any(process.is_alive() for process in processes)
            ended = [process for process in processes if process.exitcode not in (None, 0)]
            if ended:
                if not errors.empty():
                    raise UserError(errors.get())
                if ended[0].exitcode < 0:
                    raise UserError(
                        "a worker process was killed (out of memory?); "
                        "run the same command again to go on, perhaps with fewer --workers"
                    )
                raise RuntimeError("a worker process failed, see its message above")
            if not working:
                return
            watch()
            _wait_for_any(processes)
    finally:
        # Some are still at work only after an error or Ctrl-C; the next run goes on where they were.
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()


def _wait_for_any(processes: Sequence) -> None:
    from multiprocessing.connection import wait

    wait([process.sentinel for process in processes if process.is_alive()], timeout=BEAT_SECONDS)


def _process(start: Callable[[], None], errors: object) -> None:
    # Ctrl-C reaches the whole process group; the parent alone speaks. When it is gone, nobody waits for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        start()
    except (UserError, OSError) as error:
        errors.put(describe(error))
        raise SystemExit(2) from None


def _claim_bytes(counts: dict) -> bytes:
    holder = {"machine": _machine(), "pid": os.getpid(), "start": _start_time(os.getpid())}
    return json.dumps({"holder": holder, "at": time.monotonic(), **counts}).encode("ascii")


def _holder(claim: bytes) -> dict | None:
    try:
        return json.loads(claim)["holder"]
    except (ValueError, KeyError, TypeError):
        return None


def _signature(pid: int | None = None, start: str | None = None) -> str:
    """A name that no other process anywhere has, made of machine, process number and start time."""
    pid = os.getpid() if pid is None else pid
    told = f"{_machine()} {pid} {_start_time(pid) if start is None else start}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@functools.cache
def _machine() -> str:
    """One boot of one kernel and one set of process numbers: containers of one machine count as several."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str | None:
    """When the process began, in the kernel's ticks; None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]
