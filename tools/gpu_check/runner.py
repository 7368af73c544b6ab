"""Ordered checks, each in a process and a time limit of its own.

OUT/results.jsonl gets every figure at the moment it is known, and a closing line for each check, so that a
machine that goes away takes nothing with it:

    {"run": …}                                           machine, versions, settings
    {"check": NAME, "fact": {…}}                         figures of a check
    {"check": NAME, "status": "ok", "seconds": …, …}     its end: ok, failed or over its limit, and why

A check that fails or runs over its limit stops no other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.common.environment import header
from data_prep.common.errors import log
from data_prep.common.processes import last_line, start_logged

ROOT = Path(__file__).resolve().parents[2]
RESULTS, LOG, SETTING, WORK = "results.jsonl", "log.txt", "setting.json", "work"
PACKAGES = "torch transformers deepspeed triton numpy tokenizers pydantic".split()
MOST_SECONDS = 400  # of the default checks' limits together


@dataclass(frozen=True)
class Check:
    """seconds: the limit on a GPU. where: `module:function` of a `Bench`. usual: runs without `--only`."""

    name: str
    seconds: float
    where: str
    what: str
    usual: bool = False


def _check(name: str, seconds: float, where: str, what: str, usual: bool = False) -> Check:
    return Check(name, seconds, f"tools.gpu_check.{where}", what, usual)


# What everything else needs comes first.
CHECKS = (
    _check("machine", 40, "kernels:machine", "versions, ceilings, a process group of one", True),
    _check("attention", 45, "kernels:attention", "every path: values, gradients, time, memory", True),
    _check("model", 30, "models:same_scores", "CPU = device, cached = uncached, causal, bf16", True),
    _check("train", 90, "runs:train", "train.py: speed, save, resume, audit, export, evaluate", True),
    _check("speed", 100, "models:speed", "125M H1 and H2 beside OPT-125M, kernel table", True),
    _check("generation", 75, "writing:generation", "125M beside OPT-125M, batch 1 and 64", True),
    _check("speed-1.3b", 100, "models:speed_large", "1.3B H1 and H2 beside OPT-1.3B, kernel table"),
    _check("generation-256", 75, "writing:large_batch", "125M beside OPT-125M, batch 256"),
    _check("strategies", 80, "runs:strategies", "zero0, zero1, zero3: step, memory, losses"),
    _check("doctor", 15, "runs:doctor", "sllm doctor sees the GPU and the shards"),
    _check("compile", 60, "runs:compiled", "training.compile: gain, losses"),
    _check("generation-1.3b", 60, "writing:large_model", "1.3B beside OPT-1.3B, batch 1 and 64"),
    _check("tests", 90, "runs:cuda_tests", "pytest -m cuda"),
)


@dataclass(frozen=True)
class Setting:
    """inputs: folder with the shard sets `train` and `valid`. patience: factor of all limits."""

    device: str
    small: bool
    inputs: str
    output: str
    patience: float = 1.0

    @staticmethod
    def read(output: str | Path) -> Setting:
        return Setting(**json.loads((Path(output) / SETTING).read_text()))


def append(output: str | Path, record: dict[str, Any]) -> None:
    """Add a line to the results, and see it on the disk."""
    with open(Path(output) / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a results file."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off by the machine's end
            continue
    return found


def run(checks: Iterable[Check], setting: Setting) -> list[dict[str, Any]]:
    """Run the checks in order; returns the closing line of each."""
    output = Path(setting.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / SETTING).write_text(json.dumps(asdict(setting)))
    append(output, {"run": {**header(PACKAGES), "device": setting.device, "small": setting.small}})
    ended = []
    try:
        for check in checks:
            ended.append(_run_one(check, setting, output))
            append(output, ended[-1])
            why = f": {ended[-1]['error']}" if "error" in ended[-1] else ""
            log(f"{check.name:<16}{ended[-1]['status']:<12}{ended[-1]['seconds']:7.1f} s  {check.what}{why}")
    finally:
        shutil.rmtree(output / WORK, ignore_errors=True)
    return ended


def _run_one(check: Check, setting: Setting, output: Path) -> dict[str, Any]:
    limit = check.seconds * setting.patience
    (output / WORK / check.name).mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": setting.device,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "tools.gpu_check.bench", check.name, check.where, str(output)]
    file = output / LOG
    before = file.stat().st_size if file.exists() else 0
    began = time.monotonic()
    process = start_logged(command, file, env=environment)
    try:
        status = "failed" if process.wait(limit) else "ok"
    except subprocess.TimeoutExpired:
        status = "over limit"
    finally:
        _end_group(process)
    record = {"check": check.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    if status == "ok":
        return record
    with open(file, "rb") as printed:
        printed.seek(before)
        said = last_line(printed.read().decode(errors="replace"))
    return {**record, "limit": limit, "error": said}


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a check and all that it has started: what is left of it would hold the GPU."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
