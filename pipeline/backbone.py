"""The backbone: a Hugging Face decoder-only model over sentence embeddings.

Built from a config or loaded from a local folder, always through Hugging Face's own classes, so its
positions, norms and projections are as the model defines them (OPT-350M: post-norm, 512-wide embedding; the
others: pre-norm with a final norm). Its token embedding is dropped: the SLLM feeds sentence embeddings.
    Called by `sllm.py`; `token_lm.py` shares `run_packed`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from data_prep.errors import UserError
from pipeline.attention import HF_ATTENTION, SegmentLayout
from pipeline.pretrained import KINDS, load_token_level


def backbone_config(settings: dict) -> PreTrainedConfig:
    """A Hugging Face config from a dict with `model_type` (recipe, saved SLLM config)."""
    settings = dict(settings)
    model_type = settings.pop("model_type", "opt")
    if model_type in KINDS:
        raise UserError(f"model.backbone.model_type {model_type}: name a token-level model, for example opt")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        raise UserError(f"model.backbone: {str(error).splitlines()[0]}") from None


def new_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A randomly initialised backbone without token embedding."""
    return without_token_embedding(AutoModel.from_config(config, attn_implementation=HF_ATTENTION))


def load_backbone(folder: str | Path) -> PreTrainedModel:
    """A pretrained decoder-only model from a local folder, in fp32, without its token embedding and head.

    Raises: UserError when the folder holds no model, or one of ours.
    """
    return without_token_embedding(load_token_level(AutoModel, folder, attn_implementation=HF_ATTENTION))


def without_token_embedding(model: PreTrainedModel) -> PreTrainedModel:
    """Drop the token embedding: it has no part in an SLLM (no gradient, no memory, no parameters counted)."""
    model.set_input_embeddings(None)
    return model


def vector_width(config: PreTrainedConfig) -> int:
    """Width of the vectors that go in and come out (OPT-350M: 512 beside a hidden size of 1024)."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def run_packed(model: nn.Module, layout: SegmentLayout, **inputs: Tensor) -> Tensor:
    """Run a Hugging Face decoder over packed rows: `input_ids` [R] or `inputs_embeds` [R, d] → last hidden
    states [R, d].

    Every segment of the layout is a document window of its own: positions restart, attention stays inside.
    Raises: UserError when a segment is longer than the model's position table.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = int(layout.lengths.max())
    if limit is not None and longest > limit:
        raise UserError(
            f"a window of {longest} positions is longer than the model's {limit}; lower window_tokens"
        )
    inputs = {name: value[None] for name, value in inputs.items()}
    out = model(position_ids=layout.position_of_row[None], layout=layout, use_cache=False, **inputs)
    return out.last_hidden_state[0]
