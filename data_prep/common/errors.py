"""One way to tell a user that the input is wrong: one clear line, a non-zero exit status, no stack trace.

Both console commands (`data-prep`, `sllm`) and `pipeline/train.py` run their `main` through `run_main`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

NO_PATH = "cannot read or write"  # what `describe` says in place of a path that an error does not name


REQUEUE = 75  # exit status "start me again": EX_TEMPFAIL, stopped by a signal


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to do about it, in one line."""


def say(text: str) -> None:
    """One line to standard output, at once. When it can go there no longer (`| head` has gone, a full disk),
    this line and all later ones go nowhere: for a program that is to run on without a reader."""
    try:
        print(text, flush=True)
    except OSError:
        _drop_output()


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, for a message of one line."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0].rstrip(": ")


def run_main(prog: str, main: Callable[[], int | None]) -> int:
    """Run `main`; the process's exit status: 0, its own, 2 for `UserError` and `OSError`, 130 for Ctrl-C."""
    try:
        status = main()
        sys.stdout.flush()
        return status or 0
    except UserError as error:
        return _refuse(prog, str(error))
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone: let the last flush of the interpreter go nowhere, quietly.
        _drop_output()
        return 141
    except OSError as error:  # a full disk, a folder without permission, a file where a folder should be
        status = _refuse(prog, describe(error))
        try:
            sys.stdout.flush()
        except OSError:  # standard output itself is what cannot be written
            _drop_output()
        return status


def _refuse(prog: str, message: str) -> int:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def describe(error: UserError | OSError) -> str:
    """What to tell the user about an error that ends the program: a path and a reason, or a message."""
    # Libraries raise OSError with a text alone, too.
    strerror = getattr(error, "strerror", None)
    return f"{error.filename or NO_PATH}: {strerror}" if strerror else str(error)


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
