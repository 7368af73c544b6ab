"""Building, saving and loading any of the three kinds of model.

`build_model` makes what a recipe asks for (the trainer); `save_model` and `load_model` move a model through
a folder in safetensors with its config and, in `FOLDER/tokenizer/`, the tokenizer (export, evaluate,
generate, check). Nothing is unpickled and no remote code runs.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer, load_tokenizer
from pipeline.attention import HF_ATTENTION
from pipeline.backbone import backbone_config, load_backbone
from pipeline.sentence_vae import SentenceVAE, SentenceVAEConfig
from pipeline.sllm import SLLM, SLLMConfig
from pipeline.token_lm import TokenLM

# Bars for loading and writing weights would break up logs; our own commands say what they do.
disable_progress_bar()

KINDS = {"sentence_vae": "vae", "sllm": "sllm"}  # every other model_type is a token-level causal LM


def model_kind(model: nn.Module) -> str:
    """`vae`, `sllm` or `lm`."""
    return KINDS.get(model.config.model_type, "lm")


def _text_keys(tokenizer: Tokenizer, sentence_settings: dict, window_tokens: int) -> dict:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "sentence_settings": sentence_settings,
        "window_tokens": window_tokens,
    }


def _vae_config(settings: dict, text: dict, tokenizer: Tokenizer) -> SentenceVAEConfig:
    settings = {"vocab_size": tokenizer.vocab_size, **{k: v for k, v in settings.items() if v is not None}}
    if settings["vocab_size"] < tokenizer.vocab_size:
        raise UserError(
            f"model.vae.vocab_size is {settings['vocab_size']}, but the shards' tokenizer has "
            f"{tokenizer.vocab_size} entries"
        )
    settings.setdefault("max_sentence_tokens", text["sentence_settings"].get("max_tokens", 64))
    try:
        return SentenceVAEConfig(**settings, **text)
    except ValueError as error:
        raise UserError(f"model.vae: {error}") from None


def build_model(
    objective: str,
    vae: dict,
    backbone: dict,
    tokenizer: Tokenizer,
    sentence_settings: dict,
    window_tokens: int,
    focal_gamma: float = 0.0,
) -> nn.Module:
    """A new model for one training run, fp32 on the CPU.

    Args:
        objective: `vae`, `sllm` or `lm`.
        vae: `SentenceVAEConfig` keys, or `{"path": FOLDER}` of a trained SentenceVAE (`sllm`).
        backbone: Hugging Face config keys with `model_type`, or `{"path": FOLDER}` (`sllm`, `lm`).
        tokenizer: the shards' tokenizer; gives vocabulary size and special ids.
        sentence_settings: how the shards were cut (`segmenter`, `language`, `max_tokens`); kept in the
            model's config.
        window_tokens: longest window, kept in the config; must fit the backbone's positions.
        focal_gamma: 0 trains on cross-entropy.
    Raises: UserError for settings that do not fit together.
    """
    text = _text_keys(tokenizer, sentence_settings, window_tokens)
    if objective == "vae":
        return SentenceVAE(_vae_config({**vae, "focal_gamma": focal_gamma}, text, tokenizer))
    if objective == "lm":
        return TokenLM(_build_causal_lm(backbone, text, tokenizer), focal_gamma)

    trained_vae = loaded_backbone = None
    if vae.get("path"):
        trained_vae = load_model(vae["path"])
        if model_kind(trained_vae) != "vae":
            raise UserError(
                f"model.vae.path {vae['path']}: holds a {trained_vae.config.model_type}, not a sentence_vae"
            )
        _same_tokenizer(vae["path"], tokenizer)
        vae_config = trained_vae.config
        vae_config.focal_gamma = focal_gamma
    else:
        vae_config = _vae_config({**vae, "focal_gamma": focal_gamma}, text, tokenizer)
    if backbone.get("path"):
        loaded_backbone = load_backbone(backbone["path"])
        config = loaded_backbone.config
    else:
        config = backbone_config(backbone)
    model = SLLM(SLLMConfig(vae_config, config, **text))
    if trained_vae is not None:
        model.vae.load_state_dict(trained_vae.state_dict())
    if loaded_backbone is not None:
        model.backbone.load_state_dict(loaded_backbone.state_dict())
    return model


def _build_causal_lm(backbone: dict, text: dict, tokenizer: Tokenizer) -> nn.Module:
    if backbone.get("path"):
        model = _load_causal_lm(Path(backbone["path"]))
        if model.config.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"model.backbone.path {backbone['path']}: vocabulary of {model.config.vocab_size}, but "
                f"the shards' tokenizer has {tokenizer.vocab_size} entries"
            )
    else:
        config = backbone_config(
            {**backbone, "vocab_size": backbone.get("vocab_size") or tokenizer.vocab_size}
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=HF_ATTENTION)
    for key, value in text.items():
        setattr(model.config, key, value)
    return model


def _same_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    if load_tokenizer(Path(folder) / "tokenizer").fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder}: was trained with another tokenizer than the one that made the shards")


def _load_causal_lm(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation=HF_ATTENTION,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )


def save_model(model: nn.Module, folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write safetensors, config.json and tokenizer/ (a `TokenLM` as the Hugging Face model it wraps)."""
    inner = model.model if isinstance(model, TokenLM) else model
    inner.save_pretrained(folder)
    tokenizer.save(Path(folder) / "tokenizer")


def read_config(folder: str | Path) -> dict:
    """`config.json` of a model folder. Raises: UserError when there is none."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model folder {folder}: no config.json there; give a folder made by `sllm export`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def load_model(folder: str | Path) -> nn.Module:
    """Any model folder as a `SentenceVAE`, `SLLM` or `TokenLM` (any Hugging Face causal LM), fp32, CPU, in
    eval mode.

    Raises: UserError for a folder without a loadable model, or whose weights do not match its config.
    """
    folder = Path(folder)
    kind = KINDS.get(read_config(folder).get("model_type"), "lm")
    try:
        if kind == "lm":
            return TokenLM(_load_causal_lm(folder)).eval()
        model_class = SentenceVAE if kind == "vae" else SLLM
        model, info = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # safetensors, transformers and torch each raise their own kinds for damaged files
        logging.getLogger(__name__).debug("loading %s failed", folder, exc_info=True)
        raise UserError(f"model folder {folder}: cannot be loaded ({str(error).splitlines()[0]})") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if wrong:
        raise UserError(f"model folder {folder}: weights do not match its config (first: {wrong[0]})")
    return model.eval()


def load_model_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: `FOLDER/tokenizer/`, else the folder itself (a plain Hugging Face
    model)."""
    inner = Path(folder) / "tokenizer"
    return load_tokenizer(inner if inner.is_dir() else folder)


def parameter_count(model: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(p.numel() for p in model.parameters())
