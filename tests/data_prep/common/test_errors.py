"""Lines of output; and Ctrl-C: one line, exit status 130, no wait for the interpreter's teardown."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import REPOSITORY

from data_prep.common.errors import counted, in_thread

COMMAND = """
import atexit, sys, time
from data_prep.common.errors import run_main

class Heavy:
    def __del__(self):
        time.sleep(30)

heavy = Heavy()
atexit.register(print, "cleaned up")

def main():
    print("busy", flush=True)
    time.sleep(60)

sys.exit(run_main("prog", main))
"""


def interrupted(
    code: str, times: int = 1, after: float = 0.05, **options: Any
) -> tuple[int, str, str, float]:
    """Run code and send Ctrl-C each time `after` it prints "busy"; status, further output and seconds."""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a script runs in the background has Ctrl-C ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    ) as process:
        for _ in range(times):
            assert process.stdout is not None and process.stdout.readline() == "busy\n"
            time.sleep(after)
            os.kill(process.pid, signal.SIGINT)
        sent = time.monotonic()
        out, err = process.communicate()
    return process.returncode, out, err, time.monotonic() - sent


LOADED = 5  # seconds: a second, on a loaded machine


def test_an_interrupted_command_ends_within_a_second() -> None:
    *found, seconds = interrupted(COMMAND)
    assert found == [130, "cleaned up\n", "prog: interrupted\n"] and seconds < LOADED


SWALLOWED = """
import time
print("busy", flush=True)
try:
    time.sleep(20)
except KeyboardInterrupt:  # as in a callback of the import system
    pass
time.sleep(20)
"""
IN_MAIN = """
import hashlib, time
from data_prep.common.errors import in_thread, run_main
def main():
    %s
raise SystemExit(run_main("prog", main))
"""
LONG_CALL = 'print("busy", flush=True); in_thread(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9))'


def test_ctrl_c_ends_an_import_that_swallows_it(tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWED)
    path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(tmp_path)])}
    *found, seconds = interrupted(IN_MAIN % "import swallows", env=os.environ | path)
    assert found == [130, "", "prog: interrupted\n"] and seconds < LOADED


PROGRAM = """
import sys, %(module)s
sys.argv = %(words)r
print("busy", flush=True)
raise SystemExit(%(module)s.console())
"""


@pytest.mark.parametrize("after", [0.1, 0.2, 0.4])
@pytest.mark.parametrize(
    ("module", "words"),
    [("data_prep.cli", ["data-prep", "segment"]), ("pipeline.cli", ["sllm", "check", "--model", "nowhere"])],
)
def test_ctrl_c_while_a_program_starts_is_one_line(module: str, words: list[str], after: float) -> None:
    code = PROGRAM % {"module": module, "words": words}
    *found, seconds = interrupted(code, after=after, stdin=subprocess.PIPE)  # which never ends
    assert found == [130, "", f"{words[0]}: interrupted\n"] and seconds < LOADED


def test_ctrl_c_does_not_wait_for_a_library() -> None:
    *found, seconds = interrupted(IN_MAIN % LONG_CALL)
    assert found == [130, "", "prog: interrupted\n"] and seconds < LOADED


def test_a_call_in_a_thread_gives_its_result_or_error() -> None:
    assert in_thread(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 // 0)


CLEANS_UP = """
    try:
        print("busy", flush=True)
        time.sleep(20)
    finally:
        print("busy", flush=True)
        time.sleep(20)
"""


def test_a_second_ctrl_c_does_not_wait_for_the_clean_up() -> None:
    *found, seconds = interrupted(IN_MAIN % CLEANS_UP.strip(), 2)
    assert found == [130, "", "prog: interrupted\n"] and seconds < LOADED
    at_exit = 'import atexit; atexit.register(lambda: (print("busy", flush=True), time.sleep(20))); '
    *found, seconds = interrupted(IN_MAIN % (at_exit + 'print("busy", flush=True); time.sleep(20)'), 2)
    assert found == [-signal.SIGINT, "", "prog: interrupted\n"] and seconds < LOADED


def test_a_count_has_its_noun_in_the_right_number() -> None:
    assert [counted(n, "shard") for n in (0, 1, 2, 21, 1001)] == [
        "0 shards", "1 shard", "2 shards", "21 shards", "1,001 shards"
    ]  # fmt: skip
    assert counted(1, "entry is", "entries are") == "1 entry is"
    assert counted(3, "entry is", "entries are") == "3 entries are"


# `{n} shards`, `{{ n|f(",") }} shards`, `{n} rank(s)`: a number that may be 1, before a plural.
_PLURAL = re.compile(
    r"\{([^{}]*)\}\}? (?:(?:new|complete|more|good|damaged|skipped) )?(?:\w+\(s\)|bins|bytes|characters"
    r"|checkpoints|documents|entries|files|findings|models|parameters|positions|problems|processes|prompts"
    r"|ranks|records|restarts|rows|runs|sentences|shards|steps|tasks|texts|threads|tokens|units|windows"
    r"|workers)\b(?![/(])"
)
_NOT_COUNTS = re.compile(r"[A-Z_]+|.*\.\df.*")  # constants; decimals


def test_no_message_puts_a_plural_after_a_number_that_may_be_one() -> None:
    places = (path for top in ("data_prep", "pipeline") for path in sorted((REPOSITORY / top).rglob("*.*")))
    found = [
        f"{path.name}:{number}: {match.group()}"
        for path in places
        if path.suffix in (".py", ".jinja")
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
        for match in _PLURAL.finditer(line)
        if not _NOT_COUNTS.fullmatch(match[1])
    ]
    assert found == []
