"""The DeepSpeed config of one run: JSON files from `ds_configs/`, merged and completed from the recipe.

The files set partitioning, offload and precision, never batch sizes: each fits every recipe and world size.
Nothing here imports torch, except where a config offloads to an NVMe disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.common.files import read_json
from pipeline.config.library import find_deepspeed_config
from pipeline.config.schema import Recipe

COMMENT = "//"  # a file's header: JSON has no comments
FLOPS_PROFILE, COMMS = "flops-profile.txt", "comms.json"  # of the run directory

# The recipe sets these. A second value in the DeepSpeed config could contradict it.
_RECIPE_DECIDES = {
    "train_batch_size": "data.bins_per_step",
    "train_micro_batch_size_per_gpu": "data.bins_per_step",
    "gradient_accumulation_steps": "data.bins_per_step",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
}

# Parts of zero_optimization (ZeRO++) that are CUDA kernels.
_NEEDS_CUDA = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


def read_strategy(*paths: str | Path) -> dict[str, Any]:
    """Read DeepSpeed JSON files; a later one wins, key by key.

    Raises: UserError for a file that is missing, not JSON, or sets what the recipe sets.
    """
    strategy: dict[str, Any] = {}
    for path in paths:
        _merge(strategy, _read(path))
    offload = strategy.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("ratio", 1) != 1:
        raise UserError(
            f"DeepSpeed config {paths[0]}: offload_optimizer.ratio {offload['ratio']} splits the update "
            "between two optimizers, and only one can skip a bad step: remove it (all is offloaded then)"
        )
    if zero_stage(strategy) == 0 and "data_types" in strategy:
        raise UserError(
            f"DeepSpeed config {paths[0]}: stage 0 knows no data_types (use stage 1, 2 or 3, or remove it)"
        )
    return strategy


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


def _read(path: str | Path) -> dict[str, Any]:
    missing = "does not exist: see ds_configs/"
    strategy = read_json(find_deepspeed_config(path), f"DeepSpeed config {path}", missing)
    for key, decided_by in _RECIPE_DECIDES.items():
        if key in strategy:
            raise UserError(
                f"DeepSpeed config {path} sets {key}: remove it, the recipe's {decided_by} decides"
            )
    strategy.pop(COMMENT, None)
    return strategy


def zero_stage(strategy: dict[str, Any]) -> int:
    return int(strategy.get("zero_optimization", {}).get("stage", 0))


def micro_batches(bins_per_step: int, world: int) -> int:
    """Bins that each rank runs in a step, empty ones included."""
    return -(-bins_per_step // world)


def complete_strategy(strategy: dict[str, Any], recipe: Recipe, world: int, on_gpu: bool) -> dict[str, Any]:
    """The config for `deepspeed.initialize`: batch sizes and clipping from the recipe; fp32 on CPUs.

    Raises: UserError for NVMe offload on a machine where DeepSpeed cannot use it.
    """
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
        for quantised in _NEEDS_CUDA:
            config.get("zero_optimization", {}).pop(quantised, None)
    if config.get("flops_profiler", {}).get("enabled"):
        config["flops_profiler"]["output_file"] = str(Path(recipe.output_dir) / FLOPS_PROFILE)
    if _offloads_to_nvme(config):
        _require_async_io()
    return config


def _offloads_to_nvme(config: dict[str, Any]) -> bool:
    zero = config.get("zero_optimization", {})
    return any(zero.get(f"offload_{what}", {}).get("device") == "nvme" for what in ("optimizer", "param"))


def _require_async_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            "the DeepSpeed config offloads to an NVMe disk, and DeepSpeed's async_io cannot be built here: "
            "install libaio with its headers (Debian: libaio-dev), or offload to the cpu (zero3-offload.json)"
        )
