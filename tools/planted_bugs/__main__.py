"""Plant known bugs one at a time in a copy of the tree, and run their tests there.

    python -m tools.planted_bugs [AREA …] [--only TEXT …] [--json FILE]

AREA.yaml is a list of bugs: `file`, `old` (occurs once in it), `new`, `tests` (pytest's arguments, run with
-x), `why` (what the bug does). A bug counts as caught if a test fails with it that passes without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from cyclopts import Parameter

from data_prep import __version__
from data_prep.common.command_line import Many, Positive, make_app, run_app
from data_prep.common.environment import require_folder, write_result
from data_prep.common.errors import UserError, log, print_result, run_main

REPOSITORY = Path(__file__).resolve().parents[2]
LISTS = Path(__file__).resolve().parent
# Imported once: they take ten times as long as most tests.
LIBRARIES = ("torch", "transformers", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}  # they read it then


@dataclass(frozen=True)
class Bug:
    """One replacement in one file; see the module."""

    file: str
    old: str
    new: str
    tests: list[str]
    why: str


@dataclass(frozen=True)
class Outcome:
    """outcome: caught, hung (the tests ran out of time: caught too), missed, or why it says nothing: stale
    (`old` does not occur once), broken (nothing can be imported) or unsure (the test fails without it)."""

    area: str
    why: str
    outcome: str
    by: str
    seconds: float


def read_bugs(area: str, folder: Path = LISTS) -> list[Bug]:
    """The list of one area. Raises: UserError if a bug's keys are not `Bug`'s."""
    path = folder / f"{area}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise UserError(f"no bugs for {area!r}; there are lists for {known}")
    wanted = {field.name for field in fields(Bug)}
    rows = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    for number, row in enumerate(rows, 1):
        if set(row) != wanted:
            raise UserError(f"{path}: bug {number} has keys {sorted(row)}, not {sorted(wanted)}")
    return [Bug(**row) for row in rows]


def copy_tree(tree: Path) -> None:
    """Every file that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)


def run_tests(tree: Path, tests: list[str], timeout: float) -> tuple[int | None, str]:
    """pytest's status in a tree (None: out of time) and the first test that fails."""
    with tempfile.TemporaryFile() as out:
        process = multiprocessing.get_context("fork").Process(
            target=_pytest, args=(tree, tests, out.fileno())
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            return None, ""
        out.seek(0)
        output = out.read().decode(errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
    return process.exitcode, failed[1] if failed else output.strip().splitlines()[-1]


def _pytest(tree: Path, tests: list[str], out: int) -> None:
    """Become `python -m pytest` in a tree, with the libraries of this process but none of our modules."""
    os.setpgid(0, 0)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = sys.path[0] = str(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in ("data_prep", "pipeline", "tools")]:
        del sys.modules[name]
    sys.modules["__main__"] = pytest
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def try_bug(tree: Path, bug: Bug, timeout: float, passing: dict[str, bool]) -> tuple[str, str]:
    """Plant a bug in the tree, run its tests, remove it; returns the outcome and the test that decided.
    `passing` remembers which tests pass without a bug."""
    path = tree / bug.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(bug.old) != 1:
        return "stale", f"{text.count(bug.old)} places in {bug.file}"
    _write(path, text.replace(bug.old, bug.new))
    try:
        status, failed = run_tests(tree, bug.tests, timeout)
    finally:
        _write(path, text)
    if status is None:
        return "hung", ""
    if status == 0:
        return "missed", ""
    if status != 1 or "::" not in failed:
        return "broken", failed
    if failed not in passing:
        passing[failed] = run_tests(tree, [failed], timeout)[0] == 0
    return ("caught" if passing[failed] else "unsure"), failed


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # Its bytecode would count as new: two changes in a second, of one size.
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def run(
    areas: Many = (),
    /,
    *,
    only: Many = (),
    timeout: Annotated[Positive, Parameter(help="seconds for one bug's tests")] = 300,
    json_file: Annotated[str | None, Parameter(name="--json", help="also write the outcomes there")] = None,
) -> None:
    """Plant bugs one at a time and say which ones the tests catch.

    Args:
        areas: lists to use; without any, all of them
        only: only bugs whose file or reason has one of these texts in it
    """
    require_folder(json_file)
    areas = list(areas) or sorted(path.stem for path in LISTS.glob("*.yaml"))
    bugs = [
        (area, bug)
        for area in areas
        for bug in read_bugs(area)
        if not only or any(text in bug.file or text in bug.why for text in only)
    ]
    os.environ.update(ENVIRONMENT)
    for name in LIBRARIES:
        importlib.import_module(name)
    outcomes, passing = [], {}
    with tempfile.TemporaryDirectory(prefix="planted-bugs-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        for area, bug in bugs:
            before = time.perf_counter()
            found, by = try_bug(tree, bug, timeout, passing)
            outcomes.append(Outcome(area, bug.why, found, by, round(time.perf_counter() - before, 1)))
            log(f"{found:7} {area:12} {outcomes[-1].seconds:6.1f} s  {bug.file}: {bug.why}  {by}")
    print_result(table(outcomes))
    if json_file:
        write_result({"bugs": [asdict(outcome) for outcome in outcomes]}, json_file)


def table(outcomes: list[Outcome]) -> str:
    """Caught and planted bugs of every area, as Markdown."""
    lines = ["| area | planted | caught | rate |", "| --- | ---: | ---: | ---: |"]
    areas = list(dict.fromkeys(outcome.area for outcome in outcomes))
    for area in [*areas, "all"]:
        of = [outcome.outcome for outcome in outcomes if area in (outcome.area, "all")]
        said = [found for found in of if found in ("caught", "hung", "missed")]
        caught = len(said) - said.count("missed")
        rate = f"{100 * caught / len(said):.0f} %" if said else "–"
        lines.append(f"| {area} | {len(said)} | {caught} | {rate} |")
    return "\n".join(lines)


def main() -> int:
    app = make_app(
        "python -m tools.planted_bugs",
        __version__,
        "Plant known bugs one at a time and run their tests.",
        "python -m tools.planted_bugs data --json bugs.json",
    )
    app.default(run)
    return run_app(app)


if __name__ == "__main__":
    raise SystemExit(run_main("planted_bugs", main))
