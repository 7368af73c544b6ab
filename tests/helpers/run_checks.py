"""Functions for ranks (`helpers.ranks`) that measure a finished run: its checkpoints and its export."""

from __future__ import annotations

import itertools
import math
import resource
from pathlib import Path
from typing import Any

import torch
import yaml

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from pipeline.checkpoints import store as checkpoints
from pipeline.checkpoints.zero_shards import WEIGHT, Parts
from pipeline.config.schema import load_recipe
from pipeline.data.batch import build_batch
from pipeline.data.plan import BinPlan
from pipeline.export.model_folder import export_run
from pipeline.models.factory import load_model, new_model
from pipeline.models.folders import load_model_tokenizer


def weights_and_moments(run_dir: str) -> dict[str, Any]:
    """float64 arrays of a run's last checkpoint: "weight NAME", "exp_avg NAME", …, "step", "frozen NAME"."""
    parts = Parts(*checkpoints.find(run_dir))
    names = list(parts.weights)
    values = {
        f"{key} {name}": parts.state(name, key).double().numpy()
        for name in names
        for key in (WEIGHT, *parts.keys(name))
    }
    # `shapes` is what an export reads.
    frozen = [name for name in parts.shapes() if name in parts.frozen]
    values |= {f"frozen {name}": parts.tensor(name).double().numpy() for name in frozen}
    return values | {"step": parts.scalars(names[0])["step"].double().numpy()}


def tensors_in_checkpoints(run_dir: str) -> tuple[int, int]:
    """Number of floating-point tensors in a run's checkpoints, and of those that are not finite."""

    def tensors(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, dict):
            for one in value.values():
                yield from tensors(one)
        elif isinstance(value, (list, tuple)):
            for one in value:
                yield from tensors(one)

    found = [
        bool(tensor.isfinite().all())
        for file in Path(run_dir).glob("checkpoints/*/*.pt")
        for tensor in tensors(torch.load(file, weights_only=False))
    ]
    return len(found), found.count(False)


def export_and_measure(run_dir: str, output: str, which: str) -> tuple[str, float]:
    """Export, load, and measure on the run's validation sample by plain torch: (class, bits per byte)."""
    from pipeline.training.run import VALIDATION_SEED

    export_run(run_dir, output, which)
    model, tokenizer = load_model(output), load_model_tokenizer(output)
    with open(Path(run_dir) / "recipe.yaml", encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    data = recipe["data"]
    plan = BinPlan(
        [ShardSet.open(data["validation"])], data["window_tokens"], data["bin_tokens"], VALIDATION_SEED
    )
    nats = text_bytes = 0.0
    with torch.no_grad():
        for bin_ in itertools.islice(plan.epoch(), recipe["training"]["eval_bins"]):
            batch = build_batch(plan.spans(bin_))
            sums = model(batch)
            nats += float(sums.token_nll + sums.end_nll + sums.stop_nll)
            text_bytes += float(tokenizer.byte_lengths[batch.tokens_T.numpy()].sum())
    return type(model).__name__, nats / math.log(2) / text_bytes


def export_and_compare(run_dir: str, output: str) -> dict[str, float]:
    """Mean absolute difference of each weight of a run's export from its initial value."""
    export_run(run_dir, output, "last")
    recipe = load_recipe(Path(run_dir) / "recipe.yaml")
    shards = ShardSet.open(recipe.data.shards[0])
    torch.manual_seed(recipe.seed)
    initial = new_model(recipe, shards.tokenizer(), shards.settings.to_dict())
    trained = dict(load_model(output).named_parameters())
    return {name: float((trained[name] - p).abs().mean().detach()) for name, p in initial.named_parameters()}


def export_average(run_dir: str, output: str, decay: float) -> tuple[float, float]:
    """Largest distances of an export's weights from the average of the checkpoints of every step, and from
    the last weights."""
    export_run(run_dir, output, "last", "ema")
    recipe = load_recipe(Path(run_dir) / "recipe.yaml")
    shards = ShardSet.open(recipe.data.shards[0])
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, shards.tokenizer(), shards.settings.to_dict())
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for checkpoint in sorted(Path(run_dir).glob("checkpoints/step-*")):
        parts = Parts(checkpoint, checkpoints.read_meta(checkpoint))
        last = {name: parts.tensor(name).clone() for name in average}
        for name, tensor in average.items():
            average[name] = decay * tensor + (1 - decay) * last[name]
    found = load_model(output).state_dict()
    to_average, to_last = (
        max(float((found[name] - other[name]).abs().max()) for name in found) for other in (average, last)
    )
    return to_average, to_last


def bytes_kept_for_backward(recipe_file: str) -> tuple[int, int]:
    """Bytes of activations kept by a forward pass, without and with activation checkpointing."""
    from pipeline.models.layers import checkpoint_layers

    recipe = load_recipe(recipe_file)
    shards, data = ShardSet.open(recipe.data.shards[0]), recipe.data
    model = new_model(recipe, shards.tokenizer(), shards.settings.to_dict())
    plan = BinPlan([shards], data.window_tokens, data.bin_tokens, recipe.seed)
    batch = build_batch(plan.spans(next(iter(plan.epoch()))))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept() -> int:
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = model(batch)
        size = sum(found.values())
        losses.objective.backward()
        return size

    plain = kept()
    checkpoint_layers(model)
    return plain, kept()


def export_error(run_dir: str, output: str, which: str = "best", limit: int | None = None) -> str:
    """The message with which `export_run` refuses a run; empty when it does not. limit: bytes of a file that
    this process can write."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export_run(run_dir, output, which)
    except UserError as error:
        return str(error)
    return ""
