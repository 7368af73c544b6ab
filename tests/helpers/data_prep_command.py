"""Runs `data-prep` in tests, in this process or a new one, and reads its output."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.common import errors

COMMAND = [sys.executable, "-m", "data_prep.cli"]


def call(*arguments: str | Path) -> int:
    """Run in this process with the console's error handling; returns the exit status."""
    status = cli.run_main("data-prep", lambda: cli.main([str(argument) for argument in arguments]))
    errors._interrupted.clear()  # else the tests themselves would end with status 130
    return status


def refused(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    """Check that a command ends in one line on stderr and status 2; returns the line."""
    capsys.readouterr()
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("data-prep: error: ") and err.count("\n") == 1
    return err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def data_prep(*arguments: str | Path) -> None:
    """Run in this process; a failure fails the test."""
    status = cli.main([str(argument) for argument in arguments])
    assert not status, f"data-prep {arguments[0]}: status {status}"
