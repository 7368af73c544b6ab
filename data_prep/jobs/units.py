"""The work of one unit of `data-prep shard`, in whatever process runs it.

Phases: with `--deduplicate` first `hash` (the hashes of a unit's good documents) and `duplicates` (which of
them repeat an earlier one, one step for all units); then `shard` (a unit's shards, quarantine and record).
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.files import json_bytes
from data_prep.common.results import RECORD, WorkFolder
from data_prep.corpus import duplicates
from data_prep.corpus.compression import Damage, DamagedMember
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject, find_damage
from data_prep.corpus.inputs import Piece
from data_prep.jobs.job import Job, Task
from data_prep.jobs.limits import LEAST_RECORDS, UNVERIFIED_TEXT, Limits, TooManyRejected
from data_prep.shards.layout import QUARANTINE, Document, hash64, token_dtype
from data_prep.shards.writer import ShardSeries
from data_prep.text.sentences import cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer, load_tokenizer

HASHES = "hashes.bin"
DAMAGED = "damaged input"  # the quarantine's reason for a part that was left out
HEARTBEAT_SECONDS = 0.5

Heartbeat = Callable[[dict[str, int]], None]
Readers = Iterator[tuple[Piece, DocumentReader]]
T = TypeVar("T")

loaded: dict[str, Tokenizer] = {}  # by fingerprint; filled before processes are forked
_one_at_a_time = threading.Lock()  # a Dask worker may have several threads


def run_unit(task: Task, watch: Callable[[], None] = lambda: None) -> None:
    """Run one unit and publish its result. `watch()` is called regularly."""

    def run(folder: Path) -> None:
        def heartbeat(counts: dict[str, int]) -> None:
            (folder / RECORD).write_bytes(json_bytes({"counts": counts}))
            watch()

        worker = Worker(task.job)
        (worker.hash_unit if task.phase == "hash" else worker.shard_unit)(task.unit, folder, heartbeat)

    with _one_at_a_time:
        task.job.work_folder().make(task.phase, task.unit, run)


def find_duplicates(job: Job, work: WorkFolder, heartbeat: Callable[[], None], folder: Path) -> None:
    """The documents of every unit whose text occurs earlier, in the order of units and documents."""
    work.require("hash", job.units)
    files = [work.result("hash", n) / HASHES for n in job.units]
    for n, dropped in enumerate(duplicates.find(files, heartbeat)):
        np.save(folder / f"{n:06d}.npy", dropped)
    (folder / RECORD).write_bytes(json_bytes({"counts": {}}))


class Worker:
    """Runs units of a job. Its public methods write the result of one unit to an empty folder."""

    def __init__(self, job: Job):
        self.job, self.work = job, job.work_folder()

    def hash_unit(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """The hashes of a unit's good documents, in order."""

        def read(readers: Readers, counts: _Counts) -> tuple[bytearray, list[str]]:
            hashes, found = bytearray(), []
            for _, reader in readers:
                for item in counts.follow(reader):
                    if isinstance(item, RawDocument):
                        hashes += duplicates.hash128(item.content.encode("utf-8"))
                found.append(reader.sha256)
            return hashes, found

        (hashes, found), counts = self._verified(unit, folder, heartbeat, read)
        duplicates.write_hashes(folder / HASHES, hashes)
        (folder / RECORD).write_bytes(json_bytes({"counts": counts.final(), "sha256": found}))

    def shard_unit(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """Read one unit; write its shards as `part-NNN.tar`, its quarantine and a record."""
        dropped = self._dropped(unit)

        def read(readers: Readers, counts: _Counts) -> dict:
            return self._shard(readers, counts, folder, dropped)

        record, counts = self._verified(unit, folder, heartbeat, read)
        if self.job.settings.deduplicate:
            hashed = json.loads((self.work.result("hash", unit) / RECORD).read_bytes())
            # The numbers of duplicates count the documents that were hashed.
            if hashed["sha256"] != [piece["sha256"] for piece in record["pieces"]]:
                names = ", ".join(piece.file.name for piece in self.job.units[unit][:3])
                raise UserError(f"{names}: changed while it was read; delete {self.job.work} and run again")
        (folder / RECORD).write_bytes(json_bytes(record | {"counts": counts.final()}))

    def _shard(self, readers: Readers, counts: _Counts, folder: Path, dropped: set[int]) -> dict:
        settings = self.job.settings
        dtype = token_dtype(self.tokenizer.vocab_size)
        limits = settings.shard_bytes, settings.shard_documents
        shards = ShardSeries(folder / "part-", 3, dtype, settings.compression, *limits)
        repaired: Counter[str] = Counter()
        pieces: list[dict] = []
        good = 0  # documents that passed the filters
        with open(folder / QUARANTINE, "wb") as quarantine:
            for piece, reader in readers:
                rejected: Counter[str] = Counter()
                documents, start = 0, quarantine.tell()
                for item in counts.follow(reader):
                    result: Document | Reject
                    if isinstance(item, RawDocument):
                        good += 1
                        result = self._cut(item, good - 1 in dropped)
                        if isinstance(result, Reject):
                            counts.move_to_rejected(result.reason)
                    else:
                        result = item
                    if isinstance(result, Reject):
                        rejected[result.reason] += 1
                        quarantine.write(_quarantine_line(piece, result))
                        continue
                    shards.add(result)
                    documents += 1
                for damage in reader.damage:
                    rejected[DAMAGED] += 1
                    quarantine.write(_quarantine_line(piece, Reject(0, DAMAGED), damage.start))
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
                        "quarantine_bytes": quarantine.tell() - start,
                        "damage": [
                            {"offset": one.start, "bytes": one.end - one.start, "damage": one.reason}
                            for one in reader.damage
                        ],
                        "unverified": reader.unverified,
                    }
                )
        shards.close()
        record = {"pieces": pieces, "repaired": repaired, "parts": shards.entries, "marked": shards.marked}
        return record | {"languages": shards.languages, "sources": shards.sources}

    @property
    def tokenizer(self) -> Tokenizer:
        """The job's, loaded once in each process."""
        wanted = self.job.facts["tokenizer"]["fingerprint"]
        if wanted not in loaded:
            found = load_tokenizer(self.job.tokenizer)
            if found.fingerprint != wanted:
                raise UserError(
                    f"{self.job.tokenizer} holds another tokenizer here than where the run started"
                )
            loaded[wanted] = found
        return loaded[wanted]

    def _verified(
        self, unit: int, folder: Path, heartbeat: Heartbeat, read: Callable[[Readers, _Counts], T]
    ) -> tuple[T, _Counts]:
        """What `read` makes of a unit in `folder`, and the counts; made again, without the damaged members,
        when a member fails its checksum after its text was read."""
        pieces, settings = self.job.units[unit], self.job.settings

        def attempt(damage: list[tuple[Damage, ...]] | None) -> tuple[T, _Counts]:
            counts = _Counts(heartbeat, self.job.limits)

            def readers() -> Readers:
                for n, piece in enumerate(pieces):
                    known = damage[n] if damage else None
                    arguments = settings.sentences.language, settings.hygiene, known, settings.salvage
                    yield piece, (reader := DocumentReader(piece, *arguments))
                    problems = [one.reason for one in reader.damage]
                    problems += [UNVERIFIED_TEXT] if reader.unverified else []
                    self.job.limits.refuse_damage(piece.file.name, next(iter(problems), None))

            return read(readers(), counts), counts

        try:
            return attempt(None)
        except (DamagedMember, TooManyRejected) as error:  # garbage may be rejected before its checksum fails
            tick = _Counts(heartbeat, self.job.limits).tick
            damage = [find_damage(piece, tick) for piece in pieces]
            if not any(damage):
                raise
            if self.job.limits.strict:
                raise UserError(f"{error}; --strict stops there, without it the rest is kept") from None
        for path in folder.iterdir():
            path.unlink()
        return attempt(damage)

    def _dropped(self, unit: int) -> set[int]:
        """Numbers of the unit's good documents that repeat an earlier one."""
        if not self.job.settings.deduplicate:
            return set()
        self.work.require("duplicates", [0])
        self.work.require("hash", [unit])
        return set(np.load(self.work.result("duplicates", 0) / f"{unit:06d}.npy").tolist())

    def _cut(self, raw: RawDocument, is_duplicate: bool) -> Document | Reject:
        if is_duplicate:
            return Reject(raw.line, "duplicate", raw.member)
        settings = self.job.settings.sentences
        segmenter = settings.segmenter_for(raw.language)
        try:
            tokens, lengths = cut_document(raw.content, self.tokenizer, segmenter, settings)
        except LossyTokenization:
            return Reject(raw.line, "tokenizer loses text", raw.member)
        data = raw.content.encode("utf-8")
        facts = raw.id, raw.language, raw.source
        return Document(*facts, tokens, lengths, len(data), hash64(data), raw.mark, raw.confidence)


class _Counts:
    """Counts what readers yield, reports the counts regularly, and stops when too much is rejected."""

    def __init__(self, heartbeat: Heartbeat, limits: Limits):
        self._heartbeat, self._limits = heartbeat, limits
        self._before = self._bytes = self._documents = 0
        self._rejected: Counter[str] = Counter()
        self._sent = time.monotonic()

    def follow(self, reader: DocumentReader) -> Iterator[RawDocument | Reject]:
        for item in reader:
            if isinstance(item, Reject):
                self._rejected[item.reason] += 1
                if self._documents + self._rejected.total() >= LEAST_RECORDS:
                    self._limits.refuse_rejected(self._rejected, self._documents, reader.file.name)
            else:
                self._documents += 1
            yield item
            self._bytes = self._before + reader.bytes_read
            self.tick()
        self._before += reader.bytes_read
        self._bytes = self._before

    def tick(self) -> None:
        """Report the counts, if that is due."""
        if time.monotonic() - self._sent >= HEARTBEAT_SECONDS:
            self._sent = time.monotonic()
            self._heartbeat(self.final())

    def move_to_rejected(self, reason: str) -> None:
        """Count the last document as rejected: its text is a duplicate or cannot be tokenized."""
        self._documents -= 1
        self._rejected[reason] += 1

    def final(self) -> dict[str, int]:
        rejected = self._rejected.total()
        return {"bytes": self._bytes, "documents": self._documents, "rejected": rejected}


def _quarantine_line(piece: Piece, reject: Reject, offset: int | None = None) -> bytes:
    place = {"member": reject.member} if reject.member else {} if offset is None else {"offset": offset}
    entry = {"file": piece.file.name, **place, "line": reject.line, "reason": reject.reason}
    return json.dumps(entry).encode("ascii") + b"\n"
