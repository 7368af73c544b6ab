"""Benchmarks as commands: a function's parameters are its options, its figures are printed as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from data_prep import __version__
from data_prep.common.command_line import make_app, parse
from data_prep.common.errors import run_main

Output = Annotated[str | None, Parameter(help="also write the figures to this file, as JSON")]


def console(name: str, example: str, *benchmarks: Callable[..., dict[str, Any]]) -> int:
    """Run `python -m tools.benchmarks.NAME`, which has one command for each benchmark, or none for one."""
    summary = (benchmarks[0].__doc__ or "").split("\n")[0]
    app = make_app(f"python -m tools.benchmarks.{name}", __version__, summary, example)
    for benchmark in benchmarks:
        (app.command if len(benchmarks) > 1 else app.default)(benchmark)

    def main() -> None:
        result = parse(app)()
        if isinstance(result, dict):  # not after --help
            print(json.dumps(result, indent=1, ensure_ascii=False))

    return run_main(name, main)
