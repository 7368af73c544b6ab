"""`sllm doctor`: checks that the machines of a job are fit to train together, before the first step.

Rank 0 prints the report and one line for every problem, with the name of the machine.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.common.errors import REQUEUE, UserError, counted, describe
from pipeline.cluster import machine as doctor_machine
from pipeline.cluster import network as doctor_network
from pipeline.cluster.options import Checks
from pipeline.cluster.rendezvous import Meeting, ServerLost
from pipeline.parallel.ranks import Ranks, find_ranks, free_port

CLOCK_LIMIT = 2.0  # seconds between any machine's clock and the first one's
SLOW_PAIR = 0.25  # of the median pair, and of the median disk
SLOW_RANK = 0.8  # of the median rank's speed
LONG = 24 * 3600.0  # seconds that reading every shard may take
QUICK = 300.0  # seconds that a look at one machine may take: longer, and a disk hangs


def run(checks: Checks, as_json: bool = False) -> int:
    """The command, on every rank: 0 all well, 1 a problem, 75 stopped by USR1. UserError when the ranks
    cannot meet."""
    decided = _end_on_signals()
    ranks = find_ranks()
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        with Meeting(ranks, host, address, port, checks.timeout) as meeting:
            report = examine(meeting, checks)
            # Before rank 0 waits for the others to leave: the first that ends makes the launcher send TERM.
            decided.set()
            if ranks.rank == 0:
                text = json.dumps(report, allow_nan=False) if as_json else format_report(report)
                print(text, flush=True)
                for line in report["problems"]:
                    print(f"sllm doctor: {line}", file=sys.stderr)
    except ServerLost:
        return 2  # rank 0 has said why
    return 0 if report["ok"] else 1


def _end_on_signals() -> threading.Event:
    """USR1 (preemption, the time limit) ends this process with 75, and TERM with 2 unless the event returned
    is set: the verdict is in.

    The first rank to end makes `srun --kill-on-bad-exit` terminate the others, and a step ends with the
    highest status of all: ranks killed by TERM (143) would hide the 75, so that the job is not requeued,
    and the 1 of a verdict. A thread waits for the signals, since the main one may be blocked in a collective.
    """
    decided, signals = threading.Event(), (signal.SIGUSR1, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while True:
            if signal.sigwait(signals) == signal.SIGUSR1:
                os._exit(REQUEUE)
            if not decided.is_set():
                os._exit(2)

    threading.Thread(target=wait, name="signals", daemon=True).start()
    return decided


def examine(meeting: Meeting, checks: Checks) -> dict[str, Any]:
    """Every check, on every rank; all get the same report (`problems`: lines, each with a machine's name)."""
    ranks, hosts = meeting.ranks, meeting.hosts
    leaders = [rank for rank, host in enumerate(hosts) if hosts.index(host) == rank]
    token = _write_token(checks.output_dir) if ranks.rank == 0 else None
    token = meeting.exchange(token)[0]
    facts = meeting.exchange(
        _look_at_machine(ranks, hosts, leaders, token, checks), LONG if checks.deep else QUICK
    )
    if ranks.rank == 0 and token and token["path"]:
        Path(token["path"]).unlink(missing_ok=True)
    offsets = meeting.clock_offsets(leaders)
    port = meeting.exchange(_free_port() if ranks.rank == 0 else None)[0]
    different = _differences({hosts[rank]: facts[rank]["versions"] for rank in leaders})
    network = None
    # Two releases of torch need not speak the same language: they might wait for each other for ever.
    if ranks.world > 1 and not any("torch " in line for line in different):
        mine = doctor_network.measure(ranks, hosts, leaders, port, checks.timeout)
        network = meeting.exchange(mine)
    report = {
        "hosts": [hosts[rank] for rank in leaders],
        "ranks": ranks.world,
        "versions": facts[0]["versions"],
        "shards": [_shards_of_all(facts, n, leaders) for n in range(len(checks.data))],
        "disks": {hosts[rank]: facts[rank]["disks"] for rank in leaders},
        "gpus": {hosts[rank]: facts[rank]["gpus"]["gpus"] for rank in leaders},
        "clock_offsets": {hosts[rank]: offset for rank, offset in offsets.items()},
        "network": _network(network, hosts) if network else None,
        "warnings": [
            f"{hosts[rank]}: writes only {disk['write'] / 1e6:.1f} MB/s to {disk['folder']}"
            for rank in leaders
            for disk in facts[rank]["disks"]
            if disk["write"] and disk["write"] < doctor_machine.SLOW_DISK
        ],
    }
    for disks in zip(*(facts[rank]["disks"] for rank in leaders), strict=True):
        speeds = {rank: disk["write"] for rank, disk in zip(leaders, disks, strict=True)}
        report["warnings"] += [
            f"{hosts[rank]}: writes {speeds[rank] / 1e6:.1f} MB/s to {disks[0]['folder']}, "
            f"others {usual / 1e6:.1f}"
            for rank, usual in _slow(speeds, SLOW_PAIR)
        ]
    problems = different + list(_machine_problems(facts, hosts))
    problems += _differences({hosts[rank]: _gpu_kinds(facts[rank]["gpus"]["gpus"]) for rank in leaders})
    for n, folder in enumerate(checks.data):
        of_hosts = {hosts[rank]: {folder: facts[rank]["shards"][n]["fingerprint"]} for rank in leaders}
        readable = {host: found for host, found in of_hosts.items() if found[folder]}
        problems += _differences(readable, "other shards: fingerprint of ")
    problems += [
        f"{host}: its clock is {offset:+.1f} s off {hosts[0]}'s: synchronise it (NTP, chrony)"
        for host, offset in report["clock_offsets"].items()
        if abs(offset) > CLOCK_LIMIT
    ]
    if network:
        for host, seen in zip(hosts, network, strict=True):
            problems += [f"{host}: {line}" for line in seen["problems"]]
        speeds = {rank: seen["gflops"] for rank, seen in enumerate(network)}
        report["warnings"] += [
            f"{hosts[rank]}: rank {rank} computes {speeds[rank]:,.0f} GFLOP/s, others {usual:,.0f}"
            for rank, usual in _slow(speeds, SLOW_RANK)
        ]
        slow, warnings = _slow_pairs(report["network"]["pairs"], checks.min_gbps)
        problems += slow
        report["warnings"] += warnings
    return report | {"problems": problems, "ok": not problems}


def _write_token(folder: str | None) -> dict[str, str] | None:
    """A file that the other machines must see, if the folder is what a run directory has to be: shared."""
    if folder is None:
        return None
    for old in Path(folder).glob(".doctor-*"):  # of a doctor that was killed
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    path, content = Path(folder) / f".doctor-token-{secrets.token_hex(6)}", secrets.token_hex(16)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    except OSError:  # the first machine's own look at the folder reports it
        return {"path": "", "content": ""}
    return {"path": str(path), "content": content}


def _look_at_machine(
    ranks: Ranks,
    hosts: list[str],
    leaders: list[int],
    token: dict[str, str] | None,
    checks: Checks,
) -> dict[str, Any]:
    """This rank's facts. All ranks of a machine share the reading of shards; the first does the rest."""
    mine = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    machine, part = leaders.index(mine[0]), mine.index(ranks.rank)
    facts: dict[str, Any] = {
        "shards": [
            doctor_machine.shards(folder, machine, len(leaders), part, len(mine), checks.deep)
            for folder in checks.data
        ],
        "disks": [],
        "gpus": {"gpus": [], "problems": []},
        "problems": [],
    }
    if part:
        return facts
    facts["versions"] = doctor_machine.versions()
    facts["gpus"] = doctor_machine.gpus(len(mine))
    if token and token["path"] and not doctor_machine.is_visible(token["path"], token["content"]):
        facts["problems"].append(
            f"does not see what {hosts[0]} writes in {checks.output_dir}: it is not the same disk there"
        )
    if checks.output_dir:
        facts["disks"].append(doctor_machine.disk(checks.output_dir, checks.free_gb * 1e9))
    if checks.local_dir:
        facts["disks"].append(
            doctor_machine.disk(checks.local_dir, sum(one.get("bytes", 0) for one in facts["shards"]))
        )
    return facts


def _machine_problems(facts: list[dict[str, Any]], hosts: list[str]) -> Iterable[str]:
    """What each machine says of itself, each line once a machine."""
    lines: dict[str, None] = {}
    for host, seen in zip(hosts, facts, strict=True):
        for one in (seen, *seen["shards"], *seen["disks"], seen["gpus"]):
            lines |= dict.fromkeys(f"{host}: {line}" for line in one["problems"])
    return lines


def _differences(values: dict[str, dict[str, Any]], what: str = "") -> list[str]:
    """`values`: by host, then by name. One line for each host that differs from most of the others."""
    lines = []
    for name in dict.fromkeys(name for of_host in values.values() for name in of_host):
        of_hosts = {host: of_host.get(name) for host, of_host in values.items()}
        found = list(of_hosts.values())
        common = max(found, key=found.count)  # a tie: as on the first host
        for host, value in of_hosts.items():
            if value != common:
                agreeing = [other for other, its in of_hosts.items() if its == common]
                have = f"{len(agreeing)} others have" if len(agreeing) > 1 else f"{agreeing[0]} has"
                lines.append(f"{host}: {what}{name} {value or 'is missing'}, but {have} {common or 'none'}")
    return lines


def _gpu_kinds(gpus: list[dict[str, str]]) -> dict[str, str]:
    names = sorted(gpu["name"] for gpu in gpus)
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return {"GPUs:": kinds, "GPU driver": ", ".join(sorted({gpu["driver_version"] for gpu in gpus}))}


def _shards_of_all(facts: list[dict[str, Any]], n: int, leaders: list[int]) -> dict[str, Any]:
    verified = {number for seen in facts for number in seen["shards"][n].get("verified", [])}
    first = next((f["shards"][n] for f in facts if f["shards"][n]["fingerprint"]), facts[0]["shards"][n])
    kept = {key: first.get(key) for key in ("folder", "fingerprint", "shards", "bytes")}
    return kept | {"verified": len(verified)}


def _network(network: list[dict[str, Any]], hosts: list[str]) -> dict[str, Any]:
    """Of the figures of all ranks the slowest: of the all-reduce, and of the two ends of each pair."""
    reduced = [seen["gbps"] for seen in network if seen["gbps"] is not None]
    pairs: dict[tuple[str, str], float] = {}
    for rank, seen in enumerate(network):
        for peer, gbps in seen["pairs"].items():
            pair = hosts[min(rank, int(peer))], hosts[max(rank, int(peer))]
            pairs[pair] = min(gbps, pairs.get(pair, gbps))
    return {
        "backend": network[0]["backend"],
        "all_reduce_gbps": min(reduced, default=None),
        "gflops": [seen["gflops"] for seen in network],
        "pairs": [{"between": list(pair), "gbps": gbps} for pair, gbps in pairs.items()],
    }


def _slow(speeds: dict[int, float | None], share: float) -> list[tuple[int, float]]:
    """Ranks whose speed is below `share` of the median, each with the median; of two ranks it is the faster
    one's."""
    known = {rank: speed for rank, speed in speeds.items() if speed}
    usual = statistics.median_high(known.values()) if known else 0.0
    return [(rank, usual) for rank, speed in known.items() if speed < share * usual]


def _slow_pairs(pairs: list[dict[str, Any]], least: float) -> tuple[list[str], list[str]]:
    """(problems: pairs below `least`, warnings: pairs far below what is usual). A machine all of whose pairs
    are slow is named alone.

    Usual is the median machine's fastest pair: of three machines a slow one is in two of the three pairs.
    """
    if not pairs:
        return [], []
    fastest: dict[str, float] = {}
    for pair in pairs:
        for host in pair["between"]:
            fastest[host] = max(pair["gbps"], fastest.get(host, 0.0))
    usual = statistics.median_high(fastest.values())
    answers = []
    for limit, why in ((least, f"less than {least:g}"), (SLOW_PAIR * usual, f"others have {usual:.2f}")):
        slow = [pair for pair in pairs if pair["gbps"] < limit]
        lines = []
        for host in dict.fromkeys(host for pair in slow for host in pair["between"]):
            of_host = [pair for pair in pairs if host in pair["between"]]
            if len(of_host) > 1 and all(pair in slow for pair in of_host):
                most = fastest[host]
                lines.append(f"{host}: slow to every other machine, at most {most:.2f} Gbit/s, {why}")
                slow = [pair for pair in slow if pair not in of_host]
        lines += [f"{' and '.join(pair['between'])}: {pair['gbps']:.2f} Gbit/s, {why}" for pair in slow]
        answers.append(lines)
    return answers[0], answers[1]


def format_report(report: dict[str, Any]) -> str:
    """What a reader needs of a report; its problems are printed apart."""
    hosts, network = report["hosts"], report["network"]
    rows = [("machines", f"{len(hosts)} with {counted(report['ranks'], 'rank')}: {', '.join(hosts)}")]
    rows.append(("versions", ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v)))
    for one in report["shards"]:
        counts = (
            f"{counted(one['shards'], 'shard')}, {one['verified']} verified"
            if one["shards"]
            else "not readable"
        )
        rows.append(("shards", f"{one['folder']}: {counts}"))
    for n, disk in enumerate(report["disks"][hosts[0]]):
        written = [disks[n]["write"] for disks in report["disks"].values() if disks[n]["write"]]
        free = [disks[n]["free"] for disks in report["disks"].values() if disks[n]["free"] is not None]
        speed = f", {min(written) / 1e6:.0f} MB/s and more" if written else ""
        rows.append(("disk", f"{disk['folder']}: {min(free, default=0) / 1e9:.1f} GB free{speed}"))
    rows.append(("GPUs", _gpu_kinds(report["gpus"][hosts[0]])["GPUs:"] or "none seen"))
    if offsets := report["clock_offsets"].values():
        rows.append(("clocks", f"within {max(map(abs, offsets)):.3f} s"))
    if network and (speeds := [speed for speed in network["gflops"] if speed]):
        rows.append(("compute", f"{min(speeds):,.0f} to {max(speeds):,.0f} GFLOP/s a rank"))
    if network and network["all_reduce_gbps"]:
        rows.append(("all-reduce", f"{network['backend']}: {network['all_reduce_gbps']:.2f} Gbit/s a rank"))
    if network and network["pairs"]:
        speeds = [pair["gbps"] for pair in network["pairs"]]
        rows.append(("pairs", f"{len(speeds)}, {min(speeds):.2f} to {max(speeds):.2f} Gbit/s each way"))
    rows += [("warning", line) for line in report["warnings"]]
    rows.append(("verdict", "fit" if report["ok"] else counted(len(report["problems"]), "problem")))
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def _free_port() -> int:
    try:
        return free_port("")
    except OSError as error:
        raise UserError(f"no free port: {describe(error)}") from None
