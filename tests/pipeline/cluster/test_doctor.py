"""`sllm doctor`: every bad machine is named. Real ranks, real gloo; SLURMD_NODENAME makes a rank a machine.

The same on a Slurm cluster: tests/cluster/test_slurm.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from helpers import ranks

from data_prep.common.errors import UserError
from pipeline.cluster import doctor, rendezvous
from pipeline.cluster import machine as doctor_machine
from pipeline.cluster import network as doctor_network
from pipeline.cluster.options import Checks
from pipeline.cluster.rendezvous import Meeting
from pipeline.parallel.ranks import Ranks

pytestmark = pytest.mark.launch

MACHINES = ["node1", "node2", "node3"]


def names(*hosts: str) -> list[dict[str, str]]:
    return [{"SLURMD_NODENAME": host, "PATH": "/usr/bin:/bin"} for host in hosts]


def meet(world: int, talk, hosts: list[str] | None = None, timeout: float = 60.0) -> list:
    """Run `talk(meeting)` on `world` ranks that are threads here; results by rank, exceptions among them."""
    port, results = ranks.free_port(), [None] * world

    def one(rank: int) -> None:
        try:
            host = hosts[rank] if hosts else f"node{rank + 1}"
            with Meeting(Ranks(rank, world, 0), host, "127.0.0.1", port, timeout) as meeting:
                results[rank] = talk(meeting)
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_fit_machines(pool: ranks.RankPool, tiny_shards: Path, tmp_path: Path) -> None:
    """Two ranks on each of two machines and one on a third: nothing is wrong, every pair is measured."""
    where = ["--shards", str(tiny_shards), "--output_dir", str(tmp_path / "new/run"), "--free_gb", "0"]
    hosts = names("node1", "node1", "node2", "node2", "node3")
    answers = pool.run(5, ranks.doctor, [*where, "--deep", "--json"], hosts)
    assert [status for status, _, _ in answers] == [0] * 5, answers
    assert [(out, err) for _, out, err in answers[1:]] == [("", "")] * 4
    report = json.loads(answers[0][1])
    assert (report["ok"], report["problems"], report["hosts"]) == (True, [], MACHINES)
    assert report["network"]["backend"] == "gloo"
    assert report["network"]["all_reduce_gbps"] > 0
    between = {tuple(pair["between"]) for pair in report["network"]["pairs"]}
    assert between == {("node1", "node2"), ("node1", "node3"), ("node2", "node3")}
    assert all(abs(offset) < 1 for offset in report["clock_offsets"].values())
    assert report["shards"][0]["verified"] == report["shards"][0]["shards"]
    assert list((tmp_path / "new/run").iterdir()) == []  # nothing left behind


def test_bad_machines_are_named(pool: ranks.RankPool, tiny_shards: Path, tmp_path: Path) -> None:
    """node2 has another release of a package and a card that alters what it sends, node3 a damaged shard."""
    other = tmp_path / "site/deepspeed-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1\n")
    hosts = names(*MACHINES)
    hosts[1]["SITE"] = str(other.parent)
    hosts[1]["SPOIL"] = "yes"
    for host, variables in zip(MACHINES, hosts, strict=True):
        variables["CWD"] = str(tmp_path / host)
        (tmp_path / host).mkdir()
        shutil.copytree(tiny_shards, tmp_path / host / "shards")
    tar = sorted((tmp_path / "node3/shards").glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    arguments = ["--shards", "shards", "--output_dir", str(tmp_path / "run"), "--free_gb", "0", "--deep"]
    answers = pool.run(3, ranks.doctor, arguments, hosts)
    assert [status for status, _, _ in answers] == [1, 1, 1], answers
    lines = answers[0][2].splitlines()
    assert any(line.startswith("sllm doctor: node2: deepspeed 0.1, but 2 others have ") for line in lines), (
        lines
    )
    shard = [line for line in lines if line.startswith("sllm doctor: node3: shard ")]
    assert len(shard) == 1 and tar.name in shard[0] and "sha256" in shard[0], lines
    # What node2 sends is wrong: the others report it. All sums are wrong, too.
    wrong = [line for line in lines if "receives wrong data from node2" in line]
    assert [line.split(": ")[1] for line in wrong] == ["node1", "node3"], lines
    assert len([line for line in lines if "all-reduce gives wrong sums" in line]) == 2, lines
    assert len(lines) == 2 + 4, lines
    assert "all-reduce" in answers[0][1]


def test_a_slow_processor_and_a_slow_disk_are_named(pool: ranks.RankPool, tmp_path: Path) -> None:
    hosts = names(*MACHINES)
    hosts[1]["SLOW"] = "yes"
    arguments = ["--output_dir", str(tmp_path / "run"), "--free_gb", "0", "--json"]
    answers = pool.run(3, ranks.doctor, arguments, hosts)
    report = json.loads(answers[0][1])
    assert report["ok"], "slow is no reason not to start"
    compute = [line for line in report["warnings"] if "GFLOP/s" in line]
    disk = [line for line in report["warnings"] if "writes " in line and ", others " in line]
    assert len(compute) == 1 and compute[0].startswith("node2: rank 1 computes "), report
    assert len(disk) == 1 and disk[0].startswith("node2: writes "), report


def test_slow_ranks_are_compared_with_the_median() -> None:
    assert doctor._slow({0: 100.0, 1: 75.0}, 0.8) == [(1, 100.0)]
    assert doctor._slow({0: 100.0, 1: 85.0, 2: None}, 0.8) == []
    assert doctor._slow({0: 100.0, 1: 101.0, 2: 70.0, 3: 99.0}, 0.8) == [(2, 100.0)]
    assert doctor._slow({0: None}, 0.8) == []


def test_full_and_separate_disks(tmp_path: Path) -> None:
    facts = doctor_machine.disk(str(tmp_path), 1e18)
    assert "are needed" in facts["problems"][0] and str(tmp_path) in facts["problems"][0]
    assert facts["write"] > 0
    (tmp_path / "file").write_text("")
    [problem] = doctor_machine.disk(str(tmp_path / "file"), 0)["problems"]
    assert problem.startswith("cannot write to")
    (tmp_path / "token").write_text("x")
    assert doctor_machine.is_visible(str(tmp_path / "token"), "x")


def test_slow_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(output_dir=str(tmp_path), free_gb=0)
    meeting = Meeting(Ranks(0, 1, 0), "node1", "", 0, 1.0)
    assert doctor.examine(meeting, checks)["warnings"] == []
    monkeypatch.setattr(doctor_machine, "SLOW_DISK", float("inf"))
    report = doctor.examine(meeting, checks)
    assert report["ok"] and report["warnings"][0].startswith("node1: writes only ")
    assert f"MB/s to {tmp_path}" in doctor.format_report(report)


def test_unseen_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "VISIBLE_SECONDS", 0.0)
    assert not doctor_machine.is_visible(str(tmp_path / "token"), "x")


def test_shards_missing_cut_and_altered(tiny_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_shards, copy)
    tar = sorted(copy.glob("*.tar"))[0]

    def look(deep: bool) -> list[str]:
        return doctor_machine.shards(str(copy), 0, 1, 0, 1, deep)["problems"]

    assert look(False) == look(True) == []
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1])
    assert "sha256" in look(True)[0]
    tar.unlink()
    assert str(tar) in look(False)[0] and "No such file" in look(False)[0]
    (copy / "manifest.json").unlink()
    assert "manifest.json" in look(False)[0]


def test_ranks_that_stay_away_or_fall_silent_are_named() -> None:
    with pytest.raises(
        UserError, match=r"1 of 2 ranks did not reach node1:\d+ within 0 s: 1; here are node1"
    ):
        Meeting(Ranks(0, 2, 0), "node1", "127.0.0.1", ranks.free_port(), 0.2)

    def talk(meeting: Meeting) -> list:
        if meeting.ranks.rank == 2:
            return []  # leaves
        return meeting.exchange(meeting.ranks.rank)

    first, second, _ = meet(3, talk)
    assert "no answer from node3 (rank 2)" in str(first)
    assert "rank 0" in str(second)


def test_clock_offsets() -> None:
    """One machine's clock is 100 s ahead."""

    def talk(meeting: Meeting) -> dict[int, float]:
        ahead = 100 if meeting.ranks.rank == 1 else 0
        return meeting.clock_offsets([0, 1, 2], lambda: time.time() + ahead)

    first, *others = meet(3, talk)
    assert others == [{}, {}]
    assert abs(first[1] - 100) < 30 and abs(first[2]) < 30


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_pair_meets_once_in_disjoint_rounds(count: int) -> None:
    leaders = [10 * n for n in range(count)]
    met = {rank: list(doctor_network.schedule(leaders, rank)) for rank in leaders}
    for rank, peers in met.items():
        assert sorted(peers) == [other for other in leaders if other != rank]
    # No circle of waiting: in the given order, all exchanges take place.
    while any(met.values()):
        pairs = [(a, met[a][0]) for a in met if met[a] and met[met[a][0]][0] == a]
        assert pairs
        for rank, _ in pairs:
            met[rank].pop(0)
    assert list(doctor_network.schedule(leaders, 5)) == []


def test_differences_and_slow_pairs() -> None:
    lines = doctor._differences({h: {"torch": "2" if h == "c" else "1"} for h in "abcd"})
    assert lines == ["c: torch 2, but 3 others have 1"]
    assert doctor._differences({"a": {"x": "1"}, "b": {}}) == ["b: x is missing, but a has 1"]
    pairs = [
        {"between": [a, b], "gbps": 1.0 if "c" in (a, b) else 10.0}
        for a, b in ("ab", "ac", "ad", "bc", "bd", "cd")
    ]
    pairs.append({"between": ["a", "e"], "gbps": 10.0})
    pairs += [{"between": [x, "e"], "gbps": 10.0} for x in "bd"] + [{"between": ["c", "e"], "gbps": 1.0}]
    problems, warnings = doctor._slow_pairs(pairs, 5.0)
    assert problems == ["c: slow to every other machine, at most 1.00 Gbit/s, less than 5"]
    assert warnings == ["c: slow to every other machine, at most 1.00 Gbit/s, others have 10.00"]
    # Of three or four machines a slow one is in half of the pairs or more.
    for hosts in ("abc", "abcd"):
        few = [pair for pair in pairs if set(pair["between"]) <= set(hosts)]
        assert doctor._slow_pairs(few, 0.0) == ([], warnings)
    assert doctor._slow_pairs([{"between": ["a", "b"], "gbps": 1.0}], 0.0) == ([], [])
    assert doctor._slow_pairs([{"between": ["a", "b"], "gbps": 1.0}], 2.0)[0] == [
        "a and b: 1.00 Gbit/s, less than 2"
    ]


MIB = 1 << 20


def fake_driver(
    monkeypatch: pytest.MonkeyPatch, *cards: tuple[str, int, int, int | None, int | None]
) -> None:
    """A driver that reports `cards`: name, MiB in all and in use, uncorrected errors, pages to retire."""

    def or_unsupported(value: int | None) -> int:
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
        "nvmlSystemGetDriverVersion": lambda: "550.1",
        "nvmlDeviceGetName": lambda card: card[0],
        "nvmlDeviceGetMemoryInfo": lambda card, _: SimpleNamespace(total=card[1] * MIB, used=card[2] * MIB),
        "nvmlDeviceGetTemperature": lambda card, _: 30,
        "nvmlDeviceGetTotalEccErrors": lambda card, kind, counter: or_unsupported(card[3]),
        "nvmlDeviceGetRetiredPagesPendingStatus": lambda card: or_unsupported(card[4]),
    }.items():
        monkeypatch.setattr(pynvml, name, answer)


def test_sick_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    fake_driver(monkeypatch, ("H100", 81559, 10, 0, 0), ("H100", 81559, 70000, 3, 1))
    facts = doctor_machine.gpus(4)
    assert [gpu["name"] for gpu in facts["gpus"]] == ["H100", "H100"]
    assert [line.split(":")[0] for line in facts["problems"]] == ["GPU 1 (H100)"] * 3 + ["2 GPUs for 4 tasks"]
    fake_driver(monkeypatch, ("RTX", 24000, 10, None, None))
    assert doctor_machine.gpus(1)["problems"] == []

    def fail(error: int) -> Callable[..., None]:
        def function(*_: object) -> None:
            raise pynvml.NVMLError(error)

        return function

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", fail(pynvml.NVML_ERROR_GPU_IS_LOST))
    problems = doctor_machine.gpus(1)["problems"]
    assert problems == ["GPU 0 fails: GPU is lost", "0 GPUs for 1 task"]
    monkeypatch.setattr(pynvml, "nvmlInit", fail(pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    assert doctor_machine.gpus(1)["problems"] == ["the NVIDIA driver fails: Driver Not Loaded"]
    monkeypatch.setattr(pynvml, "nvmlInit", fail(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert doctor_machine.gpus(1) == {"gpus": [], "problems": []}


def test_alone_and_quick(tmp_path: Path) -> None:
    """One machine without a launcher: no torch is imported."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "pipeline.cli",
        "doctor",
        "--output_dir",
        str(tmp_path),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD"))}
    done = subprocess.run([*command, "--free_gb", "0"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-500:]
    assert "verdict    fit" in done.stdout
    assert not any(line.rsplit("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
    missing = [sys.executable, "-m", "pipeline.cli", "doctor", "--shards", str(tmp_path / "none")]
    done = subprocess.run(missing, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "does not exist" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_rank_that_is_killed_is_missed_before_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "LOST_SECONDS", 1.0)
    port, limit = ranks.free_port(), 120.0
    script = f"""
import time
from pipeline.cluster.rendezvous import Meeting
from pipeline.parallel.ranks import Ranks
meeting = Meeting(Ranks(1, 2, 1), "node2", "127.0.0.1", {port}, {limit})
print(flush=True)
time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        meeting = Meeting(Ranks(0, 2, 0), "node1", "127.0.0.1", port, limit)
        other.stdout.readline()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    began = time.monotonic()
    with pytest.raises(UserError, match="no answer from node2"):
        meeting.exchange("here")
    assert time.monotonic() - began < limit / 2
