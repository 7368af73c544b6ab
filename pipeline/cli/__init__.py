"""The `sllm` command. `run_main` imports its commands, and so answers Ctrl-C from the start on."""

from __future__ import annotations

from data_prep.common.errors import run_main


def _main() -> int:
    from pipeline.cli.main import main

    return main()


def console() -> int:
    """Entry point of the `sllm` console script and of `python -m pipeline.cli`."""
    return run_main("sllm", _main)
