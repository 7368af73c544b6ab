"""Building a model from a recipe alone, without its model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.common.errors import UserError
from pipeline.config.library import RECIPES, find_recipe
from pipeline.config.model_recipe import VaeRecipe
from pipeline.config.schema import Recipe, load_recipe
from pipeline.models.folders import KINDS, read_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Vocabulary(NamedTuple):
    """A tokenizer's attributes that `build_model` reads; OPT's by default."""

    vocab_size: int = 50272
    bos_id: int = 2
    eos_id: int = 2
    pad_id: int = 1


def sized_recipe(path: str | Path, vae_recipe: str | Path | None = None) -> Recipe:
    """A recipe in which model folders are replaced by their sizes.

    The SentenceVAE's sizes come from `vae_recipe`, else from `model.vae.path` if it exists, else from the
    recipe with the folder's name (`models/svae-768-h1` → `svae-768-h1.yaml`).
    Raises: UserError when none of them is found.
    """
    path = find_recipe(path)
    recipe = load_recipe(path)
    vae, backbone = dict(recipe.model.vae), dict(recipe.model.backbone)
    if recipe.objective != "lm" and (vae_recipe or vae.get("path")):
        vae = _vae_sizes(recipe, path, vae_recipe)
    if recipe.objective != "vae" and backbone.get("path"):
        backbone = read_config(backbone["path"])
        if backbone.get("model_type") in KINDS:
            raise UserError(
                f"recipe {path}: model.backbone.path holds a {backbone['model_type']}, not a backbone"
            )
    # Initial weights have no influence on sizes.
    vae = {key: value for key, value in vae.items() if value is not None and key != "init_embeddings_from"}
    # Not checked: the config of a folder has more keys than a recipe may have.
    recipe.model.vae, recipe.model.backbone = vae, backbone
    return recipe


def _vae_sizes(recipe: Recipe, path: Path, vae_recipe: str | Path | None) -> dict[str, Any]:
    folder = recipe.model.vae.get("path")
    if vae_recipe is None:
        if (Path(folder) / "config.json").is_file():
            config = read_config(folder)
            return {key: config[key] for key in VaeRecipe.model_fields if key in config}
        name = f"{Path(folder).name}.yaml"
        found = [place / name for place in (path.parent, RECIPES) if (place / name).is_file()]
        if not found:
            raise UserError(
                f"recipe {path}: model.vae.path {folder} does not exist and there is no recipe {name}: "
                "give the SentenceVAE's recipe with --vae-recipe"
            )
        vae_recipe = found[0]
    source = load_recipe(find_recipe(vae_recipe))
    if source.objective != "vae":
        raise UserError(f"--vae-recipe {vae_recipe}: its objective is {source.objective}, not vae")
    return dict(source.model.vae)
