"""Twenty `kill -9` of workers and of the parent on each engine end in the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import tokenizer_folders
from helpers.data_prep_command import COMMAND, call, contents
from helpers.mpi import MPIRUN, mpi_environment
from helpers.paths import REPOSITORY

pytestmark = [pytest.mark.launch, pytest.mark.long]

KILLS = 20


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "EN").mkdir()
    texts = [f"{n} " + tokenizer_folders.ENGLISH * 4 for n in range(5000)]
    lines = [json.dumps({"id": str(n), "content": text}) for n, text in enumerate(texts)]
    (folder / "EN/part.jsonl").write_text("\n".join(lines))
    tokenizer = tokenizer_folders.byte_level(folder / "tokenizer")
    sizes = ["--unit-mb", "0.03", "--shard-documents", "100"]
    return ["shard", "--input", f"{folder}/EN", "--tokenizer", str(tokenizer), *sizes]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "shards"
    assert call(*arguments, "--output", output, "--workers", "2") == 0
    return contents(output)


def descendants(process: subprocess.Popen | psutil.Process) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_again_and_again(
    command: list[str], output: Path, whole: dict[str, bytes], workers=descendants
) -> None:
    """Kill one of `workers(parent)`, the parent, and all at once in turn, each after some more units.

    A run that a killed worker has ended is started again, and nothing may be left of it. A set that is
    finished before the last kill must be `whole`, and is made again.
    """
    moments = random.Random(7)
    parent, old = None, []
    published = output / ".unfinished/shard"
    kill = 0
    while kill < KILLS:
        if parent is None or parent.poll() is not None:
            _, alive = psutil.wait_procs(old, timeout=20)
            assert not alive, "the parent is gone, a worker is still there"
            environment = mpi_environment(output.parent)
            parent = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
        wait_for_another(published, parent)
        time.sleep(moments.uniform(0, 0.1))
        if (output / "manifest.json").exists():
            assert parent.wait(timeout=120) == 0 and contents(output) == whole
            shutil.rmtree(output)
            continue
        assert parent.poll() is None
        old = descendants(parent)
        victim = moments.choice(workers(parent)) if kill % 3 == 1 else parent
        (os.killpg if kill % 3 == 2 else os.kill)(victim.pid, signal.SIGKILL)
        if victim is parent or command[0] == MPIRUN[0]:
            parent.wait(timeout=20)
        kill += 1
    if parent.poll() is None:
        parent.wait(timeout=120)
    _, alive = psutil.wait_procs(old, timeout=20)
    assert not alive
    assert subprocess.run(command, cwd=REPOSITORY, env=mpi_environment(output.parent)).returncode == 0
    assert contents(output) == whole


def wait_for_another(published: Path, parent: subprocess.Popen) -> None:
    before, deadline = len(list(published.glob("*"))), time.monotonic() + 120
    while len(list(published.glob("*"))) <= before and parent.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes(arguments: list[str], whole: dict[str, bytes], tmp_path: Path) -> None:
    kill_again_and_again(
        [*COMMAND, *arguments, "--output", f"{tmp_path}/s", "--workers", "3"], tmp_path / "s", whole
    )


def test_mpi(arguments: list[str], whole: dict[str, bytes], tmp_path: Path) -> None:
    kill_again_and_again([*MPIRUN, *COMMAND, *arguments, "--output", f"{tmp_path}/s"], tmp_path / "s", whole)


@pytest.fixture
def cluster() -> Iterator:
    from distributed import LocalCluster

    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None, silence_logs=50) as running:
        yield running


def test_dask(cluster, arguments: list[str], whole: dict[str, bytes], tmp_path: Path) -> None:
    where = ["--backend", "dask", "--scheduler", cluster.scheduler_address]

    def workers(parent: subprocess.Popen) -> list[psutil.Process]:
        running = [nanny.process.pid for nanny in cluster.workers.values() if nanny.process]
        return [psutil.Process(pid) for pid in running if pid and psutil.pid_exists(pid)]

    kill_again_and_again(
        [*COMMAND, *arguments, "--output", f"{tmp_path}/s", *where], tmp_path / "s", whole, workers
    )
