"""Plant known bugs one at a time in a copy of the tree, and run their tests there.

    python -m tools.planted_bugs [AREA …] [--only TEXT …] [--json FILE]

AREA.yaml is a list of bugs: `file`, `old` (occurs once in it), `new`, `tests` (pytest's arguments; run with
-x, without tests marked `long`), `why` (what the bug does). A bug counts as caught if a test fails with it
that passes without it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import yaml
from cyclopts import Parameter

from data_prep.common.command_line import Many, Positive
from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, log, print_result
from tools.commands import console
from tools.planted_bugs.trees import changed, copied_tree, rates, run_tests

LISTS = Path(__file__).resolve().parent


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
    """outcome: caught or missed, or why it says nothing: stale (`old` is not there once), broken (an import
    fails), hung (the tests ran out of time) or unsure (the test fails without the bug too)."""

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


def try_bug(tree: Path, bug: Bug, timeout: float) -> tuple[str, str]:
    """Plant a bug in the tree, run its tests, remove it; returns the outcome and the test that failed."""
    path = tree / bug.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(bug.old) != 1:
        return "stale", f"{text.count(bug.old)} places in {bug.file}"
    with changed(path, text.replace(bug.old, bug.new)):
        status, failed = run_tests(tree, ["-x", *bug.tests], timeout)
    if status is None:
        return "hung", ""
    if status == 0:
        return "missed", ""
    return ("caught" if status == 1 and "::" in failed[0] else "broken"), failed[0]


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
    outcomes: list[Outcome] = []
    with copied_tree() as tree:
        for area, bug in bugs:
            before = time.perf_counter()
            found, by = try_bug(tree, bug, timeout)
            outcomes.append(Outcome(area, bug.why, found, by, round(time.perf_counter() - before, 1)))
            log(f"{found:7} {area:12} {outcomes[-1].seconds:6.1f} s  {bug.file}: {bug.why}  {by}")
        deciding = {outcome.by for outcome in outcomes if outcome.outcome == "caught"}
        unsure = set(run_tests(tree, sorted(deciding), timeout)[1]) if deciding else set()
    for number, outcome in enumerate(outcomes):
        if outcome.by in unsure:
            log(f"unsure  {outcome.area}: {outcome.why}: {outcome.by} fails without it too")
            outcomes[number] = replace(outcome, outcome="unsure")
    print_result(table(outcomes))
    if json_file:
        made = header(("torch", "pytest"))
        write_result({**made, "bugs": [asdict(outcome) for outcome in outcomes]}, json_file)


def table(outcomes: list[Outcome]) -> str:
    """Planted and caught bugs of every area, as Markdown."""
    said = [one for one in outcomes if one.outcome in ("caught", "missed")]
    return rates("planted", "caught", ((one.area, one.outcome == "caught") for one in said))


if __name__ == "__main__":
    raise SystemExit(
        console("planted_bugs", run, example="python -m tools.planted_bugs data --json bugs.json")
    )
