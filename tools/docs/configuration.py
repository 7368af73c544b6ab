"""`python -m tools.docs.configuration`: the keys of a recipe as docs/configuration.md."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from data_prep.common.errors import UserError, run_main
from data_prep.common.files import write_atomically
from pipeline.config import schema
from pipeline.config.keys import default, expected

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

<!-- Written by `python -m tools.docs.configuration` from pipeline/config/schema.py. -->

A recipe is a YAML file that describes one training run. `pipeline/recipes/` holds one for each model.

- `base: other.yaml` starts from another recipe, by its path relative to the file. Keys of the file win.
- `--section.key VALUE` on the command line wins over the file: `--data.shards a b`, `--seed=2`.
- A `path` of a model part replaces the sizes that the base gives.
- A wrong recipe is refused before torch loads. The message lists every problem.
- A key that is given twice in one mapping is refused.
"""
MODEL_PARTS = {"vae": schema.VaeRecipe, "backbone": schema.BackboneRecipe}


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Prefix of the keys and the model of each section, in the order of the file."""
    yield "", schema.Recipe
    for name, field in schema.Recipe.model_fields.items():
        if name == "model":
            yield from ((f"model.{part}.", kind) for part, kind in MODEL_PARTS.items())
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield f"{name}.", field.annotation


def page() -> str:
    """The text of docs/configuration.md."""
    lines = [INTRODUCTION]
    for prefix, kind in sections():
        lines += [f"## {prefix.rstrip('.') or 'The run'}", "", inspect.getdoc(kind) or "", ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for key, field in schema.KEYS.items():
            if key.rpartition(".")[0] == prefix.rstrip("."):
                kind_of_value = expected(field).removeprefix("a ")
                lines.append(f"| `{key}` | {kind_of_value} | {default(field)} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docs.configuration", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is stale; write nothing")
    if parser.parse_args(argv).check:
        if PAGE.read_text(encoding="utf-8") != page():
            raise UserError(f"{PAGE} is stale: run python -m tools.docs.configuration")
    else:
        write_atomically(PAGE, page().encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main("configuration", main))
