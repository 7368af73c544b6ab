"""Results of units, as files of one shared folder.

A unit is made in a staging folder and published by renaming it. So a result is complete or absent, whatever
is killed, and a unit that two processes make at once is published by the first. A result records the sizes
of its files: `require` finds and discards what a crash of the machine has truncated, and the run starts again
with what is missing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_prep.common.errors import UserError, log
from data_prep.common.files import flush_to_disk

RECORD = "record.json"  # in every result; {"counts": …} in a staging folder
SIZES = "sizes.json"  # in every result: its files and their sizes


class Incomplete(Exception):
    """A result that was needed was missing or truncated, and has been discarded."""


class WorkFolder:
    """Results below `folder`; the process that finishes the work removes it.

    Args:
        is_finished: whether all of the work is done.
    """

    def __init__(self, folder: Path, is_finished: Callable[[], bool]):
        self.folder, self.is_finished = folder, is_finished
        self._staging = folder / "aside"

    def result(self, phase: str, unit: int) -> Path:
        """The folder of a unit's published result."""
        return self.folder / phase / f"{unit:06d}"

    def done(self, phase: str) -> set[int]:
        """The units whose results are published."""
        try:
            return {int(entry.name) for entry in os.scandir(self.folder / phase)}
        except FileNotFoundError:
            return set()

    def staging(self, phase: str) -> Iterator[tuple[int, Path]]:
        """(unit, staging folder) of units that are, or were, in progress."""
        for folder in sorted(self._staging.glob(f"{phase}-*-*")):
            yield int(folder.name.split("-")[1]), folder

    @contextmanager
    def lock(self, shared: bool = False) -> Iterator[None]:
        """Keep other runs out; those that share the lock run at the same time.

        It saves work and is not needed for correct results, so a file system without locks is no error.

        Raises:
            Incomplete: the work has been finished.
            UserError: another run gave up and removed the folder.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with ExitStack() as opened:
            try:
                stream = opened.enter_context(open(self.folder / "lock", "a+b"))
                try:
                    fcntl.lockf(stream, kind | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    log(f"data-prep: another run is at work in {self.folder.parent}; waiting for it")
                    fcntl.lockf(stream, kind)
                except OSError:
                    pass
                self._staging.mkdir(exist_ok=True)
            except FileNotFoundError:
                if not self.is_finished():
                    raise UserError(
                        f"{self.folder} is gone: another process gave up, see its message"
                    ) from None
            if self.is_finished():
                raise Incomplete
            yield

    def remove_staging(self, phase: str, units: Iterable[int]) -> None:
        """Remove what killed processes left of these units."""
        units = set(units)
        for unit, folder in self.staging(phase):
            if unit in units:
                self._remove(folder)

    def make(self, phase: str, unit: int, run: Callable[[Path], None]) -> None:
        """Publish what `run(folder)` writes, unless the unit is done or all of the work is."""
        result = self.result(phase, unit)
        while not (result.is_dir() or self.is_finished()):
            staging = self._staging / f"{phase}-{unit:06d}-{uuid.uuid4().hex}"
            staging.mkdir()
            try:
                run(staging)
                if not self.is_finished():
                    self._publish(staging, result)
            except OSError as error:
                # Another run that was started meanwhile took this one for dead, or finished the work.
                if staging.is_dir() and not self.is_finished():
                    if error.filename or not error.strerror:
                        raise
                    raise UserError(f"cannot write to {self.folder.parent}: {error.strerror}") from error
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, staging: Path, result: Path) -> None:
        sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        (staging / SIZES).write_text(json.dumps(sizes), encoding="ascii")
        for path in [*staging.iterdir(), staging]:
            flush_to_disk(path)
        result.parent.mkdir(exist_ok=True)
        try:
            os.rename(staging, result)
        except OSError:
            if not result.is_dir():  # another process has published it
                raise
        flush_to_disk(result.parent)

    def require(self, phase: str, units: Iterable[int]) -> None:
        """Raises `Incomplete` after discarding results that are missing or that a crash truncated."""
        if broken := [unit for unit in units if not self._is_complete(self.result(phase, unit))]:
            for unit in broken:
                self._remove(self.result(phase, unit))
            raise Incomplete

    def _is_complete(self, result: Path) -> bool:
        try:
            sizes = json.loads((result / SIZES).read_bytes())
            return all((result / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError):
            return False

    def _remove(self, folder: Path) -> None:
        # Renamed first: a folder that its owner publishes at this moment is removed whole or not at all.
        gone = self._staging / f"gone-{uuid.uuid4().hex}"
        try:
            os.rename(folder, gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)
