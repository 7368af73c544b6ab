"""Small GGUF files, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from transformers import PreTrainedModel

from pipeline.costs.engines import add_sizes

ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}
NORMAL, CONTROL = 1, 3


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: Path | None, **changes) -> Path:
    """`model` with the tokenizer.json of a folder. changes: `architecture`, `kind`, `pre` or other metadata
    by name; None leaves one out."""
    config = model.config
    name = changes.pop("architecture", config.model_type)
    writer = GGUFWriter(path, name)
    add_sizes(writer, config)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if tokenizer is not None:
        _write_tokenizer(writer, json.loads((tokenizer / "tokenizer.json").read_text()), changes)
    for key, value in changes.items():
        writer.add_string(key.replace("__", "."), value)
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        if config.model_type == "llama":
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            for part, count in heads.items():
                weight = _interleaved(weight, count) if part in key else weight
        base, dot, suffix = key.rpartition(".")
        writer.add_tensor(names.get_name(base) + dot + suffix, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: GGUFWriter, spec: dict, changes: dict) -> None:
    vocabulary = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model(changes.pop("kind", "gpt2"))
    if (pre := changes.pop("pre", "gpt-2")) is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    merges = spec["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(vocabulary["</s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    writer.add_pad_token_id(vocabulary["<pad>"])


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order of rotary pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
