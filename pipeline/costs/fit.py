"""`sllm inspect --fit 80GB`: strategy, bins and checkpointing with which a recipe trains fastest there.

The step keeps the recipe's tokens. Bins are its own, halved and doubled, with a dry run of each. A candidate
fits if its peak is within `USABLE` of the memory: the rest is for CUDA, NCCL and holes between blocks.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError, counted
from data_prep.common.page import to_plain
from pipeline.common.text import FILTERS
from pipeline.config.deepspeed_config import micro_batches
from pipeline.config.library import find_recipe
from pipeline.config.schema import Recipe
from pipeline.costs.inspect import STRATEGIES, DryRun, step_costs
from pipeline.costs.options import Cluster
from pipeline.costs.sized_recipe import sized_recipe
from pipeline.costs.zero import Strategy, gathered_weights, peak_memory, states_memory

USABLE = 0.9  # of a GPU's memory
CLOSE = 1.01  # step times within 1 % are equal: the larger bin wins, which keeps a GPU busier
UNITS = {"": 1e9, "g": 1e9, "gb": 1e9, "gib": 2**30, "m": 1e6, "mb": 1e6, "mib": 2**20}


def read_size(text: str) -> float:
    """Bytes of `80GB`, `40GiB`, or `80` (GB). Raises: UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in UNITS or float(found[1]) == 0:
        raise UserError(f"--fit {text}: give the memory of one GPU, such as 80GB")
    return float(found[1]) * UNITS[found[2]]


def bin_sizes(recipe: Recipe) -> list[int]:
    """Tokens of a bin: the recipe's own, halved and doubled, that divide its step and hold a window."""
    data = recipe.data
    step = data.bin_tokens * data.bins_per_step
    sizes = {data.bin_tokens << n for n in range(4)} | {data.bin_tokens >> n for n in range(5)}
    return sorted(n for n in sizes if data.window_tokens <= n <= step and step % n == 0)


def fit(
    name: str | Path,
    vae_recipe: str | Path | None,
    vocab_size: int | None,
    tokens_per_sentence: float,
    dtype: str,
    memory: str,
    cluster: Cluster,
) -> dict[str, Any]:
    """The best candidate of each strategy, fastest first, and the one to take, as plain JSON.

    Args:
        name: recipe file, or name of one that ships with the package. Others: see `inspect`.
        memory: of each GPU of the cluster, as `read_size` reads it.
    Raises: UserError where nothing fits.
    """
    usable = USABLE * read_size(memory)
    recipe = sized_recipe(name, vae_recipe)
    run = DryRun(recipe, vocab_size, dtype, tokens_per_sentence)
    # Not zero0: its update on a GPU is thousands of kernels, whose time is not known here (costs/counts.py).
    usual = [name for name in STRATEGIES if name != "zero0"]
    strategies = [Strategy.read(one) for one in cluster.strategy or usual]
    step_tokens = recipe.data.bin_tokens * recipe.data.bins_per_step
    candidates = []
    for checkpointing, tokens in itertools.product((False, True), bin_sizes(recipe)):
        model, _, step = run.step(tokens, checkpointing)
        bins = step_tokens // tokens
        count = micro_batches(bins, cluster.world)
        for strategy in strategies:
            weights = gathered_weights(model, step.calls, strategy, count)
            states = states_memory(weights, strategy, cluster.world, dtype, recipe.training.ema is not None)
            head = min(step.logits, step.activations)
            candidates.append(
                {
                    "strategy": strategy.name,
                    "bin_tokens": tokens,
                    "bins_per_step": bins,
                    "activation_checkpointing": checkpointing,
                    **step_costs(strategy, weights, step.training, cluster, count, dtype),
                    "memory": {**states, "activations": step.activations - head, "head": head},
                    "peak": peak_memory(states, step.activations),
                }
            )
    fitting = [one for one in candidates if one["peak"] <= usable]
    if not fitting:
        least = min(candidates, key=lambda one: one["peak"])
        raise UserError(
            f"--fit {memory}: nothing fits: "
            f"{least['strategy']} with bins of {counted(least['bin_tokens'], 'token')} "
            f"needs {least['peak'] / 1e9:.1f} GB, and {usable / 1e9:.1f} GB ({USABLE:.0%}) are usable: "
            "use more GPUs, shorter windows or a smaller model"
        )
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for one in candidates:
        groups.setdefault((one["strategy"], one["activation_checkpointing"]), []).append(one)
    shown = [
        best([one for one in group if one["peak"] <= usable]) or min(group, key=lambda one: one["peak"])
        for group in groups.values()
    ]
    return {
        "recipe": find_recipe(name).stem,
        "dtype": run.dtype,
        "gpus": cluster.world,
        "usable": usable,
        "step_tokens": step_tokens,
        "candidates": sorted(shown, key=lambda one: (one["peak"] > usable, one["step_seconds"])),
        "chosen": best(fitting),
    }


def best(fitting: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest; among equally fast ones the largest bin, then the first strategy.

    Offloading comes last: the time of its copies and of the update on the CPU is not known here.
    """
    if not fitting:
        return None
    kept = [one for one in fitting if "offload" not in one["strategy"]] or fitting
    limit = CLOSE * min(one["step_seconds"] for one in kept)
    return max((one for one in kept if one["step_seconds"] <= limit), key=lambda one: one["bin_tokens"])


def format_fit(result: dict[str, Any]) -> str:
    """The result of `fit` as text, with YAML for the recipe."""
    chosen = result["chosen"]
    keys = {key: chosen[key] for key in ("bin_tokens", "bins_per_step")}
    again = {"activation_checkpointing": chosen["activation_checkpointing"]}
    lines = yaml.safe_dump({"data": keys, "training": again}, sort_keys=False).rstrip()
    command = f"# sllm train --recipe {result['recipe']} --deepspeed-config {chosen['strategy']}"
    return "\n".join([to_plain(Path(__file__).with_name("fit.md.jinja"), result, FILTERS), command, lines])
