"""Small training runs: recipes, command lines and records, shared by the tests that train."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from helpers.paths import STRATEGIES

VAE = {"hidden_size": 32, "layers": 1, "heads": 4}
BACKBONE = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 512,
    "dropout": 0.0,
}
STACK = {
    "layout": "stack",
    "memory": 2,
    "tokens": {"hidden_size": 32, "heads": 4, "attention_window": 12},
    "backbone": BACKBONE,
}
ANCHORS = {
    "layout": "anchors",
    "ends": "rule",
    "anchors": {"attention_window": 12, "first_tokens": 2, "per_sentence": 2},
    "backbone": BACKBONE,
}
MODELS = {"vae": {"vae": VAE}, "sllm": {"vae": VAE, "backbone": BACKBONE}, "lm": {"backbone": BACKBONE}}


def write_recipes(folder: Path, shards: Path, validation: Path) -> None:
    """vae.yaml, sllm.yaml, lm.yaml, stack.yaml and anchors.yaml: six steps of three bins, which two ranks
    share unequally."""
    layouts = {"stack": "sllm", "anchors": "lm"}
    for objective, model in {**MODELS, "stack": STACK, "anchors": ANCHORS}.items():
        recipe = {
            "objective": layouts.get(objective, objective),
            "output_dir": "set by every test",
            "data": {
                "shards": [str(shards)],
                "validation": str(validation),
                "window_tokens": 128,
                "bin_tokens": 256,
                "bins_per_step": 3,
            },
            "model": model,
            "optimizer": {"lr": 5.0e-3},
            "training": {"max_steps": 6, "eval_every": 4, "eval_bins": 3, "save_every": 4},
            "log": {"tensorboard": False},
        }
        (folder / f"{objective}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def arguments(recipes: Path, objective: str, strategy: str, run: Path, *overrides: object) -> list[str]:
    """Command line of a run. `strategy`: names of DeepSpeed configs, separated by spaces."""
    config = ["--config", str(recipes / f"{objective}.yaml"), "--output_dir", str(run), "--deepspeed_config"]
    config += [str(STRATEGIES / f"{name}.json") for name in strategy.split()]
    return config + [str(one) for one in overrides]


def records(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]
