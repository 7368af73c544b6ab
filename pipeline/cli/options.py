"""What the commands of `sllm` share: arguments, and how a result is given. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

INT8_HELP = "weights in 8 bits (CPU): faster to write with, a little less likely (docs/generation.md)"
VAE_RECIPE_HELP = "recipe of the SentenceVAE where model.vae.path does not exist (default: by its name)"


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    """A command with its help and an example; `run` gets the parsed arguments, returns the exit status."""
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


positive.__name__ = "whole number"  # argparse prints the type's name for text that is no number at all


def print_json(result: dict) -> None:
    """A result for a machine."""
    print(json.dumps(result, ensure_ascii=False, allow_nan=False))


def answer(args: argparse.Namespace, result: dict, text: Callable[[dict], str]) -> None:
    """A result as one JSON object, or as `text` gives it to a reader."""
    if args.json:
        print_json(result)
    else:
        print(text(result))
