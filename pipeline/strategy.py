"""The DeepSpeed config of one run: a strategy file from `ds_configs/`, completed from the recipe.

In: a JSON file that says how to partition, offload and round, and nothing about batch sizes, so that it fits
every recipe and world size. Out: the dictionary for `deepspeed.initialize`. Called by `train.py`; imports no
torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.recipe import Recipe

# What the recipe decides: given in the strategy too, one of the two would be a lie.
_RECIPE_DECIDES = {
    "train_batch_size": "data.bins_per_step",
    "train_micro_batch_size_per_gpu": "data.bins_per_step",
    "gradient_accumulation_steps": "data.bins_per_step",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
}


def read_strategy(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file. UserError when it is missing, not JSON, or speaks about what the recipe
    decides."""
    try:
        strategy = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"DeepSpeed config {path} does not exist: see ds_configs/") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"DeepSpeed config {path} cannot be read as JSON: {error}") from None
    if not isinstance(strategy, dict):
        raise UserError(f"DeepSpeed config {path} is not a JSON object")
    for key, decided_by in _RECIPE_DECIDES.items():
        if key in strategy:
            raise UserError(
                f"DeepSpeed config {path} sets {key}: remove it, the recipe's {decided_by} decides"
            )
    stage = zero_stage(strategy)
    if stage == 0 and "data_types" in strategy:
        raise UserError(
            f"DeepSpeed config {path}: stage 0 knows no data_types (use stage 1, 2 or 3, or remove it)"
        )
    return strategy


def zero_stage(strategy: dict[str, Any]) -> int:
    return int(strategy.get("zero_optimization", {}).get("stage", 0))


def micro_batches(bins_per_step: int, world: int) -> int:
    """Bins that every rank runs in a step, empty ones included."""
    return -(-bins_per_step // world)


def complete_strategy(strategy: dict[str, Any], recipe: Recipe, world: int, on_gpu: bool) -> dict[str, Any]:
    """The config for `deepspeed.initialize`: batch bookkeeping and clipping from the recipe; fp32 on CPUs."""
    config = json.loads(json.dumps(strategy))
    accumulation = micro_batches(recipe.data.bins_per_step, world)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world,
        "gradient_clipping": recipe.optimizer.clip,
        "zero_allow_untested_optimizer": True,  # ours is torch.optim.AdamW, passed in
        "zero_force_ds_cpu_optimizer": False,
    }
    if not on_gpu:
        # bf16 products can be tens of times slower than fp32 on CPUs without instructions for them.
        for half in ("bf16", "fp16"):
            config.pop(half, None)
    return config
