"""A copy of the tree in which a file is changed and pytest is run, with libraries that are imported once; and
how many of the changes a test noticed."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from data_prep.common.page import NOTHING, Table, markdown_table

REPOSITORY = Path(__file__).resolve().parents[2]
# They take longer to import than most tests to run, and read the environment then.
LIBRARIES = (
    "torch",
    "torch._dynamo",
    "transformers.modeling_utils",
    "transformers.models.opt.modeling_opt",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "hypothesis.strategies",
)
LOOKS = 30  # a tenth of a second apart; a process that sleeps at each of them waits for what never comes
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def copied_tree() -> Iterator[Path]:
    """A temporary copy of every file that git tracks or would add."""
    os.environ.update(ENVIRONMENT)
    for name in LIBRARIES:
        importlib.import_module(name)
    # pytest collects garbage several times, in what was imported too.
    gc.freeze()
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="planted-bugs-") as folder:
        for name in filter(None, listed.split("\0")):
            if (REPOSITORY / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, Path(folder) / name)
        yield Path(folder)


@contextlib.contextmanager
def changed(path: Path, text: str) -> Iterator[None]:
    """The file with another text, inside the `with` block."""
    before = path.read_text(encoding="utf-8")
    try:
        _write(path, text)
        yield
    finally:
        _write(path, before)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # Its bytecode would count as new: two changes in a second, of one size.
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def run_tests(tree: Path, tests: Sequence[str], timeout: float) -> tuple[int | None, list[str]]:
    """pytest's status in a tree (None: out of time) and what failed: tests, or else its last line.

    Args:
        timeout: seconds of CPU; or seconds by the clock, after which tests that only wait are ended
    """
    with tempfile.TemporaryFile() as out:
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=_pytest, args=(tree, tests, out.fileno(), timeout))
        process.start()
        process.join(timeout)
        asleep = 0
        while process.is_alive() and asleep < LOOKS:
            process.join(0.1)
            asleep = asleep + 1 if _sleeps(process.pid) else 0
        hung = process.is_alive()
        # What the tests started and left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if hung or process.exitcode == -signal.SIGXCPU:
            return None, []
        out.seek(0)
        output = out.read().decode(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return process.exitcode, failed or output.strip().splitlines()[-1:]


def _sleeps(pid: int) -> bool:
    """Whether a process and all below it sleep."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return all(one.status() == psutil.STATUS_SLEEPING for one in family)
    except psutil.NoSuchProcess:
        return False


def _pytest(tree: Path, tests: Sequence[str], out: int, timeout: float) -> None:
    """Become `python -m pytest` in a tree, with the libraries of this process but none of our modules."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(timeout), resource.RLIM_INFINITY))
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))
    os.chdir(tree)
    os.environ["PYTHONPATH"] = sys.path[0] = str(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in ("data_prep", "pipeline", "tools")]:
        del sys.modules[name]
    sys.modules["__main__"] = pytest
    sys.exit(pytest.main(["-q", "-m", "not long", "-p", "no:cacheprovider", *tests]))


def rates(changes: str, noticed: str, found: Iterable[tuple[str, bool]]) -> str:
    """A line for each kind of change, as Markdown. found: the kind of each, and whether a test noticed it."""
    found, lines = list(found), []
    for kind in [*dict.fromkeys(kind for kind, _ in found), "all"]:
        of = [one for name, one in found if kind in (name, "all")]
        share = f"{sum(of) / len(of):.0%}" if of else NOTHING
        lines.append([kind, str(len(of)), str(sum(of)), share])
    return "\n".join(markdown_table(Table(["of", changes, noticed, "rate"], lines)))
