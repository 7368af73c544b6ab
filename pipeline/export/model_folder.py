"""`sllm export`: the weights of a training run as a model folder that `from_pretrained` loads.

In: a run directory. Out: `OUTPUT/` with model.safetensors (fp32; several files and an index when large),
config.json, `tokenizer/`, README.md (the model card) and `training.json` (where the weights come from).
ZeRO's partitions are put together on the CPU, by this one process, whatever the number of ranks that wrote
them.

DeepSpeed's checkpoint files are pickles: export runs of your own only. Nothing else in the project is ever
unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.common.errors import UserError, counted, first_line
from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from pipeline.checkpoints import store
from pipeline.checkpoints.store import Meta
from pipeline.checkpoints.zero_shards import Parts
from pipeline.config.schema import OptimizerRecipe
from pipeline.export.model_card import ORIGIN, model_card
from pipeline.models.anchor_lm import AnchorConfig, AnchorLM
from pipeline.models.attention import HF_ATTENTION
from pipeline.models.factory import save_model
from pipeline.models.folders import parameter_count
from pipeline.models.lora import add_lora, merge_lora
from pipeline.models.sentence_vae import SentenceVAE, SentenceVAEConfig
from pipeline.models.sllm import SLLM, SLLMConfig
from pipeline.models.stack import StackConfig, StackLM
from pipeline.models.token_lm import TokenLM
from pipeline.training.optimizer import EMA, parameter_groups
from pipeline.training.warm_start import fill


def export_run(
    run_dir: str | Path,
    output: str | Path,
    which: str | None = None,
    weights: str = "trained",
    average: int | None = None,
) -> Path:
    """Write the weights of a run to the folder `output`.

    An older export at `output` is replaced, anything else there is refused, other model folders too.

    Args:
        which: `best` by validation bits per byte (default), or `last`. A run without validation has no best
            checkpoint: its last one is taken.
        weights: `trained`, or `ema`, their running average (`training.ema`).
        average: the mean of the weights of so many last checkpoints, in place of one checkpoint's.
    Raises: UserError for a missing, unfinished or damaged run.
    """
    run_dir, output = Path(run_dir), Path(output)
    if average is not None and (which == "best" or weights != "trained"):
        raise UserError(
            "--average is of the trained weights of the last checkpoints: leave --which and --weights out"
        )
    which = which or ("best" if average is None else "last")
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} does not exist")
    found = store.find(run_dir, "best") if which == "best" else None
    found = found or store.find(run_dir)
    if found is None:
        raise UserError(f"{run_dir} holds no complete checkpoint (no checkpoints/latest): train first")
    require_replaceable(output)
    checkpoint, meta = found
    averaged = _last_checkpoints(run_dir, meta, average) if average else [found]
    for one in averaged:
        store.require_undamaged(*one)
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    if tokenizer.fingerprint != meta.tokenizer:
        raise UserError(
            f"{run_dir / 'tokenizer'} is not the tokenizer of {checkpoint.name}: start the training command "
            "again to rewrite it"
        )
    model = model_from_config(meta)
    add_lora(model, meta.recipe["model"].get("lora", {}))
    parts = Parts(checkpoint, meta)
    if average:
        tensor = _mean([parts, *(Parts(*one) for one in averaged[1:])])
    else:
        tensor = parts.tensor if weights == "trained" else averages(parts, meta, model)
    fill(model, parts.shapes(), tensor, f"checkpoint {checkpoint}")
    merge_lora(model)
    origin = {
        "run_dir": str(run_dir),
        "checkpoint": checkpoint.name,
        "step": meta.step,
        "tokens": meta.tokens,
        "weights": weights,
        **({"averaged": [path.name for path, _ in averaged]} if average else {}),
        "best": meta.best,
        "recipe": meta.recipe,
    }
    card = model_card(run_dir, origin, meta, parameter_count(model), output.name)
    write_folder(model, tokenizer, output, origin, card)
    return output


def write_folder(
    model: nn.Module, tokenizer: Tokenizer, output: Path, origin: dict[str, Any], card: str | None = None
) -> None:
    """Write a model folder aside and rename it to `output`. Raises: UserError when it cannot be written."""
    aside = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_model(model, aside, tokenizer)
        (aside / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        os.replace(aside, output)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"{output} cannot be written: {_reason(error)}") from None
        raise


def _last_checkpoints(run_dir: Path, meta: Meta, count: int) -> list[tuple[Path, Meta]]:
    """So many checkpoints, newest first. An older one that is kept as the best is none of the last."""
    paths = store.listed(run_dir)[0][: meta.recipe["training"]["keep"]]
    if len(paths) < count:
        raise UserError(
            f"--average {count}: {run_dir} "
            f"keeps its last {counted(len(paths), 'checkpoint')}: average fewer, or "
            "train with a larger training.keep"
        )
    return [(path, store.read_meta(path)) for path in paths[:count]]


def _mean(all_parts: list[Parts]) -> Callable[[str], Tensor]:
    """Name → mean of that weight; what is no floating-point number as in the newest checkpoint."""
    newest = all_parts[0]
    for parts in all_parts[1:]:
        if parts.shapes() != newest.shapes():
            raise UserError(
                f"{parts.checkpoint}: has other weights than {newest.checkpoint.name}: average fewer"
            )

    def mean(name: str) -> Tensor:
        tensor = newest.tensor(name)
        if not tensor.is_floating_point():
            return tensor
        return torch.stack([parts.tensor(name).double() for parts in all_parts]).mean(0)

    return mean


def _reason(error: Exception) -> str:
    # safetensors passes an error of the system on as text.
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def require_replaceable(output: Path) -> None:
    """Raise UserError for an output that is there and not ours."""
    if not is_replaceable(output):
        raise UserError(
            f"{output} exists and was not written by `sllm export` (no {ORIGIN} of ours in it): "
            "choose another --output"
        )


def is_replaceable(output: Path) -> bool:
    """Whether an export may take the place of what is at `output`: nothing, an empty folder or an export."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return True
    try:
        origin = json.loads((output / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(origin, dict) and {"run_dir", "checkpoint", "recipe"} <= set(origin)


def model_from_config(meta: Meta) -> nn.Module:
    """The run's model with random weights, as `build_model` made it: state dict keys are the same."""
    settings = dict(meta.model_config)
    if meta.objective == "vae":
        return SentenceVAE(SentenceVAEConfig.from_dict(settings))
    if settings["model_type"] == StackConfig.model_type:
        return StackLM(StackConfig.from_dict(settings))
    if settings["model_type"] == AnchorConfig.model_type:
        return AnchorLM(AnchorConfig.from_dict(settings))
    if meta.objective == "sllm":
        return SLLM(SLLMConfig.from_dict(settings))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return TokenLM(AutoModelForCausalLM.from_config(config, attn_implementation=HF_ATTENTION))


def averages(parts: Parts, meta: Meta, model: nn.Module) -> Callable[[str], Tensor]:
    """Name → running average of that weight; what is not trained (frozen, buffers) as it is.

    Raises: UserError when the run keeps no averages.
    """
    recipe = meta.recipe
    if recipe["training"].get("ema") is None:
        raise UserError(
            f"{parts.checkpoint}: the run keeps no average of its weights (training.ema): leave --weights out"
        )
    if meta.zero_stage > 0:
        untrained = {*parts.frozen, *parts.buffers}
        return lambda name: parts.tensor(name) if name in untrained else parts.state(name, EMA)
    # Without partitions the states are numbered, group after group.
    saved = parts.common["optimizer"]
    states = saved.get("optimizer_state_dict", saved)["state"]
    groups = parameter_groups(model, OptimizerRecipe(**recipe["optimizer"]))
    numbers = {id(p): number for number, p in enumerate(p for group in groups for p in group["params"])}
    named = {name: numbers.get(id(p)) for name, p in model.named_parameters(remove_duplicate=False)}
    return lambda name: states[named[name]][EMA] if named.get(name) in states else parts.tensor(name)
