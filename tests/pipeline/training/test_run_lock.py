"""One run in a folder at a time; a lock that a crash has left is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ranks
from helpers.paths import REPOSITORY
from helpers.runs import arguments, losses

from data_prep.common.errors import UserError
from pipeline.training.run_lock import LOCK, locked

HOLDER = """
import pathlib, sys
from pipeline.training.run_lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_has_ended(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "lm", "zero2", tmp_path / "run", "--training.max_steps", 2)
    with locked(tmp_path / "run"):
        message, status = pool.run(2, ranks.train, settings)
        assert status == 2
        assert message.startswith(
            f"{tmp_path / 'run'} is in use by process {os.getpid()} on {platform.node()}: "
        )
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert not (tmp_path / "run").exists()
    assert pool.run(2, ranks.train, settings) == [0, 0]
    assert len(losses(tmp_path / "run")) == 2 and not (tmp_path / "run" / LOCK).exists()


def test_a_lock_that_a_killed_process_has_left_is_no_obstacle(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text("process 1 on another-machine\n")
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {platform.node()}\n"
    assert not (tmp_path / LOCK).exists()


def test_a_disk_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked (No locks available): start no second run there" in capsys.readouterr().err
