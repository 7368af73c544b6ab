"""`python -m tools.docs.configuration`: the keys of a recipe as docs/configuration.md."""

from __future__ import annotations

import inspect
from pathlib import Path

from data_prep.common.files import write_atomically
from data_prep.common.page import render
from pipeline.config.keys import default, expected
from pipeline.config.schema import KEYS, SECTIONS
from tools.commands import console

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def page() -> str:
    """The text of docs/configuration.md."""
    sections = []
    for prefix, (first, *others) in SECTIONS.items():
        # Families of backbones share a base class, which says what they are.
        described = inspect.getdoc(first.__base__ if others else first)
        keys = [
            (key, expected(field).removeprefix("a "), default(field), field.description)
            for key, field in KEYS.items()
            if key.rpartition(".")[0] == prefix.rstrip(".")
        ]
        sections.append((prefix.rstrip(".") or "The run", described or "", keys))
    return render(Path(__file__).with_suffix(".md.jinja"), {"sections": sections}, {}) + "\n"


def configuration() -> None:
    """Write the keys of a recipe as docs/configuration.md."""
    write_atomically(PAGE, page().encode())


if __name__ == "__main__":
    raise SystemExit(console("docs.configuration", configuration))
