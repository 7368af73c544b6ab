"""The DeepSpeed config of one run: JSON files from `ds_configs/`, merged and completed from the recipe.

The files set partitioning, offload and precision, never batch sizes: each fits every recipe and world size.
Nothing here imports torch, except where a config offloads to an NVMe disk.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import operator
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.common.files import read_json
from pipeline.config.keys import BOUNDS
from pipeline.config.library import DEEPSPEED_CONFIGS, find_deepspeed_config, like
from pipeline.config.schema import Recipe

AUTO = "auto"  # asks a trainer to fill in a value
COMMENT = "//"  # a file's header: JSON has no comments
# Files of the run directory.
DEEPSPEED_CONFIG, FLOPS_PROFILE, COMMS = "ds_config.json", "flops-profile.txt", "comms.json"

# Every key of a config with its type, from DeepSpeed itself: `python -m tools.docs.deepspeed_keys`.
KEYS_FILE = Path(__file__).with_name("deepspeed_keys.json")

# The recipe sets these. A second value in the DeepSpeed config could contradict it.
RECIPE_DECIDES = {
    "train_batch_size": "data.bins_per_step",
    "train_micro_batch_size_per_gpu": "data.bins_per_step",
    "gradient_accumulation_steps": "data.bins_per_step",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "wandb": "log.wandb",
    "comet": "log.wandb",
}

WORDS = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text"}
WORDS |= {"array": "a list", "object": "a mapping"}

FIRST_TORCH_WITH_COMPILED_ZERO3 = (2, 13)

# Parts of zero_optimization (ZeRO++) that are CUDA kernels.
_NEEDS_CUDA = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


def read_strategy(*paths: str | Path) -> dict[str, Any]:
    """Read DeepSpeed JSON files; a later one wins, key by key.

    Raises: UserError with all problems of the files: missing, not JSON, a key that DeepSpeed does not know or
    that is given twice, a value of the wrong type, `auto`, or what the recipe sets.
    """
    strategy: dict[str, Any] = {}
    problems: list[str] = []
    for path in paths:
        values, found = _read(path)
        problems += [f"DeepSpeed config {path}: {'; '.join(found)}"] if found else []
        _merge(strategy, values)
    if problems:
        raise UserError("; ".join(problems))
    if wrong := next(_contradictions(strategy), None):
        raise UserError(f"DeepSpeed config {' '.join(map(str, paths))}: {wrong}")
    return strategy


def _contradictions(strategy: dict[str, Any]) -> Iterator[str]:
    """Parts of a config that do not fit together, or would have no effect."""
    stage, zero = zero_stage(strategy), strategy.get("zero_optimization", {})
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1)
    if ratio != 1:
        yield (
            f"offload_optimizer.ratio {ratio} splits the update between two optimizers, and only one can "
            "skip a bad step: remove it (all is offloaded then)"
        )
    if stage == 0 and "data_types" in strategy:
        yield "stage 0 knows no data_types (use stage 1, 2 or 3, or remove it)"
    if all((strategy.get(half) or {}).get("enabled") for half in ("bf16", "fp16")):
        yield "bf16 and fp16 are both enabled: disable one"
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if stage < least and (zero.get(part) or {}).get("device", "none") != "none":
            yield f"stage {stage} offloads nothing by {part} (use stage {least} or more, or remove it)"


def require_compatible(strategy: dict[str, Any], recipe: Recipe) -> None:
    """Raises: UserError for a strategy and recipe that would train wrongly without an error."""
    if zero_stage(strategy) == 0 and (strategy.get("fp16") or {}).get("enabled"):
        raise UserError(
            "DeepSpeed config: fp16 with stage 0 trains with wrong gradients, because DeepSpeed divides them "
            "by a loss scale that it never applied: use zero1.json with fp16, or bf16"
        )
    if recipe.optimizer.kind == "muon" and _offloads_to_nvme(strategy):
        raise UserError(
            "optimizer.kind muon keeps its momentum where matrices can be put together, not on an NVMe disk: "
            "offload to the cpu (zero3-offload.json), or use adamw"
        )
    torch = version("torch")
    if (
        zero_stage(strategy) == 3
        and recipe.training.compile
        and _numbers(torch) < FIRST_TORCH_WITH_COMPILED_ZERO3
    ):
        raise UserError(
            f"training.compile with ZeRO-3 loses gradients under torch {torch}: use torch 2.13 or newer, "
            "another stage, or training.compile false"
        )


def _numbers(release: str) -> tuple[int, ...]:
    """`2.11.0+cu130` → (2, 11)."""
    return tuple(int(number) for number in release.split(".")[:2])


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


def _read(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """A file's values, and what is wrong with them."""
    problems: list[str] = []

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        problems.extend(f"{key} is given twice" for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return dict(pairs)

    missing = f"does not exist: {like(path, DEEPSPEED_CONFIGS)}"
    strategy = read_json(
        find_deepspeed_config(path), f"DeepSpeed config {path}", missing, object_pairs_hook=mapping
    )
    strategy.pop(COMMENT, None)
    for key, decided_by in RECIPE_DECIDES.items():
        if key in strategy and not _is_left_open(key, strategy.pop(key)):
            problems.append(f"it sets {key}: remove it, the recipe's {decided_by} decides")
    keys = _deepspeed_keys()
    for key in keys["unused"]:
        if strategy.pop(key, None) is not None:
            problems.append(f"{key} is not for this trainer: remove it")
    known = {"keys": dict.fromkeys(RECIPE_DECIDES, {}) | keys["known"]}
    return strategy, [*problems, *_mistakes(strategy, known, "")]


def _is_left_open(key: str, value: Any) -> bool:
    """Whether a key that the recipe decides is `auto`: the recipe's value is what it asks for."""
    if key == "optimizer" and isinstance(value, dict) and value.get("type") == "AdamW" and len(value) == 2:
        parameters = value.get("params")
        names = {"lr", "betas", "eps", "weight_decay"}
        return isinstance(parameters, dict) and parameters == dict.fromkeys(names & set(parameters), AUTO)
    return value == AUTO


@functools.cache
def _deepspeed_keys() -> dict[str, Any]:
    return read_json(KEYS_FILE)


def _kinds(value: Any) -> tuple[str, ...]:
    """JSON's names for the type of a value."""
    if isinstance(value, bool) or value is None:
        return ("null",) if value is None else ("boolean",)
    if isinstance(value, (int, float)):
        return ("number", "integer") if value == value // 1 else ("number",)
    return ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object",)


def _mistakes(value: Any, allowed: dict[str, Any], where: str) -> Iterator[str]:
    """What is wrong with a value and all below it. where: its key, with those above it."""
    if value == AUTO:
        yield f"{where} is auto: give {_expected(allowed)}, or remove it (DeepSpeed's default counts then)"
    elif "renamed" in allowed:
        yield f"{where} is an old name: use {allowed['renamed']}"
    elif not _fits(value, allowed):
        yield f"{where} must be {_expected(allowed)}, not {json.dumps(value)}"
    elif isinstance(value, dict):
        names = allowed.get("keys", value)
        for key, below in value.items():
            at = f"{where}.{key}" if where else key
            if key not in names:
                yield _unknown(key, at, names)
            else:
                yield from _mistakes(below, names[key] if names is not value else {}, at)
    elif isinstance(value, list) and AUTO in value:
        yield f"{where} has auto in it: give all values"


def _fits(value: Any, allowed: dict[str, Any]) -> bool:
    if "kinds" in allowed and not set(_kinds(value)) & set(allowed["kinds"]):
        return False
    if isinstance(value, (int, float)):
        bounds = [getattr(operator, name)(value, allowed[name]) for name in BOUNDS if name in allowed]
        if not math.isfinite(value) or not all(bounds):
            return False
    return value is None or "values" not in allowed or value in allowed["values"]


def _expected(allowed: dict[str, Any]) -> str:
    if "values" in allowed:
        return f"one of {', '.join(map(str, allowed['values']))}"
    limits = " and ".join(f"{words} {allowed[name]:g}" for name, words in BOUNDS.items() if name in allowed)
    kinds = " or ".join(WORDS[kind] for kind in allowed.get("kinds", ["string", "number"]) if kind != "null")
    return f"{kinds} {limits}".rstrip()


def _unknown(key: str, at: str, siblings: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if not near:  # people also put a key into the wrong block
        blocks = {name: block.get("keys", {}) for name, block in _deepspeed_keys()["known"].items()}
        near = [f"{name}.{key}" for name, keys in blocks.items() if key in keys]
    hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(siblings)}"
    return f"unknown key {at!r}: {hint}"


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
        "zero_allow_untested_optimizer": True,  # ours is made of torch.optim.AdamW, and passed in
        "zero_force_ds_cpu_optimizer": False,
    }
    # It would wait for the GPU twice a micro-batch, for a speed that no part of this project reads.
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
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
    return any((zero.get(f"offload_{what}") or {}).get("device") == "nvme" for what in ("optimizer", "param"))


def _require_async_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            "the DeepSpeed config offloads to an NVMe disk, and DeepSpeed's async_io cannot be built here: "
            "install libaio with its headers (Debian: libaio-dev), or offload to the cpu (zero3-offload.json)"
        )
