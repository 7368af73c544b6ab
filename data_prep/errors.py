"""One way to tell a user that the input is wrong: one clear line, a non-zero exit status, no stack trace.

Both console commands (`data-prep`, `sllm`) and `pipeline/train.py` run their `main` through `run_main`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to do about it, in one line."""


def run_main(prog: str, main: Callable[[], int | None]) -> int:
    """Run `main` and return the process's exit status: 0, its own, 2 for a `UserError`, 130 for Ctrl-C."""
    try:
        status = main()
        sys.stdout.flush()
        return status or 0
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"{prog}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone: let the last flush of the interpreter go nowhere, quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
