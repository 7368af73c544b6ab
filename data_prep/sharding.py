"""`data-prep shard`: input files → a folder of shards, on any number of processes and machines.

In: inputs, a tokenizer folder, settings. Out: the shard set's manifest; on disk the shards, their indexes,
the quarantine and a copy of the tokenizer.

A unit of work is a list of pieces of input (`inputs.plan_units`), whatever the number of workers, so the
bytes depend on input and settings alone. The work has up to four phases, each a list of units that
`execution.py` hands out: `hash` and `duplicates` where exact duplicates are to go, then `shard`, one result
per unit, then `merge`: the shards are renamed to consecutive numbers and the manifest is written last.
Everything unfinished lies in `.unfinished/`; a run that was killed goes on from there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from data_prep import duplicates
from data_prep.documents import DocumentReader, RawDocument, Reject
from data_prep.errors import UserError, describe
from data_prep.execution import RECORD, Board, Phase, run_in_processes, run_phases
from data_prep.hygiene import Hygiene
from data_prep.inputs import InputFile, Piece, find_inputs, find_unread, plan_units
from data_prep.segment import VERSION as SEGMENTER_VERSION
from data_prep.segment import get_segmenter
from data_prep.sentences import SentenceSettings, cut_document
from data_prep.shards import (
    COUNTS,
    FORMAT_VERSION,
    MANIFEST,
    QUARANTINE,
    TOKENIZER_FOLDER,
    ZSTD_LEVEL,
    Document,
    ShardSet,
    ShardWriter,
    add_counts,
    file_sha256,
    hash64,
    json_bytes,
    seal_manifest,
    token_dtype,
    write_atomically,
)
from data_prep.tokenizer import LossyTokenization, Tokenizer, load_tokenizer

UNFINISHED = ".unfinished"
TICK_DOCUMENTS = 32  # documents between two reports of progress
BACKENDS = ("auto", "local", "mpi", "slurm")


@dataclass(frozen=True)
class ShardSettings:
    """What, beside input and tokenizer, decides the bytes of a shard set; `DIR/manifest.json` keeps it.

    shard_bytes: size of a shard's arrays at which the next one begins; shard_documents: likewise, 0 no limit.
    unit_bytes: text per unit of work, None to let the size of the input decide.
    """

    sentences: SentenceSettings
    hygiene: Hygiene = Hygiene()
    deduplicate: bool = False
    shard_bytes: int = 64_000_000
    shard_documents: int = 0
    compression: str = "none"
    unit_bytes: int | None = None

    def to_dict(self) -> dict:
        own = {key: value for key, value in asdict(self).items() if key not in ("sentences", "hygiene")}
        level = {"zstd_level": ZSTD_LEVEL} if self.compression == "zstd" else {}
        versions = {"segmenter_version": SEGMENTER_VERSION}
        return self.sentences.to_dict() | versions | {"hygiene": self.hygiene.to_dict()} | own | level


@dataclass(frozen=True)
class Job:
    """One run, the same for every process that takes part. `only`: the units to shard, None for all."""

    output: Path
    settings: ShardSettings
    facts: dict
    files: list[InputFile]
    units: list[list[Piece]]
    not_read: list[str]
    only: tuple[int, ...] | None = None

    @property
    def work(self) -> Path:
        return self.output / UNFINISHED


def make_shards(
    inputs: list[str | Path],
    output: str | Path,
    tokenizer_folder: str | Path,
    settings: ShardSettings,
    workers: int = 1,
    backend: str = "local",
    report: Callable[[Progress], None] | None = None,
) -> tuple[dict, bool]:
    """Make the shard set, or take part in making it, or finish it, or find it done.

    Under the `mpi` backend every rank calls this. `report` is called now and then with the progress of the
    whole run, whoever does the work.

    Returns (manifest, whether it was there already). Raises `UserError` on bad input, and when `output` holds
    something else.
    """
    report = report or (lambda progress: None)
    if backend == "mpi":
        return _make_by_mpi(inputs, output, tokenizer_folder, settings, report)
    tokenizer = load_tokenizer(tokenizer_folder)
    job = plan(inputs, output, tokenizer, settings)
    if job is None:
        return ShardSet.open(output).manifest, True
    watch = functools.partial(_watch, job, report, Progress(job))
    if min(workers, len(job.units)) <= 1:
        take_part(job, tokenizer, watch)
    else:
        run_in_processes(min(workers, len(job.units)), functools.partial(take_part, job, tokenizer), watch)
    watch()
    return ShardSet.open(output).manifest, False


def plan(
    inputs: list[str | Path], output: str | Path, tokenizer: Tokenizer, settings: ShardSettings
) -> Job | None:
    """What is to be done; None when it is done. Prepares the work folder, or checks the one that is there."""
    output = Path(output)
    for given in map(Path, inputs):
        if given.is_dir() and output.resolve().is_relative_to(given.resolve()):
            raise UserError(f"output {output} lies inside the input folder {given}; choose another place")
    files = find_inputs(inputs)
    # Refuses unknown names before any work.
    get_segmenter(settings.sentences.segmenter, settings.sentences.language)
    facts = {
        "format_version": FORMAT_VERSION,
        "settings": settings.to_dict(),
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
    }
    units = plan_units(files, settings.unit_bytes)
    job = Job(output, settings, facts, files, units, find_unread(inputs))
    if (output / MANIFEST).is_file():
        shutil.rmtree(job.work, ignore_errors=True)  # a merge that was killed while it tidied up
        return _check_finished(job)
    _begin(job)
    return job


def _begin(job: Job) -> None:
    """Make the work folder, or check that the one found belongs to this very job."""
    output, work = job.output, job.work
    told = {
        "facts": job.facts,
        "inputs": [[file.name, file.path, file.size, _changed_at(file)] for file in job.files],
        "only": job.only,
    }
    content = json_bytes(told)
    if (work / "plan.json").is_file():
        if (work / "plan.json").read_bytes() != content:
            raise UserError(
                f"{output} holds an unfinished run with other settings or input; "
                "finish that one, choose another --output, or delete the folder"
            )
        _drop_cut_short(job)
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file; --output must name a folder")
    if job.only is None and output.is_dir() and any(path.name != UNFINISHED for path in output.iterdir()):
        raise UserError(f"output folder {output} is not empty and holds no shards; choose another one")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    write_atomically(work / "plan.json", content)


def _drop_cut_short(job: Job) -> None:
    """Forget units with a shard of another size than was written: the machine crashed, or the disk was full.

    A shard that is not there at all has been moved by a merge that was stopped. Bits that flipped without a
    change of size are `verify`'s business: looking for them here would read all shards again at every start.
    """
    board = _board(job)
    for unit in board.done("shard"):
        folder = board.result("shard", unit)
        try:
            parts = json.loads((folder / RECORD).read_bytes())["parts"]
            sizes = [(folder / f"part-{number:03d}.tar", part["size"]) for number, part in enumerate(parts)]
            whole = all(path.stat().st_size == size for path, size in sizes if path.exists())
        except (OSError, ValueError):
            whole = False
        if not whole:
            shutil.rmtree(folder, ignore_errors=True)


def _changed_at(file: InputFile) -> int | None:
    """So that a run is not finished with another file than it was begun with."""
    try:
        return os.stat(file.path).st_mtime_ns
    except OSError:  # remote
        return None


def _fingerprint(*values: object) -> str:
    return hashlib.sha256(json_bytes(values)).hexdigest()


# What every process does -------------------------------------------------------------------------------


def take_part(job: Job, tokenizer: Tokenizer, watch: Callable[[], None] | None = None) -> None:
    """Do units of the job until all of it is done, by whomever. `watch()` is called now and then."""
    worker = _Worker(job, tokenizer, watch or (lambda: None))
    every = range(len(job.units))
    # The largest first, so that nobody is left alone with a long one at the end.
    order = sorted(every, key=lambda unit: -_unit_bytes(job.units[unit]))
    phases = []
    if job.settings.deduplicate:
        phases.append(Phase("hash", order, worker.hash_unit))
        phases.append(Phase("duplicates", [0], worker.find_duplicates))
    if job.only is not None:
        order = [unit for unit in order if unit in job.only]
    phases += [Phase("shard", order, worker.shard_unit), Phase("merge", [0], worker.merge)]
    run_phases(worker.board, phases)


def _unit_bytes(unit: list[Piece]) -> int:
    return sum(piece.size for piece in unit)


def _board(job: Job) -> Board:
    if job.only is None:
        return Board(job.work, (job.output / MANIFEST).is_file)
    return Board(job.work, lambda: not _missing(job.output, ShardSet.open(job.output).manifest))


class _Worker:
    """One process's part in a job."""

    def __init__(self, job: Job, tokenizer: Tokenizer, watch: Callable[[], None]):
        self.job, self.tokenizer, self.board, self._watch = job, tokenizer, _board(job), watch

    def _pieces(self, unit: int) -> list[tuple[Piece, DocumentReader]]:
        settings = self.job.settings
        language = settings.sentences.language
        return [(p, DocumentReader(p, language, settings.hygiene)) for p in self.job.units[unit]]

    def hash_unit(self, unit: int, folder: Path, beat: Callable[[dict], None]) -> None:
        """The hashes of a unit's good documents, in order."""
        counts = _Counts(beat, self._watch)
        hashes = []
        for _, reader in self._pieces(unit):
            for item in counts.follow(reader):
                if isinstance(item, RawDocument):
                    hashes.append(duplicates.hash128(item.content.encode("utf-8")))
        duplicates.write_hashes(folder / "hashes.npy", hashes)
        write_atomically(folder / RECORD, json_bytes({"counts": counts.final()}))

    def find_duplicates(self, unit: int, folder: Path, beat: Callable[[dict], None]) -> None:
        """The documents that came before, in this order of units and documents."""
        files = [self.board.result("hash", n) / "hashes.npy" for n in range(len(self.job.units))]
        for n, dropped in enumerate(duplicates.find(files)):
            np.save(folder / f"{n:06d}.npy", dropped)
            beat({})
        write_atomically(folder / RECORD, json_bytes({"counts": {}}))

    def shard_unit(self, unit: int, folder: Path, beat: Callable[[dict], None]) -> None:
        """Read one unit and write its shards as `part-NNN.tar`, their quarantine and a record."""
        settings, tokenizer = self.job.settings, self.tokenizer
        counts = _Counts(beat, self._watch)
        dropped: set[int] = set()
        if settings.deduplicate:
            dropped = set(np.load(self.board.result("duplicates", 0) / f"{unit:06d}.npy").tolist())
        sums = {name: {} for name in ("languages", "sources")}
        repaired: Counter[str] = Counter()
        pieces: list[dict] = []
        parts: list[dict] = []
        writer: ShardWriter | None = None
        good = 0  # documents that hygiene let pass
        with open(folder / QUARANTINE, "w", encoding="ascii") as quarantine:
            for piece, reader in self._pieces(unit):
                rejected: Counter[str] = Counter()
                documents = 0
                for item in counts.follow(reader):
                    if isinstance(item, RawDocument):
                        good += 1
                        try:
                            item = self._refuse_duplicate(item, good - 1, dropped) or self._cut(item)
                        except LossyTokenization:
                            item = Reject(item.line, "tokenizer loses text", item.member)
                    if isinstance(item, Reject):
                        rejected[item.reason] += 1
                        quarantine.write(json.dumps(_quarantine_entry(piece, item)) + "\n")
                        continue
                    if writer is None:
                        names = [
                            folder / f"part-{len(parts):03d}{ending}" for ending in (".tar", ".index.npy")
                        ]
                        writer = ShardWriter(*names, token_dtype(tokenizer.vocab_size), settings.compression)
                    writer.add(item)
                    documents += 1
                    add_counts(sums["languages"], item.language, item)
                    add_counts(sums["sources"], item.source, item)
                    if writer.payload >= settings.shard_bytes or writer.documents == settings.shard_documents:
                        parts.append(writer.close())
                        writer = None
                repaired.update(reader.repaired)
                pieces.append(
                    {
                        "file": piece.file.name,
                        "start": piece.start,
                        "end": piece.end,
                        "sha256": reader.sha256,
                        "lines": reader.lines,
                        "documents": documents,
                        "rejected": dict(rejected),
                        "damage": reader.damage,
                    }
                )
        if writer is not None:
            parts.append(writer.close())
        record = {"pieces": pieces, "repaired": repaired, "parts": parts, "counts": counts.final(), **sums}
        write_atomically(folder / RECORD, json_bytes(record))

    def _refuse_duplicate(self, document: RawDocument, number: int, dropped: set[int]) -> Reject | None:
        return Reject(document.line, "duplicate", document.member) if number in dropped else None

    def _cut(self, raw: RawDocument) -> Document:
        """Raises `LossyTokenization`."""
        settings = self.job.settings.sentences
        segmenter = settings.segmenter_for(raw.language)
        tokens, lengths = cut_document(raw.content, self.tokenizer, segmenter, settings)
        data = raw.content.encode("utf-8")
        return Document(raw.id, raw.language, raw.source, tokens, lengths, len(data), hash64(data))

    def merge(self, unit: int, folder: Path, beat: Callable[[dict], None]) -> None:
        """The end: `_merge`, or for some units made again, `_put_back`."""
        _merge(self.job, self.board, self.tokenizer) if self.job.only is None else _put_back(
            self.job, self.board
        )


class _Counts:
    """Follows readers and tells, now and then, how far they are."""

    def __init__(self, beat: Callable[[dict], None], watch: Callable[[], None]):
        self._beat, self._watch = beat, watch
        self._before = self._bytes = self._documents = self._rejected = 0

    def follow(self, reader: DocumentReader) -> Iterable[RawDocument | Reject]:
        for count, item in enumerate(reader):
            if isinstance(item, Reject):
                self._rejected += 1
            else:
                self._documents += 1
            yield item
            if count % TICK_DOCUMENTS == 0:
                self._bytes = self._before + reader.bytes_read
                self._beat(self.final())
                self._watch()
        self._before += reader.bytes_read
        self._bytes = self._before

    def final(self) -> dict[str, int]:
        return {"bytes": self._bytes, "documents": self._documents, "rejected": self._rejected}


def _quarantine_entry(piece: Piece, reject: Reject) -> dict:
    member = {"member": reject.member} if reject.member else {}
    return {"file": piece.file.name, **member, "line": reject.line, "reason": reject.reason}


# The end -----------------------------------------------------------------------------------------------


def _merge(job: Job, board: Board, tokenizer: Tokenizer) -> None:
    """Move the shards to their final names and write quarantine, tokenizer and, last, the manifest.

    Every step may be done again after a kill: what is moved is passed over, what is written is the same.
    """
    output, facts = job.output, job.facts
    units = [board.result("shard", unit) for unit in range(len(job.units))]
    records = [json.loads((unit / RECORD).read_bytes()) for unit in units]
    if not sum(len(record["parts"]) for record in records):
        shutil.rmtree(job.work)
        if not any(output.iterdir()):
            output.rmdir()
        said = (
            ", ".join(f"{n} × {reason}" for reason, n in _rejected(records).items()) or "the files are empty"
        )
        raise UserError(f"no usable document in {', '.join(file.name for file in job.files[:5])}: {said}")
    shards = []
    for unit, record in enumerate(records):
        for number, part in enumerate(record["parts"]):
            name = f"shard-{len(shards):06d}"
            for ending in (".tar", ".index.npy"):
                try:
                    os.replace(units[unit] / f"part-{number:03d}{ending}", output / f"{name}{ending}")
                except FileNotFoundError:
                    if not (output / f"{name}{ending}").is_file():
                        raise
            shards.append({"file": f"{name}.tar", "index": f"{name}.index.npy", "unit": unit} | part)
    _write_quarantine(job, units, records)
    tokenizer.save(output / TOKENIZER_FOLDER)
    tokenizer_files = {p.name: file_sha256(p) for p in sorted((output / TOKENIZER_FOLDER).iterdir())}
    inputs = _input_entries(job, records)
    content = [[entry["file"], [piece["sha256"] for piece in entry["pieces"]]] for entry in inputs]
    damaged = [
        {"file": p["file"], "damage": p["damage"]} for r in records for p in r["pieces"] if p["damage"]
    ]
    manifest = facts | {
        "fingerprint": _fingerprint(facts, content),
        "settings_fingerprint": _fingerprint(facts),
        "tokenizer": facts["tokenizer"] | {"files": tokenizer_files},
        "shards": shards,
        "totals": {name: sum(shard[name] for shard in shards) for name in COUNTS},
        "languages": _sum_groups(record["languages"] for record in records),
        "sources": _sum_groups(record["sources"] for record in records),
        "rejected": _rejected(records),
        "repaired": _sum_counts(record["repaired"] for record in records),
        "damaged": damaged,
        "quarantine_sha256": file_sha256(output / QUARANTINE),
        "inputs": inputs,
        "not_read": job.not_read,
    }
    write_atomically(output / MANIFEST, json_bytes(seal_manifest(manifest)), aside=job.work)
    shutil.rmtree(job.work, ignore_errors=True)


def _input_entries(job: Job, records: list[dict]) -> list[dict]:
    """One entry per input file: what it gave, and which unit read which piece of it."""
    entries = {
        file.path: {"file": file.name, "kind": file.kind, "size": file.size, "documents": 0, "rejected": 0}
        | {"pieces": []}
        for file in job.files
    }
    for unit, record in enumerate(records):
        for piece, read in zip(job.units[unit], record["pieces"], strict=True):
            entry = entries[piece.file.path]
            entry["documents"] += read["documents"]
            entry["rejected"] += sum(read["rejected"].values())
            place = {name: read[name] for name in ("start", "end", "sha256", "lines")}
            entry["pieces"].append(place | {"unit": unit})
    return list(entries.values())


def _write_quarantine(job: Job, units: list[Path], records: list[dict]) -> None:
    """One file out of all. Lines of a file read in pieces were counted within each piece until now."""
    before: Counter[str] = Counter()  # lines of a file, by path, in the pieces so far
    partial = job.work / QUARANTINE
    with open(partial, "w", encoding="ascii") as out:
        for unit, record in enumerate(records):
            offsets: dict[str, int] = {}
            for piece, read in zip(job.units[unit], record["pieces"], strict=True):
                if piece.file.kind == "jsonl":
                    if before[piece.file.path]:
                        offsets[piece.file.name] = before[piece.file.path]
                    before[piece.file.path] += read["lines"]
            with open(units[unit] / QUARANTINE, encoding="ascii") as lines:
                if not offsets:
                    shutil.copyfileobj(lines, out)
                    continue
                for line in lines:
                    entry = json.loads(line)
                    entry["line"] += offsets.get(entry["file"], 0)
                    out.write(json.dumps(entry) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, job.output / QUARANTINE)


def _rejected(records: list[dict]) -> dict[str, int]:
    return _sum_counts(piece["rejected"] for record in records for piece in record["pieces"])


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def _sum_groups(groups: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = {}
    for one in groups:
        for name, counts in one.items():
            total.setdefault(name, Counter()).update(counts)
    return {name: dict(total[name]) for name in sorted(total)}


# A set that is finished already ------------------------------------------------------------------------


def _check_finished(job: Job) -> Job | None:
    """None when this command would make just what is there; a smaller job where shards are missing."""
    output = job.output
    manifest = ShardSet.open(output).manifest
    advice = "choose another --output or delete the folder"
    if manifest["settings_fingerprint"] != _fingerprint(job.facts):
        raise UserError(f"{output} holds shards made with other settings or another tokenizer; {advice}")
    found = [(file.name, file.size) for file in job.files]
    if found != [(entry["file"], entry["size"]) for entry in manifest["inputs"]]:
        raise UserError(f"{output} holds shards made from other input; {advice}")
    for file, entry in zip(job.files, manifest["inputs"], strict=True):
        for piece in entry["pieces"]:
            if Piece(file, piece["start"], piece["end"]).sha256() != piece["sha256"]:
                raise UserError(f"{output} holds shards made from another {file.name}; {advice}")
    missing = _missing(output, manifest)
    if not missing:
        return None
    job = replace(job, only=tuple(sorted(missing)))
    _begin(job)
    return job


def _missing(output: Path, manifest: dict) -> set[int]:
    """The units of which a shard is not there."""
    return {
        entry["unit"]
        for entry in manifest["shards"]
        for name in (entry["file"], entry["index"])
        if not (output / name).is_file()
    }


def _put_back(job: Job, board: Board) -> None:
    """Move shards that were made again to where they are missing. Raises `UserError` when they differ."""
    manifest = ShardSet.open(job.output).manifest
    for unit in job.only:
        shards = [entry for entry in manifest["shards"] if entry["unit"] == unit]
        record = json.loads((board.result("shard", unit) / RECORD).read_bytes())
        if [part["sha256"] for part in record["parts"]] != [entry["sha256"] for entry in shards]:
            raise UserError(
                f"{job.output}: its input gives other shards now; delete the folder and run again"
            )
        for number, entry in enumerate(shards):
            for ending, name in ((".tar", entry["file"]), (".index.npy", entry["index"])):
                made = board.result("shard", unit) / f"part-{number:03d}{ending}"
                if made.is_file():  # else an interrupted run has moved it
                    os.replace(made, job.output / name)
    shutil.rmtree(job.work, ignore_errors=True)


# Backends ----------------------------------------------------------------------------------------------


def choose_backend(name: str) -> str:
    """`auto` by the environment: `mpi` under mpirun, `slurm` in an array job, else `local`."""
    if name != "auto":
        return name
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1) > 1:
        return "mpi"
    return "slurm" if "SLURM_ARRAY_TASK_ID" in os.environ else "local"


def _make_by_mpi(
    inputs: list[str | Path],
    output: str | Path,
    tokenizer_folder: str | Path,
    settings: ShardSettings,
    report: Callable[[Progress], None],
) -> tuple[dict, bool]:
    """Rank 0 plans and tells; then every rank, the first too, takes part."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"the mpi backend needs mpi4py and an MPI: {error}") from error
    world = MPI.COMM_WORLD
    planned = None
    if world.rank == 0:
        try:
            tokenizer = load_tokenizer(tokenizer_folder)
            planned = plan(inputs, output, tokenizer, settings), None
        except (UserError, OSError) as error:
            planned = None, describe(error)
    job, refused = world.bcast(planned, root=0)
    if refused is not None:
        raise UserError(refused) if world.rank == 0 else SystemExit(2)
    if world.rank:
        tokenizer = load_tokenizer(tokenizer_folder)
    if job is not None:
        watch = functools.partial(_watch, job, report, Progress(job)) if world.rank == 0 else None
        try:
            take_part(job, tokenizer, watch)
        except (UserError, OSError) as error:
            # The others wait for this one's unit: end them, after one line that says why.
            print(f"data-prep: error: {describe(error)}", file=sys.stderr, flush=True)
            world.Abort(2)
        if watch:
            watch()
    return ShardSet.open(output).manifest, job is None


# Progress ----------------------------------------------------------------------------------------------


class Progress:
    """How far the whole run is, whoever does the work: read from the board, `update` by `update`.

    phase: name; done, total: bytes of input; documents, rejected: in this phase; fresh: bytes done since this
    object was made, in `seconds`.
    """

    def __init__(self, job: Job):
        self._board = _board(job)
        self._sizes = [_unit_bytes(unit) for unit in job.units]
        self._units = range(len(job.units)) if job.only is None else job.only
        self._names = (["hash"] if job.settings.deduplicate else []) + ["shard"]
        self._counts: dict[tuple[str, int], dict] = {}
        self._began = time.monotonic()
        self._first: int | None = None
        self.phase, self.done, self.total, self.documents, self.rejected = self._names[0], 0, 0, 0, 0
        self.total = sum(self._sizes[unit] for unit in self._units) * len(self._names)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def fresh(self) -> int:
        return self.done - (self._first or 0)

    def update(self) -> None:
        """Look at the board again."""
        if self._board.is_finished():
            self.done = self.total
            return
        running = {(phase, unit): claim for phase, unit, claim in self._board.claims()}
        self.done = 0
        for name in self._names:
            finished = self._board.done(name)
            here = [self._count(name, unit) for unit in finished]
            here += [
                claim for (phase, unit), claim in running.items() if phase == name and unit not in finished
            ]
            self.done += sum(count.get("bytes", 0) for count in here)
            if here:
                self.phase = name
                self.documents = sum(count.get("documents", 0) for count in here)
                self.rejected = sum(count.get("rejected", 0) for count in here)
        if self._first is None:
            self._first = self.done

    def _count(self, phase: str, unit: int) -> dict:
        if (phase, unit) not in self._counts:
            try:
                record = json.loads((self._board.result(phase, unit) / RECORD).read_bytes())
            except FileNotFoundError:  # all is finished and tidied up
                return {}
            self._counts[phase, unit] = record["counts"]
        return self._counts[phase, unit]


def _watch(job: Job, report: Callable[[Progress], None], progress: Progress) -> None:
    if job.work.is_dir() or progress.done:
        progress.update()
        report(progress)


class ProgressLine:
    """`report` for `make_shards`: a live line on a terminal, else a plain line every ten seconds."""

    def __init__(self, stream: object, label: str = "data-prep shard"):
        self._stream, self._label = stream, label
        self._bar = None
        self._looked = self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if self._stream.isatty():
            if self._bar is None:
                from tqdm import tqdm

                shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}B{postfix}"
                options = {"unit_scale": True, "desc": self._label, "bar_format": shape}
                self._bar = tqdm(total=progress.total, file=self._stream, **options)
            self._bar.set_postfix_str(self._said_of(progress), refresh=False)
            self._bar.update(progress.done - self._bar.n)
        elif time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            line = f"{self._label}: {progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB read, "
            print(line + self._said_of(progress), file=self._stream, flush=True)

    def _said_of(self, progress: Progress) -> str:
        speed = progress.fresh / max(progress.seconds, 1e-3)
        left = (progress.total - progress.done) / speed if speed else float("inf")
        eta = f", {_duration(left)} left" if left < 1e8 else ""
        rate = progress.documents / max(progress.seconds, 1e-3)
        return (
            f"{progress.documents:,} documents ({rate:,.0f}/s), {speed / 1e6:.1f} MB/s, "
            f"{progress.rejected:,} rejected{eta}"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    )
