"""How ranks start: the launcher's variables, waiting for each other, the launcher's end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from helpers import ranks
from helpers.paths import REPOSITORY
from helpers.runs import arguments

from data_prep.common.errors import UserError
from pipeline.parallel import ranks as parallel
from pipeline.parallel.ranks import Ranks, find_ranks

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "9"}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "1"}, "RANK=1 is set and WORLD_SIZE is not: unset it to run alone"),
        ({"RANK": "0"}, "RANK=0 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is not below WORLD_SIZE=1"),
        (TWO | {"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        (TWO | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below WORLD_SIZE=2"),
        (TWO | {"RANK": "-1"}, "RANK=-1: it must be a whole number"),
        (TWO | {"WORLD_SIZE": ""}, "WORLD_SIZE=: it must be a whole number"),
        (TWO | {"MASTER_PORT": "x"}, "MASTER_PORT=x: it must be a whole number"),
        (TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: a port is from 1 to 65535"),
        (TWO | {"MASTER_PORT": "0"}, "MASTER_PORT=0: a port is from 1 to 65535"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x: it must be a whole number"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK=: it must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_ranks(dict(env))


def test_variables_that_fit_are_taken() -> None:
    assert find_ranks(dict(TWO)) == Ranks(1, 2, 1)
    assert find_ranks({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == Ranks(0, 1, 0)


def wait_for(done: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_waits_says_for_whom_and_ends_at_once(
    number: int, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "lm", "zero2", tmp_path / "run")
    started = pool.start(2, ranks.train_into_log, settings, str(tmp_path), 1)
    (process, _), (absent, _) = started
    absent.join()
    log = tmp_path / "rank-0.log"
    wait_for(lambda: log.exists() and "rank 0 of 2 waits for rank 1 at 127.0.0.1:" in log.read_text())
    os.kill(process.pid, number)
    sent = time.monotonic()
    process.join(20)
    assert process.exitcode == (130 if number == signal.SIGINT else 75)
    assert time.monotonic() - sent < 2
    assert "before the first step: nothing to save" in log.read_text()
    assert not (tmp_path / "run").exists()
    pool.finish(started, 1)


def test_a_rank_that_waits_says_that_the_name_is_unknown() -> None:
    assert parallel._rank_0("127.0.0.1") == "rank 0"
    assert parallel._rank_0("no such host").startswith("rank 0 (MASTER_ADDR=no such host: ")


def test_a_port_in_use_is_one_line(pool: ranks.RankPool, recipes: Path, tmp_path: Path) -> None:
    settings = arguments(recipes, "lm", "zero2", tmp_path / "run")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        answers = pool.run(2, ranks.train_unless, settings, 1, str(port))
    assert answers[0].startswith(f"rank 0: port {port} is in use: give another one (MASTER_PORT")
    assert "\n" not in answers[0] and not (tmp_path / "run").exists()


def test_a_second_process_of_one_rank_is_refused_and_the_others_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(parallel.free_port()))
    meet = parallel._meet
    with ThreadPoolExecutor(3) as threads:
        first, second = (threads.submit(meet, Ranks(rank, 3, rank)) for rank in (0, 1))
        time.sleep(0.5)
        with pytest.raises(UserError, match="has a rank 1 already: is it the port of another run"):
            meet(Ranks(1, 3, 1))
        third = meet(Ranks(2, 3, 2))
        third.set("key", "value")
        assert first.result().get("key") == second.result().get("key") == b"value"


def test_a_rank_that_waits_in_vain_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(parallel.free_port()))
    monkeypatch.setattr(parallel, "SILENT_WAIT", 0.1)
    monkeypatch.setattr(parallel, "LONGEST_WAIT", 0.5)
    with pytest.raises(
        UserError, match="rank 1 of 2 waits for rank 0 at 127.0.0.1:.*for 1 s now: is it started"
    ):
        parallel._meet(Ranks(1, 2, 1))
    assert capsys.readouterr().err.count("rank 1 of 2 waits for rank 0 at 127.0.0.1:") == 1


RANK = """
import pathlib, sys, time
from pipeline.parallel.signals import StopSignals
stop, folder = StopSignals(), pathlib.Path(sys.argv[1])
(folder / "ready").touch()
while not stop.received:
    time.sleep(0.02)
(folder / "stopped").write_text(stop.received)
"""


@pytest.mark.parametrize("which", ["launch.py", "deepspeed", "sllm train"])
def test_a_rank_notices_that_its_launcher_has_ended(which: str, tmp_path: Path) -> None:
    # Each waits for the next, as DeepSpeed's runner for launch.py, and that for the ranks.
    script = f"{sys.executable} -c '{RANK}' {tmp_path} & wait"
    environment = os.environ | {"CROSS_SIZE": "1"}
    if which == "deepspeed":
        (tmp_path / "launch.sh").write_text(script)
        script = f"sh {tmp_path / 'launch.sh'} & wait"
    other = subprocess.Popen(["sleep", "60"])
    if which == "sllm train":
        environment["SLLM_LAUNCHER"] = str(other.pid)
    with subprocess.Popen(["sh", "-c", script], cwd=REPOSITORY, env=environment) as launcher:
        wait_for((tmp_path / "ready").exists)
        below = psutil.Process(launcher.pid).children(recursive=True)
        ended = other if which == "sllm train" else launcher
        ended.kill()
        ended.wait()
        wait_for((tmp_path / "stopped").exists, 20)
        assert (tmp_path / "stopped").read_text() == "SIGTERM"
        _, alive = psutil.wait_procs(below, 20)
        assert not alive
    other.kill()
    other.wait()
