"""What the programs `data-prep` and `sllm` share: types of options, help, and usage errors of one line."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, Token, validators

from data_prep.common.errors import UserError

NARROWEST = 10  # columns
Many = Annotated[Sequence[str], Parameter(consume_multiple=1)]  # `--shards A B`, or the option several times
LARGEST = 2**63 - 1
# Options that name a file or folder; those that are written.
WRITTEN = ("--output", "--output-dir", "--output_dir", "--to", "--html", "--result")
PATHS = (*WRITTEN, "--input", "--tokenizer", "--shards", "--model", "--run")


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    # cyclopts would round 1.5 and read 0b11.
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"must be a whole number, not {tokens[0].value!r}") from None


def whole_number(least: int) -> Parameter:
    return Parameter(converter=_whole, validator=validators.Number(gte=least, lte=LARGEST))


Positive = Annotated[int, whole_number(1)]
Natural = Annotated[int, whole_number(0)]
Amount = Annotated[float, Parameter(validator=validators.Number(gte=0, lt=math.inf))]


def make_app(name: str, version: str, summary: str, example: str) -> App:
    """A program without commands yet, which can install shell completion for itself."""
    app = App(
        name=name,
        help=f"{summary}\n\nexample: {example}",
        help_format="plaintext",
        version=f"{name} {version}",
        suppress_keyboard_interrupt=False,  # `run_main` reports it
        default_parameter=Parameter(negative=(), allow_repeating=True, show_default=_shown_default),
    )
    app.register_install_completion_command()
    return app


def _shown_default(value: Any) -> str | None:
    if value is None or value is False or value in ("", ()):
        return None
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse(app: App, argv: Sequence[str] | None = None) -> Callable[[], int | None]:
    """The command that `argv` (default: the process's arguments) asks for, with its arguments bound.

    Raises: UserError for a command line that cannot be meant.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for word, following in zip(words, [*words[1:], None], strict=False):
        name, sign, value = word.partition("=")
        value = value if sign else following
        if name in PATHS and value == "":
            raise UserError(f"{name} has no value: an empty path would be the current folder")
        if name in WRITTEN and "://" in (value or ""):
            raise UserError(
                f"{name} {value} is a URL; name a path here, and copy it from there when it is done"
            )
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) < NARROWEST:
        del os.environ["COLUMNS"]  # rich loops for ever on a terminal of no width
    try:
        command, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    except MissingArgumentError as error:
        name = error.argument.name if error.argument else ""
        misspelt = any(word.startswith("-") for word in error.unused_tokens or ())
        if (
            not name.startswith("-") or misspelt or error.keyword is not None
        ):  # the option is there, without a value
            raise UserError(str(error)) from None
        called = " ".join([app.name[0], *(error.command_chain or ())])
        raise UserError(f"{name} is missing and requires an argument: see `{called} --help`") from None
    except CycloptsError as error:
        raise UserError(str(error)) from None
    if command == app.help_print and not {"--help", "-h"} & set(words):
        raise UserError(f"no command: `{' '.join([app.name[0], *words])} --help` lists them")
    bound.apply_defaults()
    return partial(command, *bound.args, **bound.kwargs)


def run_app(app: App, argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` asks for; returns its exit status."""
    return parse(app, argv)() or 0
