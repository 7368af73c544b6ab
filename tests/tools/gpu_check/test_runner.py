"""`tools.gpu_check`: checks that fail or hang, the page, and the whole program on a CPU."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.paths import REPOSITORY

from data_prep.common.command_line import parse
from data_prep.common.errors import run_main
from data_prep.common.processes import run_command
from tools.gpu_check import page, runner
from tools.gpu_check.__main__ import app
from tools.gpu_check.runner import CHECKS, Check, Setting

FACT = "import sys, json; from tools.gpu_check.runner import append; name, setting = sys.argv[1:]; "
FACT += "append(json.loads(setting)['output'], {'check': name, 'fact': {'x': 1.5, 'name': name}}); "
HANGS = FACT + (
    "import subprocess, time; child = subprocess.Popen(['sleep', '99'], start_new_session=True); "
    "print(child.pid, flush=True); time.sleep(99)"
)
SAMPLES = (
    Check("fails", 30, ("-c", FACT + "print('said'); raise ValueError('no such kernel')")),
    Check("dies", 30, ("-c", "import os; os.kill(os.getpid(), 9)")),
    Check("hangs", 2, ("-c", HANGS)),
    Check("works", 30, ("-c", FACT)),
)


def test_the_usual_checks_take_400_seconds_and_every_check_is_there() -> None:
    usual = {check.name: check.seconds for check in CHECKS if check.usual}
    assert list(usual) == ["machine", "attention", "model", "train", "speed", "generation"]
    assert sum(usual.values()) <= 400
    assert len({check.name for check in CHECKS}) == len(CHECKS) == 13
    for check in CHECKS:
        module, function = check.words[-1].split(":")
        found = getattr(importlib.import_module(f"tools.gpu_check.{module}"), function)
        assert list(inspect.signature(found).parameters) == ["bench"] and check.what


def test_a_check_that_fails_dies_or_hangs_stops_no_other(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = runner.run(SAMPLES, Setting("cpu", True, "inputs", str(tmp_path)))
    assert time.monotonic() - began < 25
    assert {one["check"]: one["status"] for one in ended} == {
        "fails": "failed", "dies": "failed", "hangs": "over limit", "works": "ok",
    }  # fmt: skip
    fails, dies, hangs, works = ended
    assert fails["error"] == "ValueError: no such kernel" and fails["limit"] == 30
    assert "error" in dies and "error" not in works and hangs["seconds"] >= 2
    with contextlib.suppress(psutil.NoSuchProcess):  # or not yet reaped
        assert psutil.Process(int(hangs["error"])).status() == psutil.STATUS_ZOMBIE
    records = runner.read(tmp_path / runner.RESULTS)
    # What was known before the end is there, between the closing lines.
    facts = [record["check"] for record in records if "fact" in record]
    assert facts == ["fails", "hangs", "works"]
    assert [record for record in records if "status" in record] == ended
    assert records[0]["run"]["packages"]["torch"] and not (tmp_path / runner.WORK).exists()


def test_limits_grow_with_patience_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    slow = Check("slow", 0.5, ("-c", "import time; time.sleep(1.5)"))
    [ended] = runner.run([slow], Setting("cpu", True, "inputs", str(tmp_path), patience=20))
    assert ended["status"] == "ok"
    with open(tmp_path / runner.RESULTS, "a") as file:
        file.write('{"check": "slow", "fa')
    assert runner.read(tmp_path / runner.RESULTS)[-1] == ended


def test_the_page_shows_every_check_and_figure(tmp_path: Path) -> None:
    run = {
        "date": "2026-11-30T19:33:10+00:00",
        "cpu": "a CPU",
        "cores": 2,
        "git_commit": None,
        "python": "3.12",
    }
    records = [
        {"run": {**run, "packages": {"torch": "2.11.0", "triton": None}, "device": "cuda", "small": False}},
        {"check": "speed", "fact": {"model": "sllm", "tokens_per_second": 1234567.8}},
        {"check": "speed", "fact": {"model": "opt|x", "tokens_per_second": None}},
        {"check": "speed", "fact": {"gb": 0.123456}},
        {"check": "speed", "status": "ok", "seconds": 61.26},
        {"check": "model", "status": "over limit", "seconds": 30.0, "limit": 30, "error": "at <i>line</i> 3"},
    ]
    page.write(records, tmp_path)
    text, html = ((tmp_path / f"report.{end}").read_text() for end in ("md", "html"))
    assert "| sllm | 1,234,568 |" in text and r"| opt\|x | – |" in text and "| gb | 0.1235 |" in text
    assert "| model | over limit | 30.0 | at <i>line</i> 3 |" in text and "torch 2.11.0" in text
    assert "&lt;i&gt;line" in html and "1,234,568" in html and "triton" not in html


def test_unknown_checks_and_missing_inputs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, part in (
        (["--only", "sped-up"], "there is no such check"),
        (["--inputs", str(tmp_path)], "has no folder train"),
    ):
        command = ["run", "--output", str(tmp_path / "out"), *words]
        assert run_main("gpu_check", lambda command=command: parse(app, command)()) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.launch
def test_the_program_on_a_cpu(tmp_path: Path, tiny_shards: Path, tiny_valid_shards: Path) -> None:
    """The checks that use all of the program's parts; `make gpu-check DEVICE=cpu SMALL=1` runs every one."""
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    inputs.mkdir()
    (inputs / "train").symlink_to(tiny_shards)
    (inputs / "valid").symlink_to(tiny_valid_shards)
    command = ["-m", "tools.gpu_check", "run", "--device", "cpu", "--small", "--inputs", str(inputs)]
    only = ("attention", "model", "train", "speed", "generation")
    command += ["--output", str(out), "--patience", "20", "--only", *only]
    run_command([sys.executable, *command], "gpu_check", cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": ""})
    records = runner.read(out / runner.RESULTS)
    assert [one["check"] for one in records if "status" in one] == list(only)
    facts = [one["fact"] for one in records if "fact" in one]
    [train] = [fact for fact in facts if "first_loss" in fact]
    assert train["last_loss"] < train["first_loss"]
    [tried] = [fact for fact in facts if fact.get("command") == "evaluate"]
    assert tried["bits_per_byte"] > 0
    assert {fact["model"] for fact in facts if "bf16" in fact} > {"small-sllm", "small-lm"}
    assert json.dumps(facts) and (out / "report.html").stat().st_size > 2000
