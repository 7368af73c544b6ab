"""`sllm train --ranks`: signals reach the ranks, and wrong input is refused before any rank starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import runs

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_ranks_listen_is_kept_for_them(
    number: int, recipes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "train",
        "--recipe",
        recipes / "vae.yaml",
        "--ranks",
        "2",
    ]
    command += ["--deepspeed-config", "zero1", "--output_dir", run, "--training.max_steps", "100000"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    watched = psutil.Process(process.pid)
    while not watched.children():  # the launcher is there, its ranks are not
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait() == 75
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(run) in (one.info["cmdline"] or ())]
    [start] = runs.records(run, "starts")
    assert start["world"] == 2 and runs.records(run)[-1]["step"] < 100000
    latest = (run / "checkpoints" / "latest").read_text().strip()
    assert json.loads((run / "checkpoints" / latest / "meta.json").read_text())["world"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recipe demo-vea --deepspeed-config zero1", "recipe demo-vea does not exist"),
        ("--recipe demo-vae --deepspeed-config zero9", "DeepSpeed config zero9 does not exist"),
        ("--recipe demo-vae --deepspeed-config zero1 --trainin.max_steps 3", "did you mean"),
        ("--recipe demo-vae --deepspeed-config zero1", "none does not exist"),
        ("stray --recipe demo-vae --deepspeed-config zero1", "unexpected argument 'stray'"),
    ],
)
def test_wrong_input_is_one_line_before_any_rank_starts(words: str, message: str) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "train", *words.split(), "--data.shards", "none"]
    for ranks in ([], ["--ranks", "2"]):
        done = subprocess.run([*command, *ranks], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("sllm: error: ") and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr
