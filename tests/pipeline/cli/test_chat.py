"""`sllm chat`: its commands, and the real program in a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time

import pytest
from helpers import tokenizer_folders
from helpers.model_folders import save_endless

from data_prep.common.errors import UserError
from pipeline.cli.chat import change, converse
from pipeline.cli.generate import settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("chat")
    return save_endless(place / "m", tokenizer_folders.byte_level(place / "tokenizer"))


def talk(folder: str, *lines: str, stop_after: int | None = None) -> tuple[list[str], str]:
    typed, shown = list(lines), []

    def read() -> str:
        if not typed:
            raise EOFError
        return typed.pop(0)

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == stop_after:
            raise KeyboardInterrupt

    answers = list(converse(folder, settings(3, temperature=0.0), read, write))
    return answers, "".join(shown)


def test_commands(folder: str) -> None:
    (first, second), shown = talk(
        folder, "/help", "/set", "/set top-k 5", "/set temperature 0.5", "The list", "/set max-tokens 2", "",
        "/quit", "never read",
    )  # fmt: skip
    assert "/set NAME VALUE" in shown and "max_sentences 3" in shown and "top-k 5" in shown
    assert len(first) > len(second) and shown.endswith("[token limit]\n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["heat", "1"], "there is no setting heat: they are temperature"),
        (["temperature", "hot"], "temperature cannot be hot"),
        (["temperature", "-1"], "temperature -1.0: must be 0"),
        (["top_k", "0"], "top-k 0: must be at least 1"),
        (["temperature", "none"], "temperature cannot be none"),
    ],
)
def test_wrong_settings_are_refused(values: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        change(settings(3), values)


def test_ctrl_c_stops_the_text_and_keeps_what_is_there(folder: str) -> None:
    (whole,), _ = talk(folder, "The list")
    (part, more), shown = talk(folder, "The list", "", stop_after=4)
    assert whole.startswith(part) and 0 < len(part) < len(whole)
    assert "\n[stopped]\n" in shown and more


@pytest.mark.launch
def test_the_program_in_a_terminal(folder: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pipeline.cli", "chat", "--model", folder, "--temperature", "0"]
    process = subprocess.Popen(
        [*command, "--max-sentences", "250"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
    )
    shown = b""

    def until(words: bytes, seconds: float = 90) -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while words not in shown:
            assert time.monotonic() < end, shown[-2000:]
            if select.select([ours], [], [], 0.2)[0]:
                shown += os.read(ours, 65536)

    try:
        until(b"\x1b[0m>")
        os.write(ours, b"/help\r")
        until(b"/set NAME VALUE")
        shown = b""
        os.write(ours, b"The list\r")
        time.sleep(1)
        os.write(ours, b"\x03")  # Ctrl-C
        until(b"]\r\n")
        os.write(ours, b"/quit\r")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
