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
(another machine: no common clock is needed). Two processes may then run one unit at the same time. That costs
time, nothing else: they make the same bytes, and the second to publish finds the place taken.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

from data_prep.errors import UserError

STALE_SECONDS = 60.0
BEAT_SECONDS = 0.5  # between two rewritings of a claim, and between two looks at the others' claims
POLL_SECONDS = 0.1
RECORD = "record.json"


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
        try:
            paths = sorted((self.folder / "claims").iterdir())
        except FileNotFoundError:
            return
        for path in paths:
            phase, _, unit = path.name.rpartition("-")
            try:
                yield phase, int(unit), json.loads(path.read_bytes())
            except (OSError, ValueError):
                continue  # released or just being written

    def take(self, phase: str, units: Sequence[int]) -> int | None:
        """Claim the first of `units` that is free; None when there is none."""
        for unit in units:
            path = self._claim(phase, unit)
            try:
                path.parent.mkdir(exist_ok=True)
                claim = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if not self._is_void(path):
                    continue
                self._write_claim(path, {})
                return unit
            except FileNotFoundError:  # somebody has finished everything and tidied up
                return None
            with os.fdopen(claim, "wb") as stream:
                stream.write(_claim_bytes({}))
            return unit
        return None

    @contextmanager
    def work(self, phase: str, unit: int) -> Iterator[tuple[Path, Callable[[dict], None]]]:
        """(folder, beat) for a unit that was taken; what is in the folder afterwards becomes its result."""
        claim, told = self._claim(phase, unit), time.monotonic()
        aside = self.folder / "aside" / f"{phase}-{unit:06d}-{os.uname().nodename}-{os.getpid()}"

        def beat(counts: dict) -> None:
            nonlocal told
            if time.monotonic() - told >= BEAT_SECONDS:
                told = time.monotonic()
                self._write_claim(claim, counts)

        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside, beat
            target = self.result(phase, unit)
            try:
                target.parent.mkdir(exist_ok=True)
                os.rename(aside, target)
            except OSError:
                # Another one was here first, or this was the last unit and the folder is gone.
                if not target.is_dir() and not self.is_finished():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            claim.unlink(missing_ok=True)

    def _claim(self, phase: str, unit: int) -> Path:
        return self.folder / "claims" / f"{phase}-{unit:06d}"

    def _write_claim(self, path: Path, counts: dict) -> None:
        beside = path.parent.with_name(f"claim-{os.uname().nodename}-{os.getpid()}")
        try:
            beside.write_bytes(_claim_bytes(counts))
            os.replace(beside, path)
        except FileNotFoundError:
            pass  # somebody has finished everything and tidied up

    def _is_void(self, path: Path) -> bool:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False  # released this very moment: it is done, or free at the next look
        try:
            holder = json.loads(content)["holder"]
        except (ValueError, KeyError):
            holder = None
        if holder is not None and holder["machine"] == _machine():
            return _start_time(holder["pid"]) != holder["start"]
        seen, since = self._seen.get(path, (None, 0.0))
        if seen != content:
            self._seen[path] = content, time.monotonic()
            return False
        return time.monotonic() - since > STALE_SECONDS


def run_phases(board: Board, phases: Sequence[Phase]) -> None:
    """Take part in the work until all of it is done, by whomever.

    Raises what `run` raises, and `UserError` when somebody else has given up and removed the folder.
    """
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
        while any(process.is_alive() for process in processes):
            watch()
            _wait_for_any(processes)
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
        from data_prep.errors import describe

        errors.put(describe(error))
        raise SystemExit(2) from None


def _claim_bytes(counts: dict) -> bytes:
    holder = {"machine": _machine(), "pid": os.getpid(), "start": _start_time(os.getpid())}
    return json.dumps({"holder": holder, "at": time.monotonic(), **counts}).encode("ascii")


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
