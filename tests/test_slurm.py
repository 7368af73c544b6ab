"""The Slurm templates, run by a real Slurm of two nodes on this machine (tests/slurm_cluster.py)."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import data_prep
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

PROJECT = Path(__file__).resolve().parent.parent
STEPS = 60

RECIPE = {
    "objective": "sllm",
    "seed": 1,
    "data": {"window_tokens": 128, "bin_tokens": 256, "bins_per_step": 2},
    "model": {
        "vae": {"hidden_size": 32, "layers": 1, "heads": 2, "ffn_size": 64},
        "backbone": {
            "model_type": "opt",
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "max_position_embeddings": 136,
        },
    },
    "optimizer": {"lr": 1e-3},
    "training": {"max_steps": STEPS, "eval_every": STEPS, "eval_bins": 2, "save_every": STEPS, "keep": 1},
    "log": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=1) as running:
        # The templates' way to find Python: here it is the environment that runs the tests.
        running.environment |= {"VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        yield running


def submit(cluster: SlurmCluster, log: Path, *arguments: str | Path) -> str:
    """sbatch from the project's folder; the job's number."""
    command = ["sbatch", "--parsable", f"--output={log}", *map(str, arguments)]
    return cluster.run(*command, cwd=PROJECT).stdout.strip()


def read_log(cluster: SlurmCluster, log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else cluster.log_tails()


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of JSON objects that may still be written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_cluster_has_two_nodes_of_its_own(cluster: SlurmCluster) -> None:
    assert sorted(cluster.run("srun", "-N2", "hostname").stdout.split()) == ["node1", "node2"]
    assert Path("/proc/sys/kernel/hostname").read_text().strip() not in ("node1", "node2")


def test_failed_job_says_so(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "fails.sh"
    script.write_text("#!/bin/bash\nsrun bash -c 'echo here; exit 3'\n")
    record = cluster.wait_for_job(submit(cluster, tmp_path / "log", script))
    log = read_log(cluster, tmp_path / "log")
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "3:0"), log
    assert "here" in log


def test_prepare_data_by_an_array_of_tasks(
    cluster: SlurmCluster, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Three tasks on two nodes, one of them killed in the middle: the bytes of a single process."""
    cluster.environment |= {"INPUT": str(tiny_corpus / "train.jsonl"), "TOKENIZER": str(tiny_tokenizer)}
    cluster.environment |= {"OUTPUT": str(tmp_path / "shards"), "TEXT_LANGUAGE": "en"}
    more = ("--unit-mb", "0.01", "--shard-documents", "20")
    log = tmp_path / "log-%a"
    array = ("--array=0-2", "--cpus-per-task=1", "slurm/prepare_data.sh")
    job_id = submit(cluster, log, *array, *more)
    unfinished = tmp_path / "shards/.unfinished"
    while not list(unfinished.glob("claims/shard-*")):
        assert cluster.job(job_id)["JobState"] in ("PENDING", "RUNNING"), read_log(
            cluster, tmp_path / "log-0"
        )
        time.sleep(0.02)
    cluster.run("scancel", "--signal=KILL", f"{job_id}_1")
    states = {task: cluster.wait_for_job(f"{job_id}_{task}")["JobState"] for task in (0, 2)}
    assert set(states.values()) == {"COMPLETED"}, read_log(cluster, tmp_path / "log-0")
    assert "shards with" in read_log(cluster, tmp_path / "log-0")  # the first task has verified them
    data_prep(
        *("shard", "--input", tiny_corpus / "train.jsonl", "--tokenizer", tiny_tokenizer, "--lang", "en"),
        *("--output", tmp_path / "alone", *more),
    )
    files = sorted(p.relative_to(tmp_path / "alone") for p in (tmp_path / "alone").rglob("*") if p.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "shards") for p in (tmp_path / "shards").rglob("*") if p.is_file()
    )
    for name in files:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shards" / name).read_bytes(), name


def test_train_sllm_on_two_nodes_stopped_and_requeued(
    cluster: SlurmCluster, tiny_shards: Path, tiny_valid_shards: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = RECIPE | {"output_dir": str(run)}
    recipe["data"] = recipe["data"] | {"shards": [str(tiny_shards)], "validation": str(tiny_valid_shards)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cluster.environment |= {"CONFIG": str(tmp_path / "recipe.yaml"), "DS_CONFIG": "ds_configs/zero3.json"}
    cluster.environment |= {"DS_ACCELERATOR": "cpu"}

    size = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
    job_id = submit(cluster, log, *size, "slurm/train_sllm.sh", "--seed", "2")
    while len(read_lines(run / "metrics.jsonl")) < 3:
        assert cluster.job(job_id)["JobState"] in ("PENDING", "RUNNING"), read_log(cluster, log)
        time.sleep(0.2)
    cluster.run("scancel", "--signal=USR1", job_id)  # what Slurm does by itself when the time is nearly up

    record = cluster.wait_for_job(job_id)
    assert record["JobState"] == "COMPLETED", read_log(cluster, log)
    assert record["NodeList"] == "node[1-2]"
    assert record["Restarts"] == "1", read_log(cluster, log)

    metrics = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    # An untrained model of 512 entries starts near ln 512 nats: no rank's share is missing or doubled.
    assert abs(metrics[0]["loss"] - math.log(512)) < 1.0
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    latest = (run / "checkpoints" / "latest").read_text().strip()
    meta = json.loads((run / "checkpoints" / latest / "meta.json").read_text())
    assert meta["world"] == 2
    assert meta["step"] == STEPS
    assert yaml.safe_load((run / "recipe.yaml").read_text())["seed"] == 2
