"""Lines of output; and Ctrl-C: one line, exit status 130, no wait for the interpreter's teardown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.paths import REPOSITORY

from data_prep.common.errors import UserError, run_main, singular

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


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("1 sentences, 1 tokens in 1 windows", "1 sentence, 1 token in 1 window"),
        ("1 new tokens and 1 complete sentences", "1 new token and 1 complete sentence"),
        ("x: 1 processes, 1 shards with 1 documents", "x: 1 process, 1 shard with 1 document"),
        (
            "21 sentences, 1,001 tokens, 0.1 tokens, 11 runs",
            "21 sentences, 1,001 tokens, 0.1 tokens, 11 runs",
        ),
        ("41.1 tokens/s, 1 tokens/s", "41.1 tokens/s, 1 tokens/s"),
    ],
)
def test_one_of_a_thing_is_no_plural(line: str, printed: str) -> None:
    assert singular(line) == printed


def test_errors_are_singular_too(capsys: pytest.CaptureFixture) -> None:
    def refuse() -> None:
        raise UserError("the file has 1 documents")

    assert run_main("prog", refuse) == 2
    assert capsys.readouterr().err == "prog: error: the file has 1 document\n"
