"""Names that would shadow an import, and the structure that `make lint` checks."""

from __future__ import annotations

import configparser
import importlib.metadata
import sys
from graphlib import CycleError
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

import pipeline
from tools.structure import longest_chain

# Import names of packages that this project may get as extras.
EXTRAS = set("dask distributed fastapi gguf langcodes lm_eval matplotlib openai peft uvicorn".split())


def test_no_child_of_pipeline_shadows_an_import() -> None:
    """`deepspeed pipeline/train.py` puts pipeline/ itself on the path, before the script's first line."""
    children = {
        path.stem for path in Path(pipeline.__path__[0]).iterdir() if path.suffix == ".py" or path.is_dir()
    }
    installed = set(importlib.metadata.packages_distributions())
    assert not children & (set(sys.stdlib_module_names) | (installed - {"pipeline", "data_prep"}) | EXTRAS)


def test_every_package_says_what_it_is_for() -> None:
    for root in ("pipeline", "data_prep", "tools"):
        for init in (REPOSITORY / root).rglob("__init__.py"):
            first = init.read_text(encoding="utf-8").splitlines()[0]
            assert first.startswith('"""') and first.rstrip('"').endswith("."), init


def test_chains_are_counted() -> None:
    assert longest_chain({("a", "b"), ("b", "c"), ("a", "c")}) == ["a", "b", "c"]
    assert longest_chain(set()) == []
    with pytest.raises(CycleError):
        longest_chain({("a", "b"), ("b", "a")})


def test_every_file_that_is_no_module_ships_with_the_package() -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    for root in ("pipeline", "data_prep"):
        folder, patterns = REPOSITORY / root, config["options.package_data"][root].split(", ")
        shipped = {path for pattern in patterns for path in folder.glob(pattern)}
        others = {
            path for path in folder.rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        assert others == shipped and len(shipped) > 1


def test_the_docs_name_every_module_of_a_package_whose_modules_they_list() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.split("\n") if line.startswith("| `")}
    modules = [*REPOSITORY.glob("pipeline/*/*.py"), *REPOSITORY.glob("data_prep/*/*.py")]
    missing = [
        path.relative_to(REPOSITORY).as_posix()
        for path in modules
        if not path.stem.startswith("__") and path.parent.name not in ("cli", "common")
        if f"`{path.stem}`" not in rows[path.parent.name]
    ]
    assert len(modules) > 100 and not missing
