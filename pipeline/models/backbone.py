"""The backbone: a Hugging Face decoder-only model over sentence embeddings (paper section 3.2).

It is built through Hugging Face's own classes, so positions, norms and projections are as the model defines
them (OPT-350M: post-norm, 512-wide embedding; the other OPTs: pre-norm with a final norm; Llama, Mistral and
Qwen: rotary positions, grouped queries, attention windows), without the token embedding. Settings under which
packed rows would give other results than single documents are refused (`require_supported`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from data_prep.common.errors import UserError, counted
from pipeline.config.model_recipe import BACKBONES
from pipeline.data.segments import SegmentLayout
from pipeline.models.attention import HF_ATTENTION
from pipeline.models.folders import KINDS, load_pretrained, model_config, read_config
from pipeline.models.kv_cache import CachedStep, StaticStep

# Packing, causality, cache and gradients of each are tested (tests/helpers/backbone_families.py). A new one
# starts in `BACKBONES`, with its recipe keys.
FAMILIES = tuple(BACKBONES)


def backbone_config(settings: dict) -> PreTrainedConfig:
    """A Hugging Face config from a dict with `model_type` (recipe, saved SLLM config).

    Raises: UserError for a model type or settings that packing does not support.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", "opt")
    if model_type in KINDS:
        raise UserError(f"model.backbone.model_type {model_type}: name a token-level model, for example opt")
    require_family(model_type, "model.backbone")
    config = AutoConfig.for_model(model_type, **settings)
    require_supported(config, "model.backbone")
    return config


def require_family(model_type: str | None, where: str) -> None:
    """Raise UserError for a model type outside `FAMILIES`: position biases, expert routing or recurrent
    states of others would leak from one document into the next."""
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: cannot be loaded for packed training and checks: "
            f"model_type {model_type!r} is not one of {', '.join(FAMILIES)}"
        )


def require_supported(config: PreTrainedConfig, where: str) -> None:
    """Raise UserError for settings under which a packed batch would differ from single documents.

    Rotary positions that rescale with the longest
    input: a document's results would depend on its neighbours. LayerDrop: ranks would call different layers,
    and ZeRO-3 would hang.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if other := next((kind for kind in kinds if kind not in ("full_attention", "sliding_attention")), None):
        raise UserError(
            f"{where}: layers of {other.replace('_', ' ')} are not supported, only those of full and of "
            "sliding attention"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UserError(
            f"{where}: rope_type {rope} depends on the longest input of a batch: "
            "use default, linear, yarn or llama3"
        )
    if getattr(config, "layerdrop", 0):
        raise UserError(f"{where}: layerdrop {config.layerdrop} is not supported: set it to 0 (dropout is)")
    heads = getattr(config, "num_attention_heads", 1)
    if heads % (shared := getattr(config, "num_key_value_heads", None) or heads):
        raise UserError(
            f"{where}: num_key_value_heads {shared} (Qwen's default is 32) does not divide the "
            f"num_attention_heads {heads}: give one that does"
        )


def new_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A randomly initialised backbone without token embedding, in torch's current default dtype (the SLLM's,
    whatever dtype the config was saved with)."""
    dtype = torch.get_default_dtype()
    return without_token_embedding(
        AutoModel.from_config(config, attn_implementation=HF_ATTENTION, dtype=dtype)
    )


def load_backbone(folder: str | Path) -> PreTrainedModel:
    """A pretrained decoder-only model from a local folder, in fp32, without its token embedding and head.

    Raises: UserError when the folder holds no model, one of ours, or one that packing does not support.
    """
    return without_token_embedding(load_packable(AutoModel, folder))


def load_packable(model_class: type, folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """`load_pretrained` (`model_class` is an `AutoModel…`) for a token-level model that will run packed.

    Raises: UserError as `load_backbone`.
    """
    model_type = read_config(folder).get("model_type")
    if model_type in KINDS:
        raise UserError(f"model folder {folder}: holds a {model_type}, not a token-level causal LM")
    require_family(model_type, f"model folder {folder}")
    model = load_pretrained(model_class, folder, attn_implementation=HF_ATTENTION, **kwargs)
    require_supported(model.config, f"model folder {folder}")
    return model


def without_token_embedding(model: PreTrainedModel) -> PreTrainedModel:
    """Drop the token embedding, which an SLLM does not use: no gradient, memory or parameter count."""
    model.set_input_embeddings(None)
    return model


def vector_width(config: PreTrainedConfig) -> int:
    """Width of the vectors that go in and come out (OPT-350M: 512 beside a hidden size of 1024)."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def run_packed(model: nn.Module, layout: SegmentLayout | CachedStep | StaticStep, **inputs: Tensor) -> Tensor:
    """Run a Hugging Face decoder over packed rows: `input_ids` [R] or `inputs_embeds` [R, d] → last hidden
    states [R, d].

    Every segment of the layout is one document window: positions restart, attention stays inside. A cached
    layout (kv_cache.py) also stores keys and values, or continues from stored ones.
    Raises: UserError when a segment is longer than the model's positions; ValueError for a model without our
    attention, which would see across documents.
    """
    config = model_config(model)
    if config._attn_implementation != HF_ATTENTION:
        raise ValueError(f"a packed run needs attn_implementation {HF_ATTENTION!r}")
    limit = getattr(config, "max_position_embeddings", None)
    longest = layout.longest
    if limit is not None and longest > limit:
        raise UserError(
            f"a window of {counted(longest, 'position')} is longer than the model's {limit:,}; "
            "lower window_tokens"
        )
    inputs = {name: value[None] for name, value in inputs.items()}
    positions = layout.position_of_row[None]
    # Hugging Face passes a 4-D mask through. Without one, Llama and Qwen notice that positions restart and
    # build a [rows, rows] mask on every call, which our attention would not read.
    unread = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=positions.device)
    out = model(position_ids=positions, attention_mask=unread, layout=layout, use_cache=False, **inputs)
    return out.last_hidden_state.squeeze(0)
