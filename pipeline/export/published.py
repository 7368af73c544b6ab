"""Checkpoints of the paper's own code (github.com/BestAnHongjun/SentenceVAE) as models of `layout: paper`.

Their names and shapes are mapped as docs/reproduction.md lists them. Three values differ:

- token embeddings are divided by √width, by which `layout: paper` multiplies them before it adds positions;
- the stop head's rows change places: theirs are (stop, continue), ours (continue, stop);
- the start vector, which they lack, is zero: their embedding of a masked sentence.

With `published_inputs` the model reads what theirs reads: a BOS before each encoded sentence, and a backbone
whose first position is the first sentence. That sentence itself is predicted from the start vector alone.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_prep.common.errors import UserError, first_line
from data_prep.text.tokenizer import load_tokenizer
from pipeline.config.model_recipe import OptRecipe
from pipeline.export.model_folder import require_replaceable, write_folder
from pipeline.models.backbone import backbone_config
from pipeline.models.folders import read_config
from pipeline.models.sentence_vae import SentenceVAE, SentenceVAEConfig
from pipeline.models.sllm import SLLM, SLLMConfig
from pipeline.training.warm_start import fill

LONGEST = 63  # tokens of a sentence: they read 64 symbols, BOS included

# Patterns of names in a SentenceVAE, in turn; `svae.` stands before them in an SLLM.
_LAYERS = (
    (r"self_attn\.in_proj_", "attention.qkv."),
    (r"self_attn\.out_proj\.", "attention.out."),
    (r"multihead_attn\.in_proj_", "condition.qkv."),
    (r"multihead_attn\.out_proj\.", "condition.out."),
    (r"linear1\.", "ffn_in."),
    (r"linear2\.", "ffn_out."),
    (r"norm1\.", "attention_norm."),
)
_VAE = (
    (r"^(encoder|decoder)\.embed_token\.", r"\1.embedding.token."),
    (r"^(encoder|decoder)\.project_in\.", r"\1.embedding.project."),
    (r"^encoder\.lnorm\.", "encoder.fusion_norm."),
    (r"^decoder\.linear\.", "head."),
    (r"^(encoder|decoder)\.\1\.layers\.", r"\1.layers."),
    (r"^(encoder\.layers\.\d+\.)norm2\.", r"\1ffn_norm."),
    (r"^(decoder\.layers\.\d+\.)norm2\.", r"\1condition_norm."),
    (r"^(decoder\.layers\.\d+\.)norm3\.", r"\1ffn_norm."),
    *((rf"^((?:encoder|decoder)\.layers\.\d+\.){theirs}", rf"\1{ours}") for theirs, ours in _LAYERS),
)
_SLLM = (
    (r"^llm_pe\.", "backbone.decoder.embed_positions."),
    (r"^llm_layers\.", "backbone.decoder.layers."),
    (r"^fc\.", "stop_head."),
)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a file of torch, in which nothing but tensors is unpickled.

    Raises: UserError for a file that is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, SafetensorError, OSError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read as tensors alone ({first_line(error)}): save its state_dict "
            "as safetensors, or by torch.save without anything else"
        ) from None
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"checkpoint {path} holds no state_dict of tensors")
    return dict(found)


def renamed(name: str) -> str:
    """Our name of one of their parameters."""
    inner = name.removeprefix("svae.")
    is_vae = inner != name or name.startswith(("encoder.", "decoder."))
    for pattern, ours in _VAE if is_vae else _SLLM:
        inner = re.sub(pattern, ours, inner)
    return f"vae.{inner}" if name.startswith("svae.") else inner


def load_published(path: str | Path, opt: str | Path) -> SentenceVAE | SLLM:
    """A model with the weights of one of their checkpoints, in fp32 and eval mode.

    Args:
        path: checkpoint of their SentenceVAE or SLLM.
        opt: the folder of the OPT that they were trained with (`ref_model_dir`): its config.json has the
            heads, the norms and the special symbols, which weights do not tell.
    Raises: UserError for a file that is none of theirs, or does not fit to that OPT.
    """
    theirs, where = read_checkpoint(path), f"checkpoint {path}"
    if other := next((name for name in theirs if re.search(r"(^|\.)encoder\.la\.", name)), None):
        raise UserError(f"{where}: {other}: has a learned fusion (learnable_add), layout paper only the sum")
    weights = {renamed(name): value.float() for name, value in theirs.items()}
    model = _empty(weights, read_config(opt), f"{where} with {opt}")
    vae = model.vae if isinstance(model, SLLM) else model
    prefix = "vae." if isinstance(model, SLLM) else ""
    for part in ("encoder", "decoder"):
        name = f"{prefix}{part}.embedding.token.weight"
        if name in weights:
            weights[name] = weights[name] / math.sqrt(vae.config.hidden_size)
    if isinstance(model, SLLM):
        weights["start.weight"] = torch.zeros_like(model.start.weight)
        for name in ("stop_head.weight", "stop_head.bias"):
            if name in weights:
                weights[name] = weights[name].flip(0)
    fill(model, {name: value.shape for name, value in weights.items()}, weights.__getitem__, where)
    return model.eval()


def _empty(weights: dict[str, Tensor], opt: dict[str, Any], where: str) -> SentenceVAE | SLLM:
    """A model of the checkpoint's layers and of OPT's other sizes."""
    if opt.get("model_type") != "opt":
        raise UserError(f"{where}: that folder's model_type is {opt.get('model_type')}, not opt")

    def layers(names: str) -> int:
        numbers = [int(found[1]) for name in weights if (found := re.match(rf"{names}\.(\d+)\.", name))]
        return max(numbers, default=-1) + 1

    depth = layers(r"(?:vae\.)?decoder\.layers")
    if not depth:
        raise UserError(f"{where}: no layers of a decoder: neither their SentenceVAE nor their SLLM")
    text: dict[str, Any] = {
        key: opt[key] for key in ("bos_token_id", "pad_token_id", "eos_token_id") if key in opt
    }
    text["sentence_settings"] = {"segmenter": "clause", "language": "auto", "max_tokens": LONGEST}
    vae = SentenceVAEConfig(
        hidden_size=opt["hidden_size"],
        embedding_size=opt.get("word_embed_proj_dim"),
        layers=depth,
        encoder_layers=layers(r"(?:vae\.)?encoder\.layers") or depth,
        heads=opt["num_attention_heads"],
        vocab_size=opt["vocab_size"],
        max_sentence_tokens=LONGEST,
        dropout=opt.get("dropout", 0.1),
        layout="paper",
        published_inputs=True,
        **text,
    )
    if not any(name.startswith("vae.") for name in weights):
        return SentenceVAE(vae)
    sizes = {key: opt[key] for key in OptRecipe.model_fields if opt.get(key) is not None}
    backbone = backbone_config({**sizes, "num_hidden_layers": layers(r"backbone\.decoder\.layers")})
    return SLLM(SLLMConfig(vae, backbone, **text))


def import_published(path: str | Path, opt: str | Path, output: str | Path) -> SentenceVAE | SLLM:
    """Write a checkpoint as a model folder, with the tokenizer of the OPT's folder.

    Raises: UserError as `load_published`, and for an output that is not ours.
    """
    output = Path(output)
    require_replaceable(output)
    tokenizer, model = load_tokenizer(opt), load_published(path, opt)
    origin = {"run_dir": None, "checkpoint": str(path), "recipe": None, "imported_with": str(opt)}
    write_folder(model, tokenizer, output, origin)
    return model
