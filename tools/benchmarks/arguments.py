"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    """A subcommand with its help and an example; `run` gets the parsed arguments, returns the exit status."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def answer(arguments: argparse.Namespace, result: dict, text: Callable[[dict], str]) -> None:
    """Print a result as one JSON object, or as `text` formats it for a reader."""
    print(json.dumps(result, ensure_ascii=False, allow_nan=False) if arguments.json else text(result))
