"""The files of a synthetic training run with known figures."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

STEPS = 40


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, **recipe: object) -> Path:
    """A run of 40 steps of half a second, killed once, with one skipped step."""
    folder.mkdir(parents=True)
    metrics: list[dict] = [
        {
            "step": step,
            "tokens": 1000 * step,
            "loss": 6.0 / step,
            "bits_per_byte": 3.0 / step,
            "tokens_per_second": 1990.0 + step,
            "padding_share": 0.02,
            "data_wait_seconds": 0.005,
            "grad_norm": 1.0 + step,
            "lr": 1e-3,
            "memory_bytes": 10**9 + step,
            "mfu": None,
            "slowest_ratio": 1.1,
            "operations": 5_000_000_000,
            "seconds": 0.5,
            "time": 1e9 + step,
        }
        for step in range(1, STEPS + 1)
    ]
    metrics[16] |= {"skipped": "the loss is <nan>", "loss": None, "bits_per_byte": None, "grad_norm": None}
    metrics[29] |= {"slow": "rank 1 (node7) takes 1.4 times the median rank's time"}
    write_lines(folder / "metrics.jsonl", metrics)
    with open(folder / "metrics.jsonl", "a") as out:
        out.write('{"step": 41, "tok')  # killed during the write
    write_lines(
        folder / "evaluations.jsonl",
        [{"step": step, "bits_per_byte": 3 - step / 20, "seconds": 1.0} for step in (20, 30)],
    )
    write_lines(folder / "saves.jsonl", [{"step": step, "save_seconds": step / 10} for step in (20, 30)])
    start = {"world": 2, "zero_stage": 3, "hosts": 1, "versions": {}}
    again = {"time": 1e9 + 25.5, "step": 20, "lost_steps": 4, "world": 1}
    write_lines(folder / "starts.jsonl", [start | {"time": 1e9, "step": 0, "lost_steps": 0}, start | again])
    settings = {"objective": "sllm", "output_dir": str(folder), "training": {"max_steps": 50}, **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder
