"""Recipes and DeepSpeed configs that ship with the package, by name."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path


def _folder(package: str) -> Path:
    # importlib.resources does not find a package without __init__.py in an editable installation.
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return next(Path(place) for place in spec.submodule_search_locations if Path(place).is_dir())


RECIPES = _folder("pipeline") / "recipes"
DEEPSPEED_CONFIGS = _folder("ds_configs")


def like(name: str | Path, folder: Path) -> str:
    """For a message: the files of `folder` (`RECIPES`, `DEEPSPEED_CONFIGS`) whose names are like `name`, or
    all."""
    known = sorted(path.stem for path in folder.iterdir() if path.suffix in (".yaml", ".json"))
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    return f"did you mean {near[0]}?" if near else f"the package has {', '.join(known)}"


def find_recipe(name: str | Path, beside: Path = Path()) -> Path:
    """A recipe file, or the bare name of one that ships with the package (`sllm-125m-h1`).

    Args:
        beside: folder that a relative path starts from.
    """
    path = beside / name
    packaged = RECIPES / f"{name}.yaml"
    return packaged if not path.exists() and packaged.is_file() else path


def find_deepspeed_config(name: str | Path) -> Path:
    """A DeepSpeed JSON file, or the bare name of one that ships with the package (`zero1`)."""
    path = Path(name)
    if path.exists():
        return path
    packaged = DEEPSPEED_CONFIGS / f"{name}.json"
    return packaged if packaged.is_file() else path
