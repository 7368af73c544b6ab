"""Memory and time of the steps that see a whole corpus, at 5, 50 and 500 million documents, without text.

Each part runs the code of `data-prep` or of training in a new process, on synthetic names and totals:

plan      files found (sparse ones), units planned, the plan written
merge     records of all units to the manifest, shards linked to their names (files without content)
open      that manifest opened and checked, as every rank of a training run does
exact     `--deduplicate`, comparing: hashes of all units, a tenth of the documents repeated
near      `--near-duplicates 0.8`, comparing: signatures, a twentieth near-copies of earlier documents
training  the first bin of each of 4,096 ranks, late in an epoch (tools.benchmarks.loader)

The files of a part are made by another process, outside the measured time, and removed after it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from cyclopts import Parameter

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import log
from data_prep.common.measuring import in_new_process, memory_field
from data_prep.common.results import RECORD, SIZES
from data_prep.corpus import duplicates, near_duplicates
from data_prep.corpus.finding import Survey
from data_prep.corpus.inputs import InputFile, plan_units
from data_prep.jobs.job import Job
from data_prep.jobs.merge import merge
from data_prep.jobs.plan import plan
from data_prep.shards.layout import COUNTS, MANIFEST, QUARANTINE, SHARD_ENDINGS
from data_prep.shards.reader import ShardSet
from data_prep.shards.settings import ShardSettings
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import Tokenizer
from tools.benchmarks.loader import plan_at
from tools.commands import Output, console

Part = Literal["plan", "merge", "open", "exact", "near", "training"]
PARTS: tuple[Part, ...] = ("plan", "merge", "open", "exact", "near", "training")
DOCUMENT_BYTES = 4000
UNIT_DOCUMENTS = 64_000  # 256 MB of text
SHARD_TEXT = 121_000_000  # bytes of text in 64 MB of arrays
FILE_BYTES = 10_000_000  # stored, packed: 30 MB of text
REJECTED = 0.02  # of the records
REPEATED, ALIKE = 0.1, 0.05  # of the documents
SIMILARITY = 0.8
BYTES_PER_TOKEN = 4.15
PACKAGES = ("numpy", "rensa")
SETTINGS = ShardSettings(SentenceSettings("clause", "en", 64))


class NoTokenizer:
    """The part of a tokenizer that planning and merging use."""

    strips, kind, fingerprint, vocab_size, folder = False, "none", "0" * 64, 50_000, Path("none")

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)


TOKENIZER = cast(Tokenizer, NoTokenizer())


@dataclass(frozen=True)
class Size:
    """A corpus of this many documents."""

    documents: int

    @property
    def files(self) -> int:
        return max(1, self.documents * DOCUMENT_BYTES // (3 * FILE_BYTES))

    @property
    def units(self) -> int:
        return max(1, self.documents // UNIT_DOCUMENTS)

    def input_files(self) -> list[InputFile]:
        """As `survey` finds them."""
        names = [f"crawl/part-{n:06d}.jsonl.gz" for n in range(self.files)]
        return [InputFile(f"/{name}", name, "crawl", None, "packed", FILE_BYTES, "1") for name in names]


# What the parts read ----------------------------------------------------------------------------------------


def make_files(folder: Path, size: Size) -> None:
    """Sparse input files."""
    (folder / "input").mkdir()
    for n in range(size.files):
        with open(folder / "input" / f"part-{n:06d}.jsonl.gz", "wb") as stream:
            stream.truncate(FILE_BYTES)


def make_job(folder: Path, size: Size) -> Job:
    """The job whose units are finished; `make_results` makes their results."""
    files = size.input_files()
    units = dict(enumerate(plan_units(files)))
    facts = {"settings": SETTINGS.to_dict(), "tokenizer": {"kind": "none", "vocab_size": 50_000}}
    return Job(folder / "set", SETTINGS, facts, Survey(files), units, folder)


def make_results(folder: Path, size: Size) -> None:
    """The results of all units: records, empty shards, quarantines with a line for each rejected record."""
    job = make_job(folder, size)
    results = job.work / "shard"
    results.mkdir(parents=True)
    (job.work / "aside").mkdir()
    rng = np.random.default_rng(1)
    each = 3 * FILE_BYTES // DOCUMENT_BYTES
    rejected = int(each * REJECTED)
    good = each - rejected
    for unit, pieces in job.units.items():
        result = results / f"{unit:06d}"
        result.mkdir()
        quarantine, read = [], []
        for piece in pieces:
            lines = [
                json.dumps({"file": piece.file.name, "line": 49 * n + 1, "reason": "no text"})
                for n in range(rejected)
            ]
            quarantine += lines
            read.append(
                {
                    "file": piece.file.name,
                    **{"start": 0, "end": piece.end, "sha256": rng.bytes(32).hex(), "lines": each},
                    **{"documents": good, "rejected": {"no text": rejected}},
                    "quarantine_bytes": sum(map(len, lines)) + len(lines),
                    **{"damage": [], "unverified": None},
                }
            )
        documents = good * len(pieces)
        shards = -(-documents * DOCUMENT_BYTES // SHARD_TEXT)
        names = [f"part-{n:03d}{ending}" for n in range(shards) for ending in SHARD_ENDINGS.values()]
        tokens = int(documents * DOCUMENT_BYTES / BYTES_PER_TOKEN)
        sums = documents, tokens // 11, tokens, documents * DOCUMENT_BYTES
        counts = {name: value // shards for name, value in zip(COUNTS, sums, strict=True)}
        hashes = [{"sha256": rng.bytes(32).hex(), "index_sha256": rng.bytes(32).hex()} for _ in range(shards)]
        record = {
            "pieces": read,
            **{"repaired": {}, "marked": {}, "languages": {"en": counts}, "sources": {"crawl": counts}},
            "parts": [{"size": 64_000_000, **one, **counts} for one in hashes],
        }
        for name in names:
            (result / name).touch()
        (result / QUARANTINE).write_text("".join(line + "\n" for line in quarantine), encoding="ascii")
        (result / RECORD).write_text(json.dumps(record), encoding="ascii")
        sizes = {path.name: path.stat().st_size for path in result.iterdir()}
        (result / SIZES).write_text(json.dumps(sizes), encoding="ascii")


def make_hashes(folder: Path, size: Size) -> None:
    """Hashes of every unit's documents; `REPEATED` of them are those of an earlier document."""
    rng = np.random.default_rng(2)
    for unit in range(size.units):
        number = np.arange(unit * UNIT_DOCUMENTS, (unit + 1) * UNIT_DOCUMENTS, dtype=np.uint64)
        again = rng.random(UNIT_DOCUMENTS) < REPEATED
        number[again] = (number[again] * rng.random(int(again.sum()))).astype(np.uint64)
        words = np.stack([_mixed(number), _mixed(~number)], axis=1)
        duplicates.write_hashes(folder / f"{unit:06d}.bin", words.tobytes())


def _mixed(number: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of uint64 (splitmix64)."""
    number = (number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def make_signatures(folder: Path, size: Size) -> None:
    """Signatures of every unit's documents; `ALIKE` of them share most values with one of the unit before."""
    rng, before = np.random.default_rng(3), None
    for unit in range(size.units):
        values = rng.integers(1 << 32, size=(UNIT_DOCUMENTS, near_duplicates.VALUES), dtype=np.uint32)
        if before is not None:
            alike = np.flatnonzero(rng.random(UNIT_DOCUMENTS) < ALIKE)
            values[alike, :90] = before[rng.integers(UNIT_DOCUMENTS, size=len(alike)), :90]
        before, result = values, folder / f"{unit:06d}"
        result.mkdir()
        near_duplicates.write_signatures(result, values)
        ids = "\n".join(f'"crawl/part-{unit:06d}.jsonl.gz:{n}"' for n in range(UNIT_DOCUMENTS))
        (result / near_duplicates.IDS).write_text(ids, encoding="ascii")


# Parts ------------------------------------------------------------------------------------------------------


def run_plan(folder: Path, size: Size) -> dict[str, Any]:
    job = plan([folder / "input"], folder / "set", TOKENIZER, "none", SETTINGS)
    assert job is not None
    return {"files": len(job.files), "units": len(job.units), "bytes": _bytes(job.work)}


def run_merge(folder: Path, size: Size) -> dict[str, Any]:
    job = make_job(folder, size)
    aside = job.work / "aside" / "merge"
    aside.mkdir()
    merge(TOKENIZER, job, job.work_folder(), lambda: None, aside)
    manifest = (job.output / MANIFEST).stat().st_size
    return {"units": len(job.units), "bytes": manifest}


def run_open(folder: Path, size: Size) -> dict[str, Any]:
    shards = len(ShardSet.open(folder / "set"))
    return {"shards": shards, "bytes": (folder / "set" / MANIFEST).stat().st_size}


def run_exact(folder: Path, size: Size) -> dict[str, Any]:
    found = sum(map(len, duplicates.find(sorted(folder.iterdir()))))
    return {"found": found, "bytes": _bytes(folder)}


def run_near(folder: Path, size: Size) -> dict[str, Any]:
    found = sum(map(len, near_duplicates.find(sorted(folder.iterdir()), SIMILARITY)))
    return {"found": found, "bytes": _bytes(folder)}


def run_training(folder: Path, size: Size) -> dict[str, Any]:
    shards = size.documents * DOCUMENT_BYTES * 3 // (2 * SHARD_TEXT)  # the last of a unit is smaller
    found = plan_at("late", 1024, size.documents, shards, 4096)
    return found | {"shards": shards, "seconds": found["first_batch_seconds"]}


MAKERS: dict[Part, tuple[Callable[[Path, Size], None] | None, Callable[[Path, Size], dict[str, Any]]]] = {
    "plan": (make_files, run_plan),
    "merge": (make_results, run_merge),
    "open": (None, run_open),  # what `merge` has left
    "exact": (make_hashes, run_exact),
    "near": (make_signatures, run_near),
    "training": (None, run_training),
}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measured(part: Part, folder: Path, size: Size) -> dict[str, Any]:
    """The figures of one part, in this process: seconds, and peak memory with that of all imports."""
    imports = memory_field("VmHWM")
    start, cpu = time.perf_counter(), time.process_time()
    found = MAKERS[part][1](folder, size)
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return times | found | {"peak_memory_bytes": memory_field("VmHWM"), "memory_of_imports": imports}


def plan_scale(
    *,
    documents: Annotated[Sequence[int], Parameter(consume_multiple=1)] = (5, 50, 500),
    near_documents: Annotated[Sequence[int], Parameter(consume_multiple=1)] = (1, 5),
    exact_documents: Annotated[Sequence[int], Parameter(consume_multiple=1)] = (5, 50, 500),
    only: Annotated[Sequence[Part], Parameter(consume_multiple=1)] = PARTS,
    folder: str | None = None,
    output: Output = None,
) -> dict[str, Any]:
    """Memory and time of planning, merging, comparing and training's plan by the size of a corpus.

    Args:
        documents: sizes, in millions
        near_documents: sizes of `near`, in millions: 1.1 GB of disk each
        exact_documents: sizes of `exact`, in millions: 0.02 GB of disk each
        only: parts to run (default: all)
        folder: for the files, with room for the largest part (default: the system's temporary folder)
    """
    require_folder(output)
    result: dict[str, Any] = {"benchmark": "plan_scale", **header(PACKAGES), "parts": {}}
    result["document_bytes"], result["unit_documents"] = DOCUMENT_BYTES, UNIT_DOCUMENTS
    sizes = {part: documents for part in PARTS} | {"near": near_documents, "exact": exact_documents}
    for millions in sorted({size for part in only for size in sizes[part]}):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for part in PARTS:
                if part not in only or millions not in sizes[part]:
                    continue
                size, where, make = Size(millions * 1_000_000), Path(place) / part, MAKERS[part][0]
                if part == "open":
                    where = Path(place) / "merge"
                where.mkdir(exist_ok=True)
                if make:
                    in_new_process(make, where, size)
                found = in_new_process(measured, part, where, size)
                log(f"{part}, {millions} million documents: {found}")
                result["parts"].setdefault(part, {})[str(millions)] = found
                if part != "merge":
                    shutil.rmtree(where)
                write_result(result, output)
    return result


if __name__ == "__main__":
    example = "python -m tools.benchmarks.plan_scale --documents 5 50 500"
    raise SystemExit(console("benchmarks.plan_scale", plan_scale, example=example))
