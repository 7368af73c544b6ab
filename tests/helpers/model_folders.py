"""Small untrained model folders of all kinds, with the tests' tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from pipeline.models.factory import build_model, save_model

SETTINGS = {"segmenter": "clause", "language": "en", "max_tokens": 64}
VAE = {"hidden_size": 32, "layers": 1, "heads": 4, "ffn_size": 64}
BACKBONE = {
    "model_type": "opt",
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 300,
    "dropout": 0.0,
}
STACK = {"hidden_size": 32, "heads": 4, "attention_window": 9, "memory": 3}
WINDOW_TOKENS = 200


def small_model(
    objective: str,
    tokenizer: Tokenizer,
    seed: int = 0,
    noise: float = 0.15,
    vae: dict | None = None,
    stack: dict | None = None,
    **settings,
) -> torch.nn.Module:
    """A model of `vae`, `sllm` or `lm` with weights large enough that every path has an effect."""
    torch.manual_seed(seed)
    model = build_model(
        objective,
        {} if stack else {**VAE, **(vae or {})},
        BACKBONE,
        tokenizer,
        {**SETTINGS, **settings},
        WINDOW_TOKENS,
        stack=stack,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model.eval()


def save(model: torch.nn.Module, folder: Path, tokenizer: Path | Tokenizer) -> str:
    """Save as `sllm export` does; returns the folder as the command line takes it."""
    save_model(model, folder, tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer))
    return str(folder)


def save_endless(folder: Path, tokenizer: Path) -> str:
    """A small SLLM whose documents do not end."""
    loaded = load_tokenizer(tokenizer)
    model = small_model("sllm", loaded)
    torch.nn.init.constant_(model.stop_head.bias, -40.0)
    return save(model, folder, loaded)


def write_jsonl(path: Path, texts: list[str]) -> str:
    """WanJuan documents."""
    lines = [json.dumps({"id": str(n), "content": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)
