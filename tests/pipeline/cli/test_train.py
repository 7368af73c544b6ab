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

from pipeline.cli.main import main

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
        (["--recipe", "demo-vea", "--deepspeed-config", "zero1"], "recipe demo-vea does not exist"),
        (["--recipe", "demo-vae", "--deepspeed-config", "zero9"], "DeepSpeed config zero9 does not exist"),
        (["--recipe", "demo-vae", "--deepspeed-config", "zero1", "--trainin.max_steps", "3"], "did you mean"),
        (
            ["--recipe", "demo-vae", "--deepspeed-config", "zero1", "--data.shards", "none"],
            "none does not exist",
        ),
        (["stray", "--recipe", "demo-vae", "--deepspeed-config", "zero1"], "unexpected argument 'stray'"),
    ],
)
@pytest.mark.parametrize("ranks", [[], ["--ranks", "2"]])
def test_wrong_input_is_one_line(
    words: str, message: str, ranks: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    from data_prep.common.errors import run_main

    more = [] if "--data.shards" in words else ["--data.shards", str(tmp_path)]
    assert run_main("sllm", lambda: main(["train", *words.split(), *more, *ranks])) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("sllm: error: ") and err.count("\n") == 1 and message in err
