"""`sllm train --ranks`: signals reach the ranks, and wrong input is refused before any rank starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import runs

pytestmark = pytest.mark.launch


@pytest.mark.parametrize(("number", "steps"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_signal_reaches_all_ranks_and_none_is_left(
    number: int, steps: int, recipes: Path, tmp_path: Path
) -> None:
    """Also one that comes before the ranks listen."""
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
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=subprocess.STDOUT)
    watched, metrics = psutil.Process(process.pid), run / "metrics.jsonl"
    while not watched.children() or (steps and (not metrics.exists() or len(runs.records(run)) < steps)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    status = process.wait()
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(run) in (one.info["cmdline"] or ())]
    assert status == 75, output.read_text()
    assert "[INFO]" not in output.read_text() and "hostfile" not in output.read_text()
    if not steps:
        assert not run.exists(), "it had nothing to save"
        return
    said = f"{signal.Signals(number).name}: stops when this step is done and saved\n"
    assert output.read_text().count(said) == 1
    [start] = runs.records(run, "starts")
    assert start["world"] == 2 and runs.records(run)[-1]["step"] < 100000
    latest = (run / "checkpoints" / "latest").read_text().strip()
    assert json.loads((run / "checkpoints" / latest / "meta.json").read_text())["world"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--recipe demo-vea --deepspeed-config zero1",
            "recipe demo-vea does not exist: did you mean demo-vae?",
        ),
        (
            "--recipe demo-vae --deepspeed-config zero9",
            "DeepSpeed config zero9 does not exist: did you mean zero",
        ),
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
