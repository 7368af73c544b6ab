"""Sharing work through a folder: every unit runs once, dead holders are replaced, results are complete."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from data_prep.jobs import executor
from data_prep.jobs.executor import RECORD, Phase, WorkFolder, run_in_processes, run_phases

pytestmark = pytest.mark.launch

UNITS = 12


def work_folder(folder: Path) -> WorkFolder:
    return WorkFolder(folder / "work", (folder / "finished").is_file)


def run_unit(folder: Path, unit: int, staging: Path, heartbeat, seconds: float = 0.05) -> None:
    with open(folder / "runs.log", "a") as log:  # O_APPEND: one line per write, from any process
        log.write(f"{unit} {os.getpid()}\n")
    time.sleep(seconds)
    heartbeat({"bytes": unit})
    (staging / RECORD).write_text(json.dumps({"unit": unit}))


def work(folder: Path, seconds: float = 0.05) -> None:
    run_phases(work_folder(folder), [Phase("a", range(UNITS), partial(run_unit, folder, seconds=seconds))])


def runs(folder: Path) -> list[tuple[int, int]]:
    return [tuple(map(int, line.split())) for line in (folder / "runs.log").read_text().splitlines()]


def check_results(folder: Path) -> None:
    for unit in range(UNITS):
        assert json.loads((folder / f"work/a/{unit:06d}" / RECORD).read_text()) == {"unit": unit}
    assert list((folder / "work/claims").iterdir()) == []
    assert not any((folder / "work/aside").iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path


def test_processes_share_the_units(folder: Path):
    run_in_processes(3, partial(work, folder), lambda: None)
    check_results(folder)
    assert sorted(unit for unit, _ in runs(folder)) == list(range(UNITS))  # each once
    assert len({pid for _, pid in runs(folder)}) == 3


def test_the_unit_of_a_killed_process_is_done_by_another(folder: Path):
    context = multiprocessing.get_context("spawn")
    slow = context.Process(target=work, args=(folder, 1000.0))
    slow.start()
    while not (folder / "runs.log").exists() or not runs(folder):
        time.sleep(0.02)
    os.kill(slow.pid, signal.SIGKILL)
    slow.join()
    began = time.monotonic()
    work(folder)
    assert time.monotonic() - began < executor.STALE_SECONDS / 2  # a dead process is seen at once
    check_results_but_leftovers(folder)
    assert [unit for unit, pid in runs(folder) if pid == slow.pid] == [0]


def check_results_but_leftovers(folder: Path) -> None:
    for leftover in (folder / "work/aside").iterdir():
        for path in leftover.iterdir():
            path.unlink()
        leftover.rmdir()
    check_results(folder)


def grab(folder: Path, gate, taken) -> None:
    mine = work_folder(folder)
    gate.wait()
    taken.put((os.getpid(), mine.acquire("a", [0])))
    gate.wait()  # a process that has ended is dead to the others, and its lock free


def test_exactly_one_process_takes_over_a_stale_lock(folder: Path):
    context = multiprocessing.get_context("fork")
    dead = context.Process(target=time.sleep, args=(1000,))
    dead.start()
    lock = folder / "work/claims/a-000000-0"
    lock.parent.mkdir()
    dead_holder = {"machine": executor._machine(), "pid": dead.pid, "start": executor._start_time(dead.pid)}
    dead.kill()
    dead.join()
    for _ in range(25):
        lock.write_text(json.dumps({"holder": dead_holder}))
        gate, taken = context.Barrier(4), context.SimpleQueue()
        racers = [context.Process(target=grab, args=(folder, gate, taken)) for _ in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        got = dict(taken.get() for _ in racers)
        (holder,) = [pid for pid, unit in got.items() if unit == 0]
        successor = lock.with_name("a-000000-1")
        assert json.loads(successor.read_text())["holder"]["pid"] == holder
        successor.unlink()


def take_all(folder: Path, units: int) -> None:
    mine = work_folder(folder)
    for unit in range(units):
        mine.acquire("a", [unit])


def test_a_lock_is_created_with_its_holder(folder: Path):
    """Otherwise a holder killed right after would be treated as one on another machine."""
    units, locks = 2000, folder / "work/claims"
    holder = multiprocessing.get_context("fork").Process(target=take_all, args=(folder, units))
    holder.start()
    for unit in range(units):
        path = locks / f"a-{unit:06d}-0"
        while not path.exists():
            assert holder.is_alive() or path.exists()
        assert json.loads(path.read_bytes())["holder"]["pid"] == holder.pid
    holder.join()


def test_a_paused_holder_does_not_disturb_its_successor(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executor, "STALE_SECONDS", 0.0)
    monkeypatch.setattr(executor, "HEARTBEAT_SECONDS", 0.0)
    paused, successor = work_folder(folder), work_folder(folder)
    monkeypatch.setattr(executor, "_machine", lambda: "one")
    assert paused.acquire("a", [0]) == 0
    with paused.hold("a", 0) as (staging, heartbeat):
        (staging / RECORD).write_text("late")
        monkeypatch.setattr(executor, "_machine", lambda: "another")  # judged by time alone
        assert successor.acquire("a", [0]) == 0
        monkeypatch.setattr(executor, "STALE_SECONDS", 1000.0)
        with successor.hold("a", 0) as (staging_too, _):
            heartbeat({"bytes": 1})
            assert (
                work_folder(folder).acquire("a", [0]) is None
            )  # the heartbeat of a lock that is no longer valid
            (staging_too / RECORD).write_text("in time")
    assert (successor.result("a", 0) / RECORD).read_text() == "in time"
    assert list((folder / "work/claims").iterdir()) == []


@pytest.mark.parametrize("name", [RECORD, executor.SIZES, "data"])
def test_a_truncated_result_is_not_complete(folder: Path, name: str):
    mine = work_folder(folder)
    assert mine.acquire("a", [0]) == 0
    with mine.hold("a", 0) as (staging, _):
        (staging / RECORD).write_text("{}")
        (staging / "data").write_text("1234")
    assert mine.is_complete("a", 0)
    path = mine.result("a", 0) / name
    path.write_bytes(path.read_bytes()[:-1])
    assert not mine.is_complete("a", 0)
    path.rename(folder / "elsewhere")
    assert not mine.is_complete("a", 0)
    if name == "data":
        (folder / "elsewhere").write_text("1234")
        assert mine.is_complete("a", 0, {"data": folder / "elsewhere"}.get)


def test_a_late_holder_of_finished_work_ends_without_an_error(folder: Path):
    mine = work_folder(folder)
    assert mine.acquire("a", [0]) == 0
    with mine.hold("a", 0) as (staging, _):
        (folder / "finished").touch()
        shutil.rmtree(folder / "work")
        (staging / RECORD).write_text("{}")  # its folder is gone
    assert not (folder / "work").exists()


def test_a_lock_of_another_machine_is_live_while_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executor, "STALE_SECONDS", 0.6)
    elsewhere = {"machine": "another", "pid": os.getpid(), "start": "0"}
    lock = folder / "work/claims/a-000000-0"
    lock.parent.mkdir()
    mine = work_folder(folder)

    def heartbeat(n: int) -> None:
        lock.write_text(json.dumps({"holder": elsewhere, "at": n}))

    began = time.monotonic()
    n = 0
    while time.monotonic() - began < 1.5:  # alive, though far longer than STALE_SECONDS
        heartbeat(n := n + 1)
        assert mine.acquire("a", [0]) is None
        time.sleep(0.05)
    silent = time.monotonic()
    while mine.acquire("a", [0]) is None:
        assert time.monotonic() - silent < 30
        time.sleep(0.05)
    assert time.monotonic() - silent > 0.5


def test_a_second_result_for_one_unit_is_dropped(folder: Path):
    """Two holders at once (one was taken for dead): the first result stays, and no process fails."""
    mine = work_folder(folder)
    assert mine.acquire("a", [0]) == 0
    with mine.hold("a", 0) as (staging, _):
        (staging / RECORD).write_text("late")
        published = mine.result("a", 0)
        published.mkdir(parents=True)
        (published / RECORD).write_text("early")
    assert (published / RECORD).read_text() == "early"
    assert not staging.exists()


def test_an_error_is_reported_and_the_unit_is_released(folder: Path):
    def fail(unit: int, staging: Path, heartbeat) -> None:
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        run_phases(work_folder(folder), [Phase("a", [0], fail)])
    assert list((folder / "work/claims").iterdir()) == []
    work(folder)
    check_results(folder)


def fail_in_process(folder: Path) -> None:
    raise UserError(f"cannot use {folder.name}")


def test_an_error_in_a_process_reaches_the_parent(folder: Path):
    with pytest.raises(UserError, match=f"cannot use {folder.name}"):
        run_in_processes(2, partial(fail_in_process, folder), lambda: None)


def test_an_error_of_processes_that_end_at_once_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch):
    process = multiprocessing.process.BaseProcess
    monkeypatch.setattr(process, "is_alive", lambda self: self.join() is not None)  # ended before it is asked
    with pytest.raises(UserError, match=f"cannot use {folder.name}"):
        run_in_processes(2, partial(fail_in_process, folder), lambda: None)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_reported():
    with pytest.raises(UserError, match="a worker process was killed"):
        run_in_processes(2, kill_self, lambda: None)


def test_a_folder_that_is_gone_ends_the_wait(folder: Path):
    (folder / "work").rmdir()
    with pytest.raises(UserError, match="another process gave up"):
        work(folder)


def test_finished_work_is_not_started(folder: Path):
    (folder / "finished").touch()
    work(folder)
    assert not (folder / "runs.log").exists()
