"""Errors for the user: one clear line and a non-zero exit status, no stack trace. And lines of output."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

NO_PATH = "cannot read or write"  # in place of a path that an error does not name
INTERRUPTED = 130  # exit status after Ctrl-C
REQUEUE = 75  # exit status "start me again": EX_TEMPFAIL, stopped by a signal


_interrupted = threading.Event()


@atexit.register
def _skip_teardown() -> None:
    """After Ctrl-C: the interpreter takes seconds to take torch apart. What must be cleaned up is by now."""
    if _interrupted.is_set():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(INTERRUPTED)


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to do about it, in one line."""


def say(text: str) -> None:
    """Print a line to standard output at once. Once that fails (`| head` has gone, a full disk), this line
    and all later ones are dropped: training continues without a reader."""
    try:
        print(text, flush=True)
    except OSError:
        _drop(sys.stdout)


def print_result(text: str) -> None:
    """Print a command's result. A reader that has gone does not undo the work; a full disk is an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop(sys.stdout)


def log(text: str) -> None:
    """Print a line of progress to standard error, apart from a command's result."""
    print(text, file=sys.stderr, flush=True)


def counted(number: int, one: str, many: str = "") -> str:
    """`1 shard`, `2,000 shards`. many: the plural, where it is not `one` and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, for a message of one line."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0].rstrip(": ")


def with_causes(error: BaseException, limit: int = 300) -> str:
    """`first_line` of an error and, shortened, of what caused it: libraries hide the reason there."""
    links: list[str] = []
    link: BaseException | None = error
    while link is not None and len(links) < 3:
        text = " ".join(f"{type(link).__name__}: {link}".split()).rstrip(": ")
        links.append(first_line(link) if not links else text[:limit] + "…" * (len(text) > limit))
        link = link.__cause__
    return "; caused by ".join(links)


class _Lenient:
    """A stream of messages that never fails: what it cannot write is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # no reader, a full disk, closed
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Make sure that output that cannot be written, or in another encoding, ends no run and prints no trace.

    Names and arguments are bytes to the system: with another encoding than UTF-8 they would change with the
    locale, so the program starts again in Python's UTF-8 mode.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller (`>&-`); a file opened later would get its number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # a pipe whose reader has gone
                stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, _Lenient):
        sys.stderr = _Lenient(sys.stderr)
    logging.raiseExceptions = False  # handlers print a trace for a stream without a reader


def run_main(prog: str, main: Callable[[], int | None]) -> int:
    """Run `main`; the process's exit status: 0, its own, 2 for `UserError` and `OSError`, 130 for Ctrl-C."""

    def interrupt(_number: int, frame: FrameType | None) -> None:
        # In an import there is nothing to undo, and Python may swallow the exception there.
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                with contextlib.suppress(OSError):
                    os.write(2, f"{prog}: interrupted\n".encode())  # `print` may be what is interrupted
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    _interrupted.clear()
    # Not where Ctrl-C is ignored, or another thread's.
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if ours:
            signal.signal(signal.SIGINT, interrupt)
        prepare_streams()
        status = main()
        sys.stdout.flush()
        return status or 0
    except UserError as error:
        return _refuse(prog, str(error))
    except KeyboardInterrupt:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once
        print(f"{prog}: interrupted", file=sys.stderr)
        _interrupted.set()
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone: drop the interpreter's last flush quietly.
        _drop(sys.stdout)
        return 141
    except OSError as error:  # a full disk, a folder without permission, a file where a folder should be
        status = _refuse(prog, describe(error))
        try:
            sys.stdout.flush()
        except OSError:  # standard output itself is what cannot be written
            _drop(sys.stdout)
        return status
    finally:
        if ours and not _interrupted.is_set():
            signal.signal(signal.SIGINT, signal.default_int_handler)


def in_thread(function: Callable[[], T]) -> T:
    """The result of a long call into a library that looks at no signals: Ctrl-C does not wait for its end."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result()


def _refuse(prog: str, message: str) -> int:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def describe(error: UserError | OSError) -> str:
    """The message for an error that ends the program: a path and a reason, or the error's own text."""
    # Libraries also raise OSError with a text only.
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or NO_PATH}: {error.strerror}"
    return str(error)


def _drop(stream: Any) -> None:
    """Send what is and will be written to a stream to nowhere: the interpreter's last flush must not fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
