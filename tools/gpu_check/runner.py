"""Ordered checks, each in its own process, with its own time limit.

OUT/results.jsonl gets every figure at the moment it is known, and a closing line for each check, so that a
machine that goes away takes nothing with it:

    {"run": …}                                           machine, versions, settings
    {"check": NAME, "fact": {…}}                         figures of a check
    {"check": NAME, "status": "ok", "seconds": …, …}     its end: ok, failed or over its limit, and why

A check that fails or runs over its limit stops no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from data_prep.common.environment import header
from data_prep.common.errors import log
from data_prep.common.files import read_json_lines
from data_prep.common.processes import last_line, start_logged

ROOT = Path(__file__).resolve().parents[2]
RESULTS, LOG, WORK = "results.jsonl", "log.txt", "work"
PACKAGES = "torch transformers deepspeed triton numpy tokenizers pydantic".split()
MARK = "GPU_CHECK"  # environment: in all that one check has started
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Check:
    """seconds: the limit on a GPU. words: of the Python command, which gets the check's name and the setting
    too. usual: runs without `--only`."""

    name: str
    seconds: float
    words: tuple[str, ...]
    what: str = ""
    usual: bool = False


def _check(name: str, seconds: float, where: str, what: str, usual: bool = False) -> Check:
    return Check(name, seconds, ("-m", "tools.gpu_check.bench", where), what, usual)


# What everything else needs comes first.
CHECKS = (
    _check("machine", 40, "kernels:machine", "versions, ceilings, a process group of one", True),
    _check("attention", 45, "kernels:attention", "every path: values, gradients, time, memory", True),
    _check("model", 30, "models:same_scores", "CPU = device, cached = uncached, causal, bf16", True),
    _check("train", 90, "runs:train", "train.py: speed, save, resume, audit, export, evaluate", True),
    _check("speed", 100, "models:speed", "125M H1 and H2 beside OPT-125M, kernel table", True),
    _check("generation", 95, "writing:generation", "125M beside OPT-125M, batch 1 and 64", True),
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


def append(output: str | Path, record: dict[str, Any]) -> None:
    """Add a line to the results, and see it on the disk."""
    with open(Path(output) / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a results file."""
    return [value for _, value in read_json_lines(Path(path)) if isinstance(value, dict)]


def run(checks: Iterable[Check], setting: Setting) -> list[dict[str, Any]]:
    """Run the checks in order; returns the closing line of each."""
    output = Path(setting.output)
    output.mkdir(parents=True, exist_ok=True)
    append(output, {"run": {**header(PACKAGES), "device": setting.device, "small": setting.small}})
    ended = []
    try:
        for check in checks:
            ended.append(one := _run_one(check, setting, output / LOG))
            append(output, one)
            why = f": {one['error']}" if "error" in one else ""
            log(f"{check.name:<16}{one['status']:<12}{one['seconds']:7.1f} s  {check.what}{why}")
    finally:
        shutil.rmtree(output / WORK, ignore_errors=True)
    return ended


def _run_one(check: Check, setting: Setting, file: Path) -> dict[str, Any]:
    command = [sys.executable, *check.words, check.name, json.dumps(asdict(setting))]
    environment = {**os.environ, **ENVIRONMENT, "DS_ACCELERATOR": setting.device, MARK: uuid.uuid4().hex}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(
        os.pathsep
    )
    before = file.stat().st_size if file.exists() else 0
    began, limit = time.monotonic(), check.seconds * setting.patience
    process = start_logged(command, file, env=environment)
    try:
        status = "failed" if process.wait(limit) else "ok"
    except subprocess.TimeoutExpired:
        status = "over limit"
    finally:
        _end_all(environment[MARK])
        process.wait()
    record = {"check": check.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    if status == "ok":
        return record
    with open(file, "rb") as printed:
        printed.seek(before)
        return {**record, "limit": limit, "error": last_line(printed.read().decode(errors="replace"))}


def _end_all(mark: str) -> None:
    """End a check and what it has started, also in other sessions: a rank that is left holds the GPU."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                process.kill()
