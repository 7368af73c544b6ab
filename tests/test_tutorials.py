"""README.md and the tutorials, as a reader types them, shortened by the environment alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY
from helpers.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.long, pytest.mark.launch]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What makes each run short. A command line's own keys stay as they are typed.
SHORT = "--training.max_steps 2 --training.eval_bins 1 --data.bin_tokens 512 --data.window_tokens 128"
PAPER_SIZES = "--data.bins_per_step 1 " + SHORT


def script(text: str) -> str:
    """The page's blocks as one bash script: bash, Python, and the lines behind a prompt sign of others."""
    parts = []
    for kind, body in BLOCK.findall(text):
        if kind == "bash":
            parts.append(body)
        elif kind == "python":
            parts.append(f"python - <<'PYTHON'\n{body}PYTHON\n")
        else:
            parts += [line[2:] for line in body.splitlines() if line.startswith("$ ")]
    return "set -euo pipefail\n" + "\n".join(parts)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository's files with this environment as its .venv."""
    folder = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(commands: str, folder: Path, shortened: str) -> str:
    environment = os.environ | {
        "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}",
        "SLLM_TRAIN_ARGS": shortened,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL"):
        environment.pop(name, None)
    done = subprocess.run(
        ["bash", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def page(name: str) -> str:
    return (REPOSITORY / "docs/tutorials" / name).read_text(encoding="utf-8")


def test_my_text_on_a_cpu_and_serve_a_model(tmp_path: Path) -> None:
    out = run(script(page("cpu.md")), tmp_path, SHORT)
    assert "the run ends after" in out and "bits per byte" in out
    assert (tmp_path / "report.html").stat().st_size > 10_000
    out = run(script(page("serve.md")), tmp_path, SHORT)
    assert '"text_completion"' in out


def test_one_gpu(tmp_path: Path) -> None:
    out = run(script(page("one-gpu.md")), tmp_path, PAPER_SIZES)
    assert "zero" in out and "bits per byte" in out


def test_the_readme(checkout: Path) -> None:
    """The lines behind a prompt sign, and the Python block; `make setup` finds a complete .venv."""
    text = (checkout / "README.md").read_text(encoding="utf-8")
    run(script(text), checkout, SHORT)
    assert (checkout / "demo/report.html").is_file()


@pytest.mark.slurm
def test_a_slurm_cluster(checkout: Path, tmp_path: Path) -> None:
    with SlurmCluster(tmp_path / "cluster", nodes=2) as cluster:
        cluster.environment |= {
            "PATH": f"{sys.prefix}/bin{os.pathsep}{cluster.environment['PATH']}",
            "SLLM_TRAIN_ARGS": SHORT,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "DOCTOR": "no",
            "SBATCH_FLAGS": "--cpus-per-task=1",
            "DATA_FLAGS": "--array=0-1",
        }
        cluster.run("bash", "-c", script(page("slurm.md")), cwd=checkout)
        jobs = cluster.run("squeue", "--noheader", "--format=%A", "--sort=i").stdout.split()
        assert cluster.wait_for_job(jobs[-1])["JobState"] == "COMPLETED", cluster.log_tails()
