"""Hugging Face model folders → models: the only loader of weights from outside.

Safetensors only (nothing is unpickled), local files only, no remote code, fp32 on the CPU. Weights that do
not match the config are refused: transformers would fill them with random values, and the model would still
"evaluate".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from data_prep.common.errors import UserError, first_line
from data_prep.common.files import read_json
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

# Progress bars of loading and saving weights would break up logs.
logging.disable_progress_bar()
# How text is cut for a model that does not say it.
DEFAULT_SENTENCES = {"segmenter": "clause", "language": "auto", "max_tokens": 64}
# Our model types; every other one is a token-level causal LM.
KINDS = {"sentence_vae": "vae", "sllm": "sllm", "sllm_stack": "sllm", "sllm_anchors": "lm"}


def read_config(folder: str | Path) -> dict:
    """`config.json` of a model folder. Raises: UserError when there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        fault = ": no config.json there" if path.parent.is_dir() else " does not exist"
        raise UserError(f"model folder {folder}{fault}; give one made by `sllm export` or save_pretrained")
    return read_json(path)


def load_pretrained(
    model_class: Any, folder: str | Path, strict: bool = False, where: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained(folder)` with every weight of the model found in the folder.

    Args:
        model_class: a model class or an `AutoModel…`.
        strict: also refuse weights that the model does not have (our own folders); otherwise they are
            ignored (the head of a causal LM that becomes a backbone).
        where: what errors name, for a file in the folder that holds its own config (`gguf_file`).
    Raises: UserError for a folder without a loadable model.
    """
    if where is None:
        read_config(folder)
        where = f"model folder {folder}"
    settings = {"use_safetensors": True, **kwargs}
    # Weights that do not match are refused in one line; transformers prints a table of them.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed, and refused below by name
            **settings,
        )
    except UserError:
        raise
    except Exception as error:  # safetensors, transformers, torch and each architecture raise other types
        raise UserError(f"{where}: cannot be loaded ({first_line(error)})") from None
    finally:
        logging.set_verbosity(level)
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    wrong += info["unexpected_keys"] if strict else []
    if wrong:
        raise UserError(f"{where}: weights do not match its config (first: {sorted(wrong)[0]})")
    return model.eval()


def model_kind(model: nn.Module) -> str:
    """`vae`, `sllm` or `lm`."""
    return KINDS.get(model_config(model).model_type, "lm")


def model_config(model: nn.Module) -> Any:
    """The config of a model of any kind; `nn.Module` declares none."""
    return model.config


def load_model_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `FOLDER/tokenizer/`, else in the folder itself (a plain Hugging Face model)."""
    inner = Path(folder) / "tokenizer"
    return load_tokenizer(inner if inner.is_dir() else folder)


def parameter_count(model: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(p.numel() for p in model.parameters())
