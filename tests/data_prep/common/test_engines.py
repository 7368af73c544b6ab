"""Engines: killed workers, errors, and processes that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_prep.common.engines import ProcessPool, dask_engine, run_here
from data_prep.common.errors import UserError

pytestmark = pytest.mark.launch


@dataclass(frozen=True)
class Task:
    folder: Path
    number: int
    deadly: str = ""  # kill the process each time, or once, or raise

    @property
    def name(self) -> str:
        return f"input {self.number}"

    def is_started(self) -> bool:
        return (self.folder / f"{self.number}.started").exists()

    def is_done(self) -> bool:
        return (self.folder / f"{self.number}.done").exists()

    def runs(self) -> int:
        path = self.folder / f"{self.number}.runs"
        return path.stat().st_size if path.exists() else 0


def run(task: Task, watch=lambda: None) -> None:
    started = task.folder / f"{task.number}.started"
    started.touch()
    with open(task.folder / f"{task.number}.runs", "ab") as log:
        log.write(b"x")
    if task.deadly == "always" or (task.deadly == "once" and task.runs() == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if task.deadly == "error":
        raise UserError("no room")
    time.sleep(0.02)
    (task.folder / f"{task.number}.done").touch()
    started.unlink(missing_ok=True)  # Dask may run a task twice at the same time


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs=50) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(params=["here", "pool", "dask"])
def engine(request: pytest.FixtureRequest) -> Iterator:
    if request.param == "dask":
        opened = dask_engine(request.getfixturevalue("scheduler"))
    else:
        opened = ProcessPool(3) if request.param == "pool" else nullcontext(run_here)
    with opened as running:
        yield running


def test_every_task_runs_once_and_an_error_is_raised(engine, tmp_path: Path):
    tasks = [Task(tmp_path, number) for number in range(12)]
    seen = []
    engine(run, tasks, lambda: seen.append(1))
    assert [task.runs() for task in tasks] == [1] * 12 and seen
    with pytest.raises(UserError, match="no room"):
        engine(run, [Task(tmp_path, 20), Task(tmp_path, 21, "error")], lambda: None)


def test_of_tasks_that_kill_their_process_only_those_that_always_do_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture
):
    deadly = {3: "once", 5: "always", 8: "always", 9: "once"}
    tasks = [Task(tmp_path, number, deadly.get(number, "")) for number in range(12)]
    with ProcessPool(3) as pool, pytest.raises(UserError) as refused:
        pool(run, tasks, lambda: None)
    assert "input 5" in str(refused.value) and "input 8" in str(refused.value)
    assert "input 3" not in str(refused.value) and "input 9" not in str(refused.value)
    assert all(task.runs() for task in tasks)
    assert [task.number for task in tasks if task.is_started()] == [5, 8]
    assert "a worker process was killed (out of memory?)" in capfd.readouterr().err


@pytest.mark.long
def test_dask_names_a_task_that_kills_every_worker(scheduler: str, tmp_path: Path):
    tasks = [Task(tmp_path, number, "always" if number == 2 else "") for number in range(6)]
    with (
        dask_engine(scheduler) as engine,
        pytest.raises(UserError, match="read input 2 was killed each time"),
    ):
        engine(run, tasks, lambda: None)
    # Not `is_started`: Dask repeats tasks whose results died with a worker, though their results are known by
    # then, and another death may end the repeated run.
    assert [task.number for task in tasks if not task.is_done()] == [2]


def test_no_scheduler_is_one_clear_line():
    with pytest.raises(UserError, match="no Dask scheduler answers at nowhere"), dask_engine("nowhere"):
        raise AssertionError


SLEEPERS = """
import time
from data_prep.common.engines import ProcessPool
def sleep(task):
    time.sleep(1000)
with ProcessPool(2) as pool:
    pool(sleep, [1, 2], lambda: print("running", flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_within_a_second_of_their_parent(tmp_path: Path, number: int):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "sleepers.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert parent.stdout.readline() == b"running\n"
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.send_signal(number)
    _, alive = psutil.wait_procs([psutil.Process(parent.pid), *workers], timeout=5)
    for process in alive:
        process.kill()
    parent.communicate()
    assert not alive


STARTING = """
import sys, threading, time
from data_prep.common.engines import ProcessPool
from data_prep.common.errors import run_main
def sleep(task):
    time.sleep(1000)
def main():
    if sys.argv[1:] == ["spawn"]:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    with ProcessPool(2) as pool:
        pool(sleep, [1, 2], lambda: None)
if __name__ == "__main__":
    sys.exit(run_main("prog", main))
"""


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_ctrl_c_while_workers_start_is_one_line(tmp_path: Path, how: str):
    (tmp_path / "starting.py").write_text(STARTING)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "starting.py", how],
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while parent.poll() is None and not psutil.Process(parent.pid).children():
        time.sleep(0.005)
    time.sleep(0.05)  # a spawned worker is still importing
    os.killpg(parent.pid, signal.SIGINT)
    _, err = parent.communicate(timeout=10)
    assert (parent.returncode, err) == (130, b"prog: interrupted\n")
