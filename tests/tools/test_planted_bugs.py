"""Planted bugs: what counts as caught, in a small tree; and the lists can be read."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.common.errors import UserError
from tools.mutation import _without_annotations
from tools.planted_bugs.__main__ import LISTS, Bug, Outcome, read_bugs, table, try_bug

CODE = "import time\n\n\ndef double(x):\n    return 2 * x\n\n\ndef other(x):\n    return x\n"
TESTS = "from code_under_test import double\n\n\ndef test_double():\n    assert double(2) == 4\n"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    gc.freeze()  # as `copied_tree` does: a fork of this process would look at all of it
    (tmp_path / "code_under_test.py").write_text(CODE)
    (tmp_path / "test_code.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    yield tmp_path
    gc.unfreeze()


@pytest.mark.parametrize(
    ("old", "new", "outcome", "by"),
    [
        ("2 * x", "3 * x", "caught", "test_code.py::test_double"),
        ("2 * x", "x + x", "missed", ""),
        ("double(x)", "twice(x)", "broken", "test_code.py"),
        ("return", "return 2 *", "stale", "2 places in code_under_test.py"),
        ("2 * x", "time.sleep(60)", "hung", ""),
        ("2 * x", "next(n for n in iter(int, 1) if n)", "hung", ""),
        # Asleep at most looks, never for long.
        ("2 * x", "[time.sleep(0.2) or sum(range(10**6)) for _ in range(20)] and x + x", "missed", ""),
    ],
)
def test_a_bug_is_caught_if_a_test_fails(tree: Path, old: str, new: str, outcome: str, by: str) -> None:
    bug = Bug("code_under_test.py", old, new, ["test_code.py"], "")
    assert try_bug(tree, bug, timeout=3 if "time" in new or outcome == "hung" else 60) == (outcome, by)
    assert (tree / "code_under_test.py").read_text() == CODE


@pytest.mark.parametrize("then", ["2 * x", "next(n for n in iter(int, 1) if n)"])
def test_nothing_that_a_test_started_is_left(tree: Path, then: str) -> None:
    start = "import subprocess\n    child = subprocess.Popen(['sleep', '99'])\n"
    code = f"{start}    open('pid', 'w').write(str(child.pid))\n    return {then}"
    bug = Bug("code_under_test.py", "return 2 * x", code, ["test_code.py"], "")
    expected, timeout = ("missed", 60) if then == "2 * x" else ("hung", 2)
    assert try_bug(tree, bug, timeout)[0] == expected
    pid, looks = int((tree / "pid").read_text()), 0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert (looks := looks + 1) < 50
        time.sleep(0.1)


def test_the_lists_can_be_read() -> None:
    for path in LISTS.glob("*.yaml"):
        bugs = read_bugs(path.stem)
        assert len(bugs) >= 10 and all(bug.old != bug.new and bug.tests and bug.why for bug in bugs)
    with pytest.raises(UserError, match="no bugs for 'models2'; there are lists for "):
        read_bugs("models2")


def test_a_bug_with_other_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "area.yaml").write_text("- {file: a, old: b, new: c, tests: [d]}\n")
    with pytest.raises(UserError, match="bug 1 has keys"):
        read_bugs("area", tmp_path)


def test_the_rate_is_of_bugs_that_say_something() -> None:
    outcomes = [Outcome("a", "", one, "", 0) for one in ("caught", "hung", "missed", "stale", "unsure")]
    assert table(outcomes).splitlines()[2:] == ["| a | 2 | 1 | 50% |", "| all | 2 | 1 | 50% |"]
    assert table([]).splitlines()[2:] == ["| all | 0 | 0 | – |"]


def test_annotations_are_no_code() -> None:
    plain = "def f(x: int | None = 1) -> int | None:\n    y: int | None = x\n    return y\n"
    assert _without_annotations(plain) == _without_annotations(plain.replace("|", "+"))
    assert _without_annotations(plain) != _without_annotations(plain.replace("= 1", "= 2"))
    assert _without_annotations("x = {//y}") is None
