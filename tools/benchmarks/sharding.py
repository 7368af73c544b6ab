"""Speed, memory and exactness of data preparation on this machine. Parts, chosen by `--only`:

speed    `data-prep shard --workers 1`, and with `--against-python` datatrove's JsonlReader and
         DocumentTokenizer on the same files with the same tokenizer.json, alternating (A B A B …): MB of text
         per CPU-second of the process tree
workers  1 worker against 2, alternating: wall seconds
memory   the largest process of a run over a small and a large input (the same documents repeated)
ids      the fast engine's token ids against the reference library's, document by document
reading  the shards read back: in order, and at random by number and by key

Every run is a new process with warm file caches. Measure on an idle machine.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
from cyclopts import Parameter

from data_prep.common.command_line import Many, Positive
from data_prep.common.environment import header, write_result
from data_prep.common.errors import UserError, log
from data_prep.common.measuring import alternate, memory_field
from data_prep.common.processes import require_success
from data_prep.corpus.documents import DocumentReader, RawDocument
from data_prep.corpus.finding import find_inputs
from data_prep.shards.layout import Document
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import load_tokenizer
from tools.commands import Output, console

Part = Literal["speed", "workers", "memory", "ids", "reading"]
PARTS: tuple[Part, ...] = ("speed", "workers", "memory", "ids", "reading")
PACKAGES = ("numpy", "tokenizers", "gigatoken", "sentencepiece", "zstandard", "pyarrow", "datasets")
SMALL_MB = 10.0
POLL_SECONDS = 0.05  # between two readings of a process tree's memory
READS = 2000  # random accesses of each kind


def run(
    *,
    input: Many,
    tokenizer: str,
    runs: Positive = 5,
    only: Annotated[Sequence[Part], Parameter(consume_multiple=1)] = PARTS,
    against_python: str | None = None,
    big_mb: float = 1000.0,
    output: Output = None,
) -> dict[str, Any]:
    """Measure speed, memory, ids and reading back of `data-prep shard` on this machine.

    Args:
        input: files or folders of text
        tokenizer: tokenizer folder
        runs: runs of each kind
        only: parts to run (default: all)
        against_python: Python of an environment with datatrove, to measure it beside (.jsonl and .jsonl.gz)
        big_mb: MB of the large input of `memory`
    Raises: UserError for bad arguments, or a measured command that fails.
    """
    if big_mb < SMALL_MB:
        raise UserError(f"--big-mb must be at least {SMALL_MB:g}, not {big_mb:g}")
    result = header(PACKAGES)
    # Names alone: this machine's folders mean nothing in a kept result file.
    result["input"] = ["/".join(Path(path).absolute().parts[-2:]) for path in input]
    result["tokenizer"] = Path(tokenizer).absolute().name
    with tempfile.TemporaryDirectory(prefix="data-prep-benchmark-") as folder:
        bench = Bench(Path(folder), list(input), tokenizer)
        if "speed" in only or "workers" in only:
            result |= side_by_side(bench, runs, only, against_python)
        if "memory" in only:
            result["memory"] = memory(bench, SMALL_MB, big_mb)
        if "ids" in only:
            result["ids"] = compare_ids(bench)
        if "reading" in only:
            result["reading"] = reading(bench.shards(), runs)
    write_result(result, output)
    return result


# One measured command -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """CPU seconds of a process tree, wall seconds, and MB (10^6 bytes) of its largest process and of its
    largest descendant (0 without one)."""

    cpu: float
    wall: float
    peak_mb: float
    worker_mb: float
    stdout: str


def measure(command: list[str]) -> Measured:
    """Run `command` and measure its whole process tree. Raises `UserError` when it fails."""
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                wall = time.perf_counter() - start
                if pid:
                    break
                for one in _tree(process.pid):
                    with suppress(OSError):  # it has ended
                        # Not `ru_maxrss`, which a child inherits from its parent.
                        peaks[one] = max(peaks.get(one, 0), memory_field("VmHWM", one))
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    require_success(process.returncode, texts[1], f"`{' '.join(command[:4])} …`")
    others = [size for one, size in peaks.items() if one != process.pid]
    return Measured(
        cpu=usage.ru_utime + usage.ru_stime,
        wall=wall,
        peak_mb=max(peaks.values(), default=0) / 1e6,
        worker_mb=max(others, default=0) / 1e6,
        stdout=texts[0],
    )


def _tree(root: int) -> list[int]:
    """`root` and its live descendants."""
    with suppress(psutil.NoSuchProcess):
        return [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
    return []


class Bench:
    """The measured commands; they write only to `folder`."""

    def __init__(self, folder: Path, inputs: list[str], tokenizer: str):
        self.folder, self.inputs, self.tokenizer = folder, inputs, tokenizer
        self._count = 0
        self._kept: Path | None = None

    def shard(self, workers: int, inputs: list[str] | None = None) -> tuple[Measured, dict]:
        """One `data-prep shard`: measurement and summary. The last shards are kept."""
        output = self._new("shards")
        command = [sys.executable, "-m", "data_prep.cli", "shard", "--json", "--output", str(output)]
        command += ["--workers", str(workers), "--tokenizer", self.tokenizer]
        measured = measure([*command, "--input", *(inputs or self.inputs)])
        if inputs is None:
            self._drop(self._kept)
            self._kept = output
        else:
            self._drop(output)
        return measured, json.loads(measured.stdout)

    def shards(self) -> Path:
        """A folder of shards made from the inputs; made now unless a run has left one."""
        if self._kept is None:
            self.shard(1)
        return self._kept

    def datatrove(self, python: str) -> tuple[Measured, dict]:
        """One run of datatrove over the same files: measurement and its script's output."""
        names = [file.path for file in self.files()]
        if unread := [name for name in names if not name.endswith((".jsonl", ".jsonl.gz"))]:
            raise UserError(f"datatrove's reader takes .jsonl and .jsonl.gz, not {unread[0]}")
        definition = Path(self.tokenizer, "tokenizer.json")
        if not definition.is_file():
            raise UserError(f"{self.tokenizer} holds no tokenizer.json, which datatrove needs")
        output = self._new("datatrove")
        output.mkdir()
        paths_file = output / "paths"
        paths_file.write_text("".join(name.removeprefix("/") + "\n" for name in names), encoding="utf-8")
        script = str(Path(__file__).with_name("datatrove_run.py"))
        measured = measure([python, script, str(paths_file), str(output), str(definition.resolve())])
        self._drop(output)
        return measured, json.loads(measured.stdout.strip().splitlines()[-1])

    def files(self) -> list:
        return find_inputs(self.inputs)

    def texts(self) -> Iterator[str]:
        """The text of every good document of the inputs."""
        for file in self.files():
            for item in DocumentReader(file):
                if isinstance(item, RawDocument):
                    yield item.content

    def repeated(self, megabytes: float) -> Path:
        """A .jsonl file of about `megabytes`: the inputs' documents, repeated with new ids."""
        path = self._new("input").with_suffix(".jsonl")
        left, number = int(megabytes * 1e6), 0
        with open(path, "w", encoding="utf-8") as stream:
            while left > 0:
                before = number
                for text in self.texts():
                    line = json.dumps({"id": str(number), "content": text}, ensure_ascii=False)
                    left -= len(line.encode("utf-8")) + 1
                    number += 1
                    stream.write(line + "\n")
                    if left <= 0:
                        break
                if number == before:
                    raise UserError(f"no usable document in {', '.join(self.inputs)}")
        return path

    def _new(self, name: str) -> Path:
        self._count += 1
        return self.folder / f"{name}-{self._count}"

    def _drop(self, folder: Path | None) -> None:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


# The parts ----------------------------------------------------------------------------------------------


def side_by_side(bench: Bench, runs: int, only: Sequence[str], python: str | None) -> dict:
    """`speed` and `workers`: all kinds of run alternate, so that a slow moment affects all."""
    sides: dict[str, Callable[[], tuple[Measured, dict]]] = {"shard": lambda: bench.shard(1)}
    if "workers" in only:
        sides["shard, 2 workers"] = lambda: bench.shard(2)
    if "speed" in only and python:
        sides["datatrove"] = lambda: bench.datatrove(python)
    turns = alternate(runs, sides)
    taken = {kind: [measured for measured, _ in found] for kind, found in turns.items()}
    summaries = {kind: found[-1][1] for kind, found in turns.items()}
    result = {}
    megabytes = summaries["shard"]["bytes"] / 1e6
    if "speed" in only:
        speed = {
            "mb_of_text": round(megabytes, 3),
            "documents": summaries["shard"]["documents"],
            "tokens": summaries["shard"]["tokens"],
            "shard": _rates(taken["shard"], megabytes),
        }
        if "datatrove" in sides:
            speed["datatrove"] = _rates(taken["datatrove"], megabytes) | summaries["datatrove"]
            ours, theirs = (speed[k]["mb_per_cpu_second"]["median"] for k in ("shard", "datatrove"))
            speed["times_datatrove"] = round(ours / theirs, 3)
        result["speed"] = speed
    if "workers" in only:
        one, two = (_spread([m.wall for m in taken[k]]) for k in ("shard", "shard, 2 workers"))
        result["workers"] = {
            "wall_1": one,
            "wall_2": two,
            "times_faster": round(one["median"] / two["median"], 3),
            "cpu_1": _spread([m.cpu for m in taken["shard"]]),
            "cpu_2": _spread([m.cpu for m in taken["shard, 2 workers"]]),
        }
    return result


def _rates(taken: list[Measured], megabytes: float) -> dict:
    return {
        "mb_per_cpu_second": _spread([megabytes / measured.cpu for measured in taken]),
        "cpu_seconds": _spread([measured.cpu for measured in taken]),
        "wall_seconds": _spread([measured.wall for measured in taken]),
    }


def _spread(values: list[float]) -> dict:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
        "values": [round(value, 3) for value in values],
    }


def memory(bench: Bench, small_mb: float, big_mb: float) -> dict:
    """The largest process of a `shard` run with two workers, for a small and a large input."""
    result = {}
    for name, megabytes in (("small", small_mb), ("big", big_mb)):
        path = bench.repeated(megabytes)
        measured, summary = bench.shard(2, [str(path)])
        result[name] = {
            "input_mb": round(path.stat().st_size / 1e6, 3),
            "documents": summary["documents"],
            "largest_process_mb": round(measured.peak_mb, 1),
            "largest_worker_mb": round(measured.worker_mb, 1),
            "wall_seconds": round(measured.wall, 3),
            "cpu_seconds": round(measured.cpu, 3),
        }
        path.unlink()
        log(f"memory, {result[name]['input_mb']} MB: {result[name]['largest_process_mb']} MB")
    return result


def compare_ids(bench: Bench) -> dict:
    """The tokenizer's ids against those of the library that defines them, on every document."""
    tokenizer = load_tokenizer(bench.tokenizer)
    documents = tokens = size = 0
    different: list[str] = []
    seconds = {"engine": 0.0, "reference": 0.0}
    for text in bench.texts():
        start = time.process_time()
        ours = tokenizer.encode(text)
        between = time.process_time()
        reference = tokenizer.encode_reference(text)
        seconds["engine"] += between - start
        seconds["reference"] += time.process_time() - between
        documents += 1
        tokens += reference.size
        size += len(text.encode("utf-8"))
        if not np.array_equal(ours, reference):
            different.append(text[:60])
    log(f"ids: {documents} documents, {len(different)} differ")
    return {
        "engine": tokenizer.engine,
        "reference": tokenizer.reference_name,
        "documents": documents,
        "mb_of_text": round(size / 1e6, 3),
        "tokens": int(tokens),
        "differences": len(different),
        "first_different": different[:5],
        "mb_per_cpu_second": {
            name: round(size / 1e6 / spent, 2) if spent else None for name, spent in seconds.items()
        },
    }


def reading(folder: Path, runs: int) -> dict:
    """Read shards in this process: all tokens and sentence lengths in order; documents at random."""
    rates, totals = [], set()
    shards, tokens = ShardSet.open(folder), 0
    for _ in range(runs + 1):  # the first one warms the file cache
        start = time.process_time()
        shards = ShardSet.open(folder)
        tokens = checksum = 0
        for i in range(len(shards)):
            shard = shards.shard(i)
            for n in range(len(shard)):
                row = shard.tokens(n)
                tokens += row.size
                checksum += int(row.sum(dtype=np.uint64)) + int(
                    shard.sentence_lengths(n).sum(dtype=np.uint64)
                )
        rates.append(tokens / 1e6 / (time.process_time() - start))
        totals.add((tokens, checksum))
    if len(totals) != 1 or tokens != shards.manifest["totals"]["tokens"]:
        raise AssertionError("the shards gave other tokens when read again")
    documents = shards.manifest["totals"]["documents"]
    numbers = np.random.default_rng(0).integers(documents, size=READS).tolist()
    keys = [shards.document(number).id for number in numbers]
    shards.find(keys[0])  # the first call sorts the keys
    result = {
        "documents": documents,
        "tokens": tokens,
        "mtokens_per_cpu_second": _spread(rates[1:]),
        "by_number_us": _times(shards.document, numbers),
        "by_key_us": _times(shards.find, keys),
    }
    log(f"reading: {result['mtokens_per_cpu_second']['median']} M tokens per CPU-second")
    return result


def _times(get: Callable[[Any], Document], wanted: list) -> dict:
    """Microseconds to read a document, its tokens and sentence lengths."""
    taken = []
    for one in wanted:
        start = time.perf_counter_ns()
        document = get(one)
        document.tokens.sum()
        document.sentence_lengths.sum()
        taken.append((time.perf_counter_ns() - start) / 1000)
    taken.sort()
    return {
        "reads": len(taken),
        "median": round(statistics.median(taken), 1),
        "p99": round(taken[int(len(taken) * 0.99)], 1),
        "most": round(taken[-1], 1),
    }


if __name__ == "__main__":
    example = "python -m tools.benchmarks.sharding --input corpus/EN --tokenizer opt --output figures.json"
    raise SystemExit(console("benchmarks.sharding", run, example=example))
