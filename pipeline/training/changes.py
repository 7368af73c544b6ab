"""What a run that is started again has changed: every key by name, a jump of the learning rate, its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.common.errors import UserError, counted
from data_prep.common.files import read_json
from pipeline.checkpoints.store import Meta, step_name
from pipeline.config.deepspeed_config import DEEPSPEED_CONFIG, RECIPE_DECIDES
from pipeline.config.keys import Section
from pipeline.config.schema import Recipe

WEIGHT_SOURCES = ("init_from ", "model.vae.path ", "model.vae.init_embeddings_from ", "model.backbone.path ")
JUMP = 1.05  # a smaller ratio of two rates is not reported


def changes(was: Any, now: Any, where: str = "") -> list[str]:
    """`optimizer.weight_decay 0.1 -> 100.0` for every value that differs."""
    was, now = (dict(one) if isinstance(one, Section) else one for one in (was, now))
    if isinstance(was, dict) and isinstance(now, dict):
        keys = dict.fromkeys((*was, *now))
        below = (changes(was.get(key), now.get(key), f"{where}.{key}" if where else key) for key in keys)
        return [change for found in below for change in found]
    return [] if was == now else [f"{where} {was} -> {now}"]


def changed_keys(saved: Meta, recipe: Recipe) -> list[str]:
    """The keys of a recipe that have changed since a checkpoint was written; the run's folder may."""
    was = _recipe_of(saved)
    # Sections themselves have the keys that a resolved recipe leaves out.
    before, now = (dict(was), dict(recipe)) if was else (saved.recipe, recipe.to_dict())
    found = changes({**before, "output_dir": ""}, {**now, "output_dir": ""})
    kept = " (the weights stay those of the checkpoint)"
    return [change + kept if change.startswith(WEIGHT_SOURCES) else change for change in found]


def changes_since(saved: Meta, recipe: Recipe, run_dir: Path, config: dict[str, Any]) -> list[str]:
    """What is not as it was at the last start, a line each, maybe empty. config: DeepSpeed's, now."""
    found, unknown = changed_keys(saved, recipe), ""
    try:
        before = read_json(run_dir / DEEPSPEED_CONFIG, default=config)
    except UserError as error:  # rank 0 alone reads it, and it only tells
        before, unknown = config, f"{error}: what has changed in it is not known"
    was, now = (
        {key: value for key, value in one.items() if key not in RECIPE_DECIDES} for one in (before, config)
    )
    found += [f"DeepSpeed config: {change}" for change in changes(was, now)]
    return [unknown, f"changed: {', '.join(found)}" if found else "", rate_jump(saved, recipe)]


def regrouping(saved: Meta, ours: Meta) -> str:
    """A line when a checkpoint is of another number of ranks or ZeRO stage, or empty."""
    if (saved.world, saved.zero_stage) == (ours.world, ours.zero_stage):
        return ""
    return (
        f"{step_name(saved.step)} was written by {counted(saved.world, 'rank')} with ZeRO "
        f"{saved.zero_stage}: its parts are regrouped for {counted(ours.world, 'rank')} with ZeRO "
        f"{ours.zero_stage}"
    )


def rate_jump(saved: Meta, recipe: Recipe) -> str:
    """A line about the learning rate when other keys make it jump at a resume, or empty."""
    was = _recipe_of(saved)
    if was is None:
        return ""
    rates = []
    for one in (was, recipe):
        for step in (saved.step, saved.step + 1):
            progress = one.training.progress(step, saved.tokens * step // saved.step)
            rates.append(one.optimizer.lr * one.schedule.factor(progress))
    last, next_unchanged, _, next_now = rates
    if any(max(next_now, other) <= JUMP * min(next_now, other) for other in (last, next_unchanged)):
        return ""
    return f"the learning rate jumps at step {saved.step + 1}: {last:.2e} -> {next_now:.2e}"


def _recipe_of(saved: Meta) -> Recipe | None:
    try:
        return Recipe.model_validate(saved.recipe)
    except ValidationError:  # of another release
        return None
