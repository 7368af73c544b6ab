"""LoRA by peft: low-rank adapters on the pretrained layers, trained in place of their weights.

They are part of the model in training and in its checkpoints. An export merges them into the weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from data_prep.common.errors import UserError, first_line
from data_prep.common.extras import import_extra
from pipeline.config.model_recipe import LoraRecipe


def add_lora(model: nn.Module, settings: dict[str, Any]) -> None:
    """Adapters on the pretrained layers, whose own weights then do not learn. settings: keys of
    `model.lora`; none: nothing is done.

    Raises: UserError when no layer is meant, or peft is missing.
    """
    if not settings:
        return
    peft = import_extra("peft", "lora")
    recipe = LoraRecipe.model_validate(settings)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank if recipe.alpha is None else recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.targets or "all-linear",
    )
    try:
        peft.inject_adapter_in_model(config, _pretrained(model))
    except ValueError as error:
        raise UserError(f"recipe: model.lora.targets {recipe.targets}: {first_line(error)}") from None


def is_adapter(parameter: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in parameter


def merge_lora(model: nn.Module) -> None:
    """Put the adapters, if there are any, into the weights: the model is as before `add_lora`."""
    adapted = [(name, part) for name, part in model.named_modules() if hasattr(part, "lora_A")]
    for name, part in adapted:
        part.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, part.get_base_layer())
    if adapted:
        vars(_pretrained(model)).pop("peft_config", None)
        model.requires_grad_(True)


def _pretrained(model: Any) -> Any:
    """The layers of Hugging Face's model."""
    if hasattr(model, "backbone"):
        return model.backbone
    return getattr(model, "tokens", model).model.base_model
