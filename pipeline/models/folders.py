"""Hugging Face model folders → models: the one place where weights from outside come in.

Safetensors only (nothing is unpickled), local files only, no remote code, fp32 on the CPU; weights that do
not match the config are refused, because a model that was silently filled up with random weights would still
"evaluate". Called by `model_io.py`, `backbone.py` and `plain_lm.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from data_prep.common.errors import UserError, first_line
from data_prep.common.files import read_json
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

# Bars for loading and writing weights would break up logs; our own commands say what they do.
disable_progress_bar()
KINDS = {"sentence_vae": "vae", "sllm": "sllm"}  # our model types; every other one is a token-level causal LM


def read_config(folder: str | Path) -> dict:
    """`config.json` of a model folder. Raises: UserError when there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"model folder {folder}: no config.json there; give one made by `sllm export` or save_pretrained"
        )
    return read_json(path)


def load_pretrained(
    model_class: type, folder: str | Path, strict: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained(folder)` with every weight of the model found in the folder.

    Args:
        model_class: a model class or an `AutoModel…`.
        strict: also refuse weights that the model does not have (our own folders); otherwise they are left
            out (the head of a causal LM that becomes a backbone).
    Raises: UserError for a folder without a loadable model.
    """
    read_config(folder)
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed then, and refused below with a name
            **kwargs,
        )
    except UserError:
        raise
    except (
        Exception
    ) as error:  # safetensors, transformers, torch and every architecture raise their own kinds
        raise UserError(f"model folder {folder}: cannot be loaded ({first_line(error)})") from None
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    wrong += info["unexpected_keys"] if strict else []
    if wrong:
        raise UserError(f"model folder {folder}: weights do not match its config (first: {sorted(wrong)[0]})")
    return model.eval()


def model_kind(model: nn.Module) -> str:
    """`vae`, `sllm` or `lm`."""
    return KINDS.get(model.config.model_type, "lm")


def load_model_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: `FOLDER/tokenizer/`, else the folder itself (a plain Hugging Face
    model)."""
    inner = Path(folder) / "tokenizer"
    return load_tokenizer(inner if inner.is_dir() else folder)


def parameter_count(model: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(p.numel() for p in model.parameters())
