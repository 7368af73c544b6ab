"""The Slurm templates, unmodified, by a real Slurm of four nodes here (tests/helpers/slurm_cluster.py).

One chain of jobs lives through every event of a job's life: a killed rank, a signal, preemption and the time
limit in its SentenceVAE on two nodes (a start of four costs twice as much here), the death of a node in its
SLLM on four.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers.data_prep_command import contents, data_prep
from helpers.paths import REPOSITORY
from helpers.slurm_cluster import SlurmCluster

LONG = 100_000  # steps; a test shortens the run once enough has happened to it
SAVE_EVERY = 5
VAE = {"hidden_size": 32, "layers": 1, "heads": 2, "ffn_size": 64}
BACKBONE = {
    "model_type": "opt",
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "max_position_embeddings": 136,
}
RECIPE = {
    "seed": 1,
    "data": {"window_tokens": 128, "bin_tokens": 256, "bins_per_step": 4},
    "optimizer": {"lr": 1e-3},
    "training": {"max_steps": LONG, "eval_every": LONG, "eval_bins": 2, "save_every": SAVE_EVERY, "keep": 2},
    "log": {"tensorboard": False},
}


ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

slurm = pytest.mark.slurm


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=4) as running:
        running.environment |= {"VENV": sys.prefix, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        yield running
    require_nothing_left(running.folder)


@pytest.fixture
def cluster(booted: SlurmCluster, project: Path) -> Iterator[SlurmCluster]:
    """The cluster, with an environment that later tests do not see, and `LOGS` in the test's own folder."""
    before = dict(booted.environment)
    booted.environment["LOGS"] = str(project / "logs")
    yield booted
    booted.environment.clear()
    booted.environment |= before


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The folder to submit from: as the project's, but logs lie in the test's own."""
    folder = tmp_path / "project"
    (folder / "logs").mkdir(parents=True)
    for name in ("slurm", "pipeline", "data_prep", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def submit(cluster: SlurmCluster, project: Path, *arguments: str | Path) -> str:
    """sbatch from the project's folder; the job's number."""
    return cluster.run("sbatch", "--parsable", *map(str, arguments), cwd=project).stdout.strip()


def all_logs(cluster: SlurmCluster, project: Path) -> str:
    """Every log of the jobs so far, for error messages too."""
    texts = [f"--- {p.name}\n{p.read_text(errors='replace')}" for p in sorted((project / "logs").iterdir())]
    return "\n".join(texts) or cluster.log_tails()


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of JSON objects that may still be written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


@slurm
def test_cluster_has_nodes_of_its_own(cluster: SlurmCluster) -> None:
    names = [f"node{k}" for k in range(1, 5)]
    show = ("bash", "-c", "echo $(hostname) gpu$CUDA_VISIBLE_DEVICES")
    seen = cluster.run("srun", "-N4", "--gpus-per-node=1", *show).stdout.splitlines()
    assert sorted(seen) == [f"{name} gpu0" for name in names]
    assert Path("/proc/sys/kernel/hostname").read_text().strip() not in names


@slurm
def test_failed_job_says_so(cluster: SlurmCluster, project: Path, tmp_path: Path) -> None:
    script = tmp_path / "fails.sh"
    script.write_text("#!/bin/bash\nsrun bash -c 'echo here; exit 3'\n")
    record = cluster.wait_for_job(submit(cluster, project, f"--output={project}/logs/log", script))
    log = all_logs(cluster, project)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "3:0"), log
    assert "here" in log


@slurm
@pytest.mark.long
def test_prepare_data_by_an_array_of_tasks(
    cluster: SlurmCluster, project: Path, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Twenty kills of tasks, their parents and workers; the rounds that follow end in the same bytes."""
    (tmp_path / "long.jsonl").write_text((tiny_corpus / "train.jsonl").read_text() * 30)
    cluster.environment |= {"INPUT": str(tmp_path / "long.jsonl"), "TOKENIZER": str(tiny_tokenizer)}
    cluster.environment |= {"OUTPUT": str(tmp_path / "shards"), "TEXT_LANGUAGE": "en", "RELAUNCHES": "25"}
    more = ("--unit-mb", "0.01", "--shard-documents", "20", "--workers", "2")
    array = ("--array=0-2", "--cpus-per-task=1", "slurm/prepare_data.sh")
    array_id = submit(cluster, project, *array, *more)
    published, kills = tmp_path / "shards/.unfinished/shard", 0

    def kill(task: int) -> bool:
        job = cluster.job(f"{array_id}_{task}")
        if job["JobState"] != "RUNNING":
            return False
        node = job["NodeList"]
        found = cluster.on(node, "pgrep", "-f", "data-prep shard", check=False).stdout.split()
        if kills % 3 == 0:
            return cluster.run("scancel", "--signal=KILL", f"{array_id}_{task}", check=False).returncode == 0
        return bool(found) and cluster.on(node, "kill", "-9", found[-1], check=False).returncode == 0

    for _ in range(25):  # rounds
        before = 0
        while running := [t for t in range(3) if cluster.job(f"{array_id}_{t}")["JobState"] in ALIVE]:
            time.sleep(0.02)
            if kills < 20 and len(list(published.glob("*"))) > before:
                before = len(list(published.glob("*")))
                kills += kill(running[kills % len(running)])
        states = {cluster.job(f"{array_id}_{task}")["JobState"] for task in range(3)}
        if (tmp_path / "shards/manifest.json").exists():
            break
        array_id = (project / f"logs/sllm-data-{array_id}.next").read_text().strip()
    assert kills == 20, all_logs(cluster, project)
    assert states == {"COMPLETED"}, all_logs(cluster, project)
    assert all_logs(cluster, project).count("shards with") == 1  # one task has verified them
    following = (project / f"logs/sllm-data-{array_id}.next").read_text().strip()
    assert cluster.wait_for_job(following)["JobState"] == "CANCELLED"
    data_prep(
        *("shard", "--input", tmp_path / "long.jsonl", "--tokenizer", tiny_tokenizer, "--lang", "en"),
        *("--output", tmp_path / "alone", *more),
    )
    assert contents(tmp_path / "shards") == contents(tmp_path / "alone")


def write_recipe(path: Path, **settings: object) -> Path:
    path.write_text(yaml.safe_dump(RECIPE | settings))
    return path


def shorten(recipe: Path, run: Path) -> int:
    """Let the run end ten steps from where it stands; returns its last step. To be called while it stands."""
    settings = yaml.safe_load(recipe.read_text())
    settings["training"]["max_steps"] = len(read_lines(run / "metrics.jsonl")) + 10
    recipe.write_text(yaml.safe_dump(settings))
    return settings["training"]["max_steps"]


class Life:
    """One job of which things happen to: waits for its steps, and for its next start."""

    def __init__(self, cluster: SlurmCluster, project: Path, job_id: str, run: Path):
        self.cluster, self.project, self.job_id, self.run = cluster, project, job_id, run
        self.restarts = 0

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 900
        while not condition():
            state = self.cluster.job(self.job_id)["JobState"]
            ended = state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "COMPLETED")
            if ended or time.monotonic() > deadline:
                logs = all_logs(self.cluster, self.project)
                raise AssertionError(f"job {self.job_id} is {state}; awaited: {what}\n{logs[-12000:]}")
            time.sleep(0.3)

    def steps(self) -> int:
        return len(read_lines(self.run / "metrics.jsonl"))

    def trains(self) -> None:
        """Wait until this start of the job has done a few steps, and so has made a checkpoint of its own."""
        self.wait(lambda: len(read_lines(self.run / "starts.jsonl")) > self.restarts, "a start")
        start = read_lines(self.run / "starts.jsonl")[-1]
        self.wait(lambda: self.steps() > start["step"] + SAVE_EVERY, "steps")

    def restarted(self, by: str) -> None:
        """Wait until Slurm has put the job back into its queue."""
        before, self.restarts = self.restarts, self.restarts + 1
        self.wait(lambda: int(self.cluster.job(self.job_id)["Restarts"]) > before, f"a restart after {by}")


@slurm
@pytest.mark.long
def test_chain_lives_through_everything(
    cluster: SlurmCluster, project: Path, tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    vae_recipe = write_recipe(tmp_path / "vae.yaml", objective="vae", model={"vae": VAE})
    model = {"vae": {"path": "set by the chain"}, "backbone": BACKBONE}
    sllm_recipe = write_recipe(tmp_path / "sllm.yaml", objective="sllm", model=model)
    site = tmp_path / "site.sh"
    # The preflight imports torch on every node, so here it looks at each job's first start alone.
    site.write_text(
        f"export VENV={sys.prefix} STAGE={tmp_path}/staged DOCTOR='--free_gb 0'\n"
        'if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then DOCTOR=no; fi\n'
    )
    cluster.environment.pop("VENV")
    cluster.environment |= {
        "SITE": str(site),
        "CONTAINER": "nice -n 1",
        "WORK": str(work),
        "INPUT": str(tiny_corpus / "train.jsonl"),
        "VALID_INPUT": str(tiny_corpus / "valid.jsonl"),
        "TOKENIZER": str(tiny_tokenizer),
        "TEXT_LANGUAGE": "en",
        "DS_CONFIG": "ds_configs/zero3.json",
        "VAE_CONFIG": str(vae_recipe),
        "SLLM_CONFIG": str(sllm_recipe),
        "SBATCH_FLAGS": "--cpus-per-task=1",
        "DATA_FLAGS": "--array=0-1",
        "VAE_FLAGS": "--nodes=2 --gpus-per-node=1 --exclude=node1",
        "SLLM_FLAGS": "--nodes=3-4 --gpus-per-node=1 --hold",
    }
    cluster.run("slurm/run_all.sh", cwd=project)
    named = cluster.run("squeue", "--noheader", "--format=%i %j", "--sort=i").stdout.split("\n")
    jobs = [line.split() for line in named if line]
    jobs_by_name: dict[str, list[str]] = {}
    for number, name in jobs:
        jobs_by_name.setdefault(name, []).append(number)
    [vae], [sllm] = jobs_by_name["svae"], jobs_by_name["sllm"]
    evaluation = jobs_by_name["sllm-evaluate"][1]

    run = work / "runs/vae"
    life = Life(cluster, project, vae, run)
    life.trains()
    rank = cluster.on("node3", "pgrep", "-f", "^python pipeline/train.py").stdout.split()
    cluster.on("node3", "kill", "-KILL", *rank)
    life.restarted("a killed rank")
    life.trains()
    cluster.run("scancel", "--signal=USR1", vae)
    life.restarted("a signal")
    life.trains()
    cluster.run("srun", "--partition=urgent", "--nodes=4", "--exclusive", "true", timeout=900)
    life.restarted("preemption")
    life.trains()
    cluster.run("scontrol", "update", f"JobId={vae}", "TimeLimit=2")  # the warning comes two minutes before
    life.restarted("the time limit's warning")
    cluster.run("scontrol", "update", f"JobId={vae}", "TimeLimit=60")
    last = shorten(vae_recipe, run)
    record = cluster.wait_for_job(vae, timeout=900)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "4"), all_logs(cluster, project)
    assert record["NodeList"] in ("node[2-3]", "node[2,4]", "node[3-4]")
    assert check_run(run, last) == [2] * 5

    run = work / "runs/sllm"
    life = Life(cluster, project, sllm, run)
    # Held so far: as long as one node tidies up after the job before, Slurm would start this one on three.
    cluster.wait_for_job(jobs_by_name["sllm-evaluate"][0], timeout=900)
    cluster.wait_until_idle()
    cluster.run("scontrol", "release", sllm)
    life.trains()
    cluster.kill_node("node3")
    try:
        life.restarted("the death of a node")
        last = shorten(sllm_recipe, run)
        record = cluster.wait_for_job(sllm, timeout=900)
        assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), all_logs(cluster, project)
        assert record["NodeList"] == "node[1-2,4]"
        assert check_run(run, last) == [4, 3]
        record = cluster.wait_for_job(evaluation, timeout=900)
    finally:
        cluster.start_node("node3")
    assert record["JobState"] == "COMPLETED", all_logs(cluster, project)
    figures = json.loads((run / "results/evaluation.json").read_text())
    assert 0 < figures["bits_per_byte"] < 8
    assert (work / "models/sllm/model.safetensors").is_file()

    logs = all_logs(cluster, project)
    assert f"svae {vae}: start 5 (SLURM_RESTART_COUNT=4) on node[" in logs
    assert f"sllm {sllm}: start 2 (SLURM_RESTART_COUNT=1) on node[1-2,4]" in logs
    assert logs.count("verdict    fit") == 2
    assert re.search("shards? with", logs)  # verified by the first task of the array
    assert f"sllm-{sllm}.node4.log" in logs and f"sllm-{sllm}.node1.log" in logs  # one log per node
    recorded = yaml.safe_load((run / "recipe.yaml").read_text())["data"]["shards"]
    assert "/staged/train-" in recorded[0]

    # Submitted again, a finished run reports that it is finished.
    cluster.environment |= {"SHARDS": str(work / "shards/train"), "OUTPUT_DIR": str(run), "DOCTOR": "no"}
    cluster.environment |= {"CONFIG": str(sllm_recipe), "VALIDATION": str(work / "shards/valid")}
    size = ("--nodes=1", "--cpus-per-task=1")
    again = submit(cluster, project, *size, "slurm/train_sllm.sh", "--model.vae.path", work / "models/vae")
    assert cluster.wait_for_job(again)["JobState"] == "COMPLETED", all_logs(cluster, project)
    assert "already finished" in (project / f"logs/sllm-{again}.node1.log").read_text()


def check_run(run: Path, last: int) -> list[int]:
    """Every step is there once, each start resumes from a checkpoint of the one before, and `sllm audit`
    finds nothing to say; the number of ranks of each start."""
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    # An untrained model of 512 entries starts near ln 512 nats: no rank's share is missing or doubled.
    assert abs(rows[0]["loss"] - math.log(512)) < 1.0
    audit = [sys.executable, "-m", "pipeline.cli", "audit", str(run)]
    done = subprocess.run(audit, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    starts = read_lines(run / "starts.jsonl")
    started_at = [start["step"] for start in starts]
    assert started_at == sorted(set(started_at)), started_at
    return [start["world"] for start in starts]


@slurm
def test_dependants_of_a_failed_shard_task_are_cancelled(
    cluster: SlurmCluster, project: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    cluster.environment |= {"WORK": str(tmp_path / "work"), "TOKENIZER": str(tiny_tokenizer)}
    cluster.environment |= {"INPUT": str(tmp_path / "absent"), "VALID_INPUT": str(tmp_path / "absent")}
    cluster.environment |= {"SBATCH_FLAGS": "--cpus-per-task=1", "DRY_RUN": "1"}
    dry = cluster.run("slurm/run_all.sh", cwd=project)
    assert dry.stderr.count("to start at") == 6, dry.stderr
    del cluster.environment["DRY_RUN"]
    said = cluster.run("slurm/run_all.sh", cwd=project).stdout.replace(",", "").split()
    numbers = [word for word in said if word.isdigit()]
    assert len(numbers) == 6
    states = [cluster.wait_for_job(number)["JobState"] for number in numbers[2:]]
    assert states == ["CANCELLED"] * 4, all_logs(cluster, project)
    assert "absent" in all_logs(cluster, project)


@slurm
def test_bad_nodes_are_named_before_any_training_step(
    cluster: SlurmCluster, project: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """node2's disk is full, node3 cannot read a shard, node4 has another release of a package."""
    run, tar = tmp_path / "run", sorted(tiny_shards.glob("*.tar"))[0]
    run.mkdir()
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)  # nothing can be read from it
    found = importlib.metadata.distribution("deepspeed").read_text("METADATA")
    (tmp_path / "METADATA").write_text(found.replace("\nVersion: ", "\nVersion: 9.", 1))
    installed = next(Path(sys.prefix).glob("lib/python*/site-packages/deepspeed-*.dist-info/METADATA"))
    cluster.on("node2", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(run))
    cluster.on("node3", "mount", "--bind", str(tmp_path / "socket"), str(tar))
    cluster.on("node4", "mount", "--bind", str(tmp_path / "METADATA"), str(installed))
    try:
        cluster.environment |= {"SHARDS": str(tiny_shards), "OUTPUT_DIR": str(run)}
        size = ("--nodes=4", "--cpus-per-task=1")
        record = cluster.wait_for_job(submit(cluster, project, *size, "slurm/train_vae.sh"))
    finally:
        for node, place in (("node2", run), ("node3", tar), ("node4", installed)):
            cluster.on(node, "umount", str(place))
    logs = all_logs(cluster, project)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "1:0"), logs
    lines = [line for line in logs.splitlines() if line.startswith("sllm doctor: ")]
    assert any("node2: " in line and f"cannot write to {run}: No space left" in line for line in lines), logs
    assert any("node3: shard cannot be read" in line and tar.name in line for line in lines), logs
    assert any("node4: deepspeed 9." in line for line in lines), logs
    assert not [line for line in lines if "node1: " in line], logs
    assert "training ended" not in logs
    assert list(run.iterdir()) == []


@slurm
def test_requeued_by_a_signal_before_training_and_by_hung_ranks_but_not_for_ever(
    cluster: SlurmCluster, project: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Start 1 gets a stop signal during the preflight, start 2 hangs, start 3 is one too many."""
    recipe = write_recipe(tmp_path / "vae.yaml", objective="vae", model={"vae": VAE})
    # One rank hangs, alone: when the first of several ends with 76, others may still import and be killed.
    (tmp_path / "site.sh").write_text(
        'if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then DOCTOR=no SRUN_FLAGS="--nodes=1 --ntasks=1"; fi\n'
    )
    cluster.environment |= {"SITE": str(tmp_path / "site.sh"), "MAX_RESTARTS": "1", "CONFIG": str(recipe)}
    cluster.environment |= {"SHARDS": str(tiny_shards), "OUTPUT_DIR": str(tmp_path / "run")}
    life = Life(cluster, project, "", tmp_path / "run")
    size = ("--nodes=2", "--cpus-per-task=1")
    # Nothing is ever finished within a millisecond.
    life.job_id = submit(cluster, project, *size, "slurm/train_vae.sh", "--health.hang_seconds", "0.001")
    life.wait(lambda: all(listening_doctors(cluster, node) for node in ("node1", "node2")), "the preflight")
    cluster.on("node2", "kill", "-STOP", *listening_doctors(cluster, "node2"))  # it shall not end too soon
    cluster.run("scancel", "--signal=USR1", life.job_id)
    life.restarted("a signal in the preflight")
    record = cluster.wait_for_job(life.job_id)
    logs = all_logs(cluster, project)
    assert (record["JobState"], record["Restarts"]) == ("FAILED", "2"), logs
    assert "training ended with status 76" in logs and logs.count("training ended") == 1, logs
    assert "given up after 2 restarts (MAX_RESTARTS)" in logs

    # A job that is cancelled stays so, in the preflight too.
    job_id = submit(cluster, project, *size, "slurm/train_vae.sh")
    life = Life(cluster, project, job_id, tmp_path / "run")
    life.wait(lambda: bool(listening_doctors(cluster, "node2")), "the preflight")
    cluster.run("scancel", job_id)
    record = cluster.wait_for_job(job_id)
    cluster.wait_until_idle()
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), all_logs(cluster, project)


def listening_doctors(cluster: SlurmCluster, node: str) -> list[str]:
    """The numbers of the node's `sllm doctor` processes that have blocked USR1, to take it by a thread."""
    listening = []
    for pid in cluster.on(node, "pgrep", "-f", "python[^ ]* [^ ]*/sllm doctor", check=False).stdout.split():
        status = cluster.on(node, "cat", f"/proc/{pid}/status", check=False).stdout
        blocked = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:")]
        if blocked and int(blocked[0], 16) >> (signal.SIGUSR1 - 1) & 1:
            listening.append(pid)
    return listening


@slurm
def test_a_job_that_can_never_succeed_is_not_requeued(
    cluster: SlurmCluster, project: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """The first rank ends with 2 and the other, which still starts, is terminated for it."""
    slow = "import os, time\nif os.environ.get('SLURM_PROCID') == '1':\n    time.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)  # every Python begins with it
    recipe = write_recipe(tmp_path / "vae.yaml", objective="vae", model={"vae": VAE})
    cluster.environment |= {"CONFIG": str(recipe), "DOCTOR": "no", "MAX_RESTARTS": "1"}
    cluster.environment |= {"SHARDS": str(tiny_shards), "OUTPUT_DIR": str(tmp_path / "run")}
    cluster.environment["PYTHONPATH"] = str(tmp_path)
    size = ("--nodes=2", "--cpus-per-task=1")
    wrong = submit(cluster, project, *size, "slurm/train_vae.sh", "--training.max_stepz", "5")
    record = cluster.wait_for_job(wrong)
    logs = all_logs(cluster, project)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "2:0", "0"), logs
    assert logs.count("did you mean") == 2, logs  # by each machine


HOLDER = """
import sys, time
from pathlib import Path
from helpers.slurm_cluster import SlurmCluster
with SlurmCluster(Path(sys.argv[1]), nodes=4) as cluster:
    cluster.on("node2", "mount", "-t", "tmpfs", "tmpfs", sys.argv[1] + "/log")
    job = ["sbatch", "--parsable", "--nodes=4", "--output=/dev/null", "--wrap=srun sleep 600"]
    job = cluster.run(*job).stdout.strip()
    while cluster.job(job)["JobState"] != "RUNNING":
        time.sleep(0.1)
    print(*cluster._init_pids.values(), flush=True)
    time.sleep(600)
"""


@slurm
def test_a_killed_test_run_leaves_nothing(tmp_path: Path) -> None:
    """The process that holds a cluster is killed with -9: no process, namespace or mount stays."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    path = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path)
    try:
        pids = holder.stdout.readline().split()
        assert len(pids) == 5
        kinds = ("net", "mnt", "pid", "uts", "ipc")
        spaces = {os.readlink(f"/proc/{pid}/ns/{kind}") for pid in pids for kind in kinds}
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert len(spaces) == 25
    require_nothing_left(tmp_path, spaces)


def require_nothing_left(folder: Path, spaces: set[str] = frozenset()) -> None:
    """No process of a cluster in this folder runs (the environment of each names it), none is in any of these
    namespaces, and nothing is mounted in the folder, as far as this process sees."""
    deadline = time.monotonic() + 60
    while left := processes_of(folder, spaces):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()


def processes_of(folder: Path, spaces: set[str]) -> list[str]:
    """The numbers and names of the processes in any of these namespaces or of the cluster in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (
                f"SLURM_CONF={folder}/".encode() in (entry / "environ").read_bytes()
                or spaces & {os.readlink(link) for link in (entry / "ns").iterdir()}
            ):
                found.append(f"{entry.name} {(entry / 'comm').read_text().strip()}")
        except OSError:
            continue  # it has just ended
    return found


def test_templates_are_shellcheck_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(map(str, (REPOSITORY / "slurm").glob("*.sh")))
    assert len(scripts) == 7
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
