"""Small recipes of any objective."""

from __future__ import annotations

from pathlib import Path

import yaml

VAE = {"hidden_size": 64, "layers": 2, "heads": 4}
BACKBONE = {
    "model_type": "opt",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 256,
    "max_position_embeddings": 600,
    "word_embed_proj_dim": 64,
    "dropout": 0.0,
}


def write_recipe(folder: Path, objective: str = "sllm", name: str = "tiny", **changes) -> Path:
    """A small recipe of any objective; `vae`, `backbone`, `data`, `optimizer` add to its sections."""
    vae, backbone = {**VAE, **changes.get("vae", {})}, {**BACKBONE, **changes.get("backbone", {})}
    model = {"vae": {"vae": vae}, "lm": {"backbone": backbone}, "sllm": {"vae": vae, "backbone": backbone}}
    data = {"shards": ["nowhere"], "window_tokens": 256, "bin_tokens": 1024, **changes.get("data", {})}
    recipe = {
        "objective": objective,
        "output_dir": "runs/tiny",
        "data": data,
        "model": model[objective],
        "optimizer": changes.get("optimizer", {}),
        "training": {"max_steps": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
