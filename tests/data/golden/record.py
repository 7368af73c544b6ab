"""Record the golden figures and artifacts of this folder, by command lines only.

The records in this folder were made at commit d2dd794; those of the train shards (shards.json) again with
version 3 of the segmenter's rules, which cut two documents otherwise (test_golden.py names them). Run it at
any commit to compare to the last digit on one machine; an issue that changes a record says which one and why.

    python tests/data/golden/record.py OUTPUT [--artifacts]

Args: OUTPUT is a new folder; `--artifacts` also copies what `test_golden.py` opens: shards, checkpoints and
model folders.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
SCRIPTS = Path(sys.executable).parent
STEPS, CUT = 30, 20  # steps of a run; the step of the checkpoint that is kept as an artifact
VOCABULARY = 448

VAE = {"hidden_size": 16, "layers": 1, "heads": 2}
BACKBONE = {
    "model_type": "opt",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
MODELS = {"vae": {"vae": VAE}, "sllm": {"vae": VAE, "backbone": BACKBONE}, "lm": {"backbone": BACKBONE}}
LONGER = ("--training.max_steps", 1500, "--training.eval_every", 1500, "--training.save_every", 1500)
WRITING = {"greedy": ("--temperature", "0"), "sampled": ("--temperature", "0.8", "--seed", "7")}


def write_recipe(folder: Path, objective: str) -> Path:
    """Write the recipe of one golden run; every path is given on the command line."""
    recipe = {
        "objective": objective,
        "output_dir": "given on the command line",
        "data": {
            "shards": ["given on the command line"],
            "window_tokens": 128,
            "bin_tokens": 256,
            "bins_per_step": 3,
        },
        "model": MODELS[objective],
        "optimizer": {"lr": 5.0e-3},
        "training": {"max_steps": STEPS, "eval_every": 10, "eval_bins": 4, "save_every": CUT, "keep": 9},
        "log": {"tensorboard": False},
    }
    path = folder / f"{objective}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(folder: Path, *command: object, ranks: int = 1) -> str:
    """Run one command in `folder`, in `ranks` processes; the standard output of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [*map(str, command)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"failed: {' '.join(map(str, command))}\n{outputs[0]}")
    return outputs[0]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cut_run(folder: Path) -> None:
    """Leave a run as if it had been stopped after step CUT."""
    checkpoints, cut = folder / "checkpoints", f"step-{CUT:08d}"
    for path in checkpoints.iterdir():
        if path.is_file():
            path.write_text(cut + "\n")
        elif path.name != cut:
            shutil.rmtree(path)
    for name in ("metrics", "evaluations", "saves"):
        path = folder / f"{name}.jsonl"
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= CUT]
        path.write_text("".join(line + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--artifacts", action="store_true", help="also copy shards, checkpoints and models")
    arguments = parser.parse_args()
    out = arguments.output.resolve()
    out.mkdir(parents=True)
    work = out / "work"  # every command runs here, so that records hold no path of the machine
    work.mkdir()
    data_prep, sllm = SCRIPTS / "data-prep", SCRIPTS / "sllm"

    train_text, valid_text = HERE / "corpus" / "train.jsonl.gz", HERE / "corpus" / "valid.jsonl.gz"
    tokenizer = HERE / "tokenizer"
    if not tokenizer.exists():  # only the very first recording trains one
        made = (
            "--input",
            train_text,
            "--output",
            "tokenizer",
            "--vocab-size",
            VOCABULARY,
            "--keep-lang",
            "en",
        )
        run(work, data_prep, "tokenizer", *made)
        tokenizer = work / "tokenizer"
    shards = {}
    for segmenter in ("clause", "sentence"):
        for name, text in (("train", train_text), ("valid", valid_text)):
            folder = f"shards/{segmenter}-{name}"
            made = ("--input", text, "--output", folder, "--tokenizer", tokenizer, "--segmenter", segmenter)
            run(work, data_prep, "shard", *made, "--unit-mb", "1", "--shard-mb", "1")
            shards[f"{segmenter}-{name}"] = digests(work / folder)
    (out / "shards.json").write_text(json.dumps(shards, indent=1) + "\n")

    def train(objective: str, folder: str, strategy: str, ranks: int, *more: object) -> None:
        recipe = write_recipe(work, objective)
        config = ("--config", recipe.name, "--deepspeed_config", REPOSITORY / "ds_configs" / strategy)
        data = ("--data.shards", "shards/clause-train", "--data.validation", "shards/clause-valid")
        script = REPOSITORY / "pipeline" / "train.py"
        run(work, sys.executable, script, *config, "--output_dir", folder, *data, *more, ranks=ranks)

    steps, evaluations, texts = {}, {}, {}
    for objective in MODELS:
        train(objective, f"runs/{objective}", "zero3.json", 2)
        lines = (work / "runs" / objective / "metrics.jsonl").read_text().splitlines()
        keys = ("loss", "grad_norm", "bits_per_byte", "bins_digest")
        steps[objective] = [{key: json.loads(line)[key] for key in keys} for line in lines]
        source, model = f"runs/{objective}", f"models/{objective}"
        if objective == "sllm":  # trained for longer, so that its texts are no single symbol
            source = "runs/sllm-long"
            train(objective, source, "zero0.json", 1, *LONGER)
        run(work, sllm, "export", source, "--output", model, "--which", "last")
        scored = json.loads(run(work, sllm, "evaluate", "--model", model, "--text", valid_text, "--json"))
        keys = ("bits_per_byte", "nll_nats", "tokens", "bytes", "bits_per_byte_interval", "vector_gain")
        evaluations[objective] = {key: scored[key] for key in keys if key in scored}
    for prompt in ("", "The shards are", "A run that "):
        for name, how in WRITING.items():
            asked = ("--model", "models/sllm", "--prompt", prompt, *how, "--max-sentences", "8", "--json")
            written = json.loads(run(work, sllm, "generate", *asked))
            keys = ("text", "sentences", "tokens", "stopped")
            texts[f"{name}: {prompt}"] = {key: written[key] for key in keys}
    (out / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")
    (out / "evaluations.json").write_text(json.dumps(evaluations, indent=1) + "\n")
    (out / "texts.json").write_text(json.dumps(texts, indent=1) + "\n")

    if arguments.artifacts:
        if not (HERE / "tokenizer").exists():
            shutil.copytree(tokenizer, out / "tokenizer")
        for name in ("clause-train", "clause-valid"):
            shutil.copytree(work / "shards" / name, out / "artifacts" / "shards" / name)
        for objective in MODELS:
            kept = out / "artifacts" / "runs" / objective
            shutil.copytree(work / "runs" / objective, kept)
            cut_run(kept)
            shutil.copytree(work / "models" / objective, out / "artifacts" / "models" / objective)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
