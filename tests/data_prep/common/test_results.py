"""Results published through a folder: complete or absent, made once, also when several runs are at work."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from data_prep.common.results import RECORD, SIZES, Incomplete, WorkFolder


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    (tmp_path / "work").mkdir()
    return work_folder(tmp_path)


def work_folder(folder: Path) -> WorkFolder:
    return WorkFolder(folder / "work", (folder / "finished").is_file)


def write(folder: Path) -> None:
    (folder / RECORD).write_text("{}")
    (folder / "data").write_text("1234")


@pytest.mark.parametrize("name", [RECORD, SIZES, "data"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_truncated_result_is_discarded(work: WorkFolder, name: str, cut: bool):
    with work.lock():
        for unit in (0, 1):
            work.make("a", unit, write)
        work.require("a", [0, 1])
        path = work.result("a", 0) / name
        path.write_bytes(path.read_bytes()[:-1]) if cut else path.unlink()
        with pytest.raises(Incomplete):
            work.require("a", [0, 1])
        assert work.done("a") == {1}
        work.make("a", 0, write)
        work.require("a", [0, 1])


def test_a_result_is_made_once_and_an_error_publishes_nothing(work: WorkFolder):
    def fail(folder: Path) -> None:
        write(folder)
        raise OSError("no room")

    with work.lock():
        with pytest.raises(OSError, match="no room"):
            work.make("a", 0, fail)
        assert work.done("a") == set() and not list(work.staging("a"))
        work.make("a", 0, write)
        work.make("a", 0, fail)  # is not called


def test_of_two_results_for_one_unit_the_first_stays(work: WorkFolder):
    def late(folder: Path) -> None:
        (folder / RECORD).write_text("late")
        work_folder(work.folder.parent).make("a", 0, write)

    with work.lock():
        work.make("a", 0, late)
    assert (work.result("a", 0) / RECORD).read_text() == "{}"
    assert not list(work.staging("a"))


def test_a_unit_whose_folder_another_run_removes_is_made_again(work: WorkFolder):
    calls = []

    def disturbed(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:
            work_folder(work.folder.parent).remove_staging("a", [0])
        write(folder)

    with work.lock():
        work.make("a", 0, disturbed)
    assert len(calls) == 2 and work.done("a") == {0}


def test_a_late_process_of_finished_work_ends_without_an_error(work: WorkFolder):
    def late(folder: Path) -> None:
        (work.folder.parent / "finished").touch()
        shutil.rmtree(work.folder)
        write(folder)

    with work.lock():
        work.make("a", 0, late)
    assert not work.folder.exists()
    with pytest.raises(Incomplete), work.lock():
        raise AssertionError


def test_a_folder_that_another_run_gave_up_is_reported(work: WorkFolder):
    shutil.rmtree(work.folder)
    with pytest.raises(UserError, match="another process gave up"), work.lock():
        raise AssertionError


def hold(folder: Path, shared: bool, held) -> None:
    with work_folder(folder).lock(shared):
        held.put(time.monotonic())
        time.sleep(0.5)
    held.put(time.monotonic())


@pytest.mark.parametrize(
    ("one", "other", "waits"), [(False, False, True), (True, False, True), (True, True, False)]
)
def test_runs_wait_for_each_other_unless_they_share(
    work: WorkFolder, capfd: pytest.CaptureFixture, one: bool, other: bool, waits: bool
):
    context = multiprocessing.get_context("spawn")
    held = context.SimpleQueue()
    holder = context.Process(target=hold, args=(work.folder.parent, one, held))
    holder.start()
    since = held.get()
    with work.lock(other):
        assert (time.monotonic() - since >= 0.5) == waits
    holder.join()
    assert ("another run is at work" in capfd.readouterr().err) == waits
