"""The `data-prep` command. `run_main` imports its commands, and so answers Ctrl-C from the start on."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.common.errors import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) asks for; returns its exit status."""
    from data_prep.cli.commands import run

    return run(argv)


def console() -> int:
    """Entry point of the installed command; returns the exit status."""
    return run_main("data-prep", main)
