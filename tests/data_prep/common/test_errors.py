"""Ctrl-C: one line, exit status 130, and no wait for the interpreter's teardown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from helpers.paths import REPOSITORY

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
