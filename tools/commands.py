"""Functions as commands: the parameters are the options, figures that are returned are printed as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from data_prep import __version__
from data_prep.common.command_line import make_app, parse
from data_prep.common.errors import run_main

Output = Annotated[str | None, Parameter(help="also write the figures to this file, as JSON")]


def console(name: str, *functions: Callable[..., dict[str, Any] | int | None], example: str = "") -> int:
    """Run `python -m tools.NAME`, which has one command for each function, or none for one.

    Returns: the exit status, which a function may return too.
    """
    summary = (functions[0].__doc__ or "").split("\n")[0]
    app = make_app(called := f"python -m tools.{name}", __version__, summary, example or called)
    for function in functions:
        (app.command if len(functions) > 1 else app.default)(function)

    def main() -> int | None:
        result = parse(app)()
        if isinstance(result, dict):
            print(json.dumps(result, indent=1, ensure_ascii=False))
        return result if isinstance(result, int) else None

    return run_main(name.rpartition(".")[2], main)
