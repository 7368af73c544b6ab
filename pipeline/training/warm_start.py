"""A new run from another's weights (`init_from` in a recipe), with a new optimizer, from step 0.

The source is a run directory (its best weights by validation, else its last) or a model folder (`sllm
export`, Hugging Face).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import Tokenizer
from pipeline.checkpoints import store
from pipeline.checkpoints.zero_shards import Parts
from pipeline.models.factory import load_model
from pipeline.models.folders import load_model_tokenizer
from pipeline.parallel.agreement import do_and_agree
from pipeline.parallel.ranks import Ranks


def initialise(model: nn.Module, source: str | Path, tokenizer: Tokenizer, ranks: Ranks) -> None:
    """Set every weight of the model to its value in `source`; called by every rank.

    Only rank 0 reads every byte of a checkpoint to verify it; the others wait and load the same one. Raises
    AgreedError on all ranks when source is neither a run nor a model folder, is damaged, was trained with
    another tokenizer, or has a missing, additional or differently shaped weight.
    """
    source = Path(source)
    checkpoint = do_and_agree(lambda: _verified(source) if ranks.rank == 0 else None)[0]
    do_and_agree(lambda: _load(model, source, checkpoint, tokenizer))


def _verified(source: Path) -> Path | None:
    """The checkpoint of a run, every byte verified; None when source is a model folder."""
    if store.checkpoints_folder(source).is_dir():
        found = store.find(source, "best") or store.find(source)
        if found is None:
            raise UserError(f"init_from {source}: holds no complete checkpoint")
        store.require_undamaged(*found)
        return found[0]
    if not source.is_dir():
        raise UserError(f"init_from {source}: does not exist")
    return None


@torch.no_grad()
def _load(model: nn.Module, source: Path, checkpoint: Path | None, tokenizer: Tokenizer) -> None:
    if checkpoint is not None:
        meta = store.read_meta(checkpoint)
        theirs = meta.tokenizer
        parts = Parts(checkpoint, meta)
        shapes: Mapping[str, torch.Size] = parts.shapes()
        weight: Callable[[str], Tensor] = parts.tensor
    else:
        weights: Mapping[str, Tensor] = load_model(source).state_dict()
        theirs = load_model_tokenizer(source).fingerprint
        shapes, weight = {name: tensor.shape for name, tensor in weights.items()}, weights.__getitem__
    if theirs != tokenizer.fingerprint:
        raise UserError(f"init_from {source}: was trained with another tokenizer than that of the shards")
    fill(model, shapes, weight, f"init_from {source}")


@torch.no_grad()
def fill(
    model: nn.Module, shapes: Mapping[str, torch.Size], weight: Callable[[str], Tensor], source: str
) -> None:
    """Copy the weights into the model one at a time, so that the process does not hold it twice. First
    compares names and shapes: UserError with `source` and the first difference, or the first weight that is
    not finite."""
    state = model.state_dict()
    ours = {name: list(tensor.shape) for name, tensor in state.items()}
    theirs = {name: list(shape) for name, shape in shapes.items()}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{source}: {name} is {theirs.get(name, 'missing')} there and "
                f"{ours.get(name, 'missing')} in this model"
            )
    for name, tensor in state.items():
        tensor.copy_(weight(name))
        if not tensor.isfinite().all():
            raise UserError(
                f"{source}: {name} is not finite, the run has diverged: train again with a lower optimizer.lr"
            )
