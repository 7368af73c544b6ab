"""Lines of output; and Ctrl-C: one line, exit status 130, no wait for the interpreter's teardown."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

from helpers.paths import REPOSITORY

from data_prep.common.errors import counted

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


def test_an_interrupted_command_ends_within_a_second() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a script runs in the background has Ctrl-C ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "busy\n"
        os.kill(process.pid, signal.SIGINT)
        sent = time.monotonic()
        out, err = process.communicate()
        assert time.monotonic() - sent < 5  # a loaded machine's second
        assert (process.returncode, out, err) == (130, "cleaned up\n", "prog: interrupted\n")


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
