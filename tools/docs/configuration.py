"""`python -m tools.docs.configuration`: the keys of a recipe as docs/configuration.md."""

from __future__ import annotations

import inspect
from pathlib import Path

from data_prep.common.files import write_atomically
from pipeline.config.keys import default, expected
from pipeline.config.schema import KEYS, SECTIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

<!-- Written by `python -m tools.docs.configuration` from pipeline/config/schema.py. -->

A recipe is a YAML file that describes one training run. `pipeline/recipes/` holds one for each
model.

- `base: other.yaml` starts from another recipe, by its path relative to the file. Keys of the file
  win.
- `--section.key VALUE` on the command line wins over the file: `--data.shards a b`, `--seed=2`.
- A `path` of a model part replaces the sizes that the base gives.
- A wrong recipe is refused before torch loads. The message lists every problem, and
  the nearest known key for an unknown one.
- A key that is given twice in one mapping is refused.
"""


def page() -> str:
    """The text of docs/configuration.md."""
    lines = [INTRODUCTION]
    for prefix, (first, *others) in SECTIONS.items():
        # Families of backbones share a base class, which says what they are.
        described = first.__base__ if others else first
        lines += [f"## {prefix.rstrip('.') or 'The run'}", "", inspect.getdoc(described) or "", ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for key, field in KEYS.items():
            if key.rpartition(".")[0] == prefix.rstrip("."):
                kind = expected(field).removeprefix("a ")
                lines.append(f"| `{key}` | {kind} | {default(field)} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
