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

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.files import json_bytes
from data_prep.common.results import RECORD, WorkFolder
from data_prep.corpus import duplicates
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject
from data_prep.corpus.inputs import Piece
from data_prep.jobs.job import Job, Task
from data_prep.shards.layout import QUARANTINE, Document, hash64, token_dtype
from data_prep.shards.writer import ShardSeries
from data_prep.text.sentences import cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer, load_tokenizer

HASHES = "hashes.bin"
HEARTBEAT_SECONDS = 0.5

Heartbeat = Callable[[dict[str, int]], None]

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
        counts = _Counts(heartbeat)
        hashes = bytearray()
        for _, reader in self._pieces(unit):
            for item in counts.follow(reader):
                if isinstance(item, RawDocument):
                    hashes += duplicates.hash128(item.content.encode("utf-8"))
        duplicates.write_hashes(folder / HASHES, hashes)
        (folder / RECORD).write_bytes(json_bytes({"counts": counts.final()}))

    def shard_unit(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """Read one unit; write its shards as `part-NNN.tar`, its quarantine and a record."""
        settings = self.job.settings
        counts = _Counts(heartbeat)
        dropped = self._dropped(unit)
        dtype = token_dtype(self.tokenizer.vocab_size)
        limits = settings.shard_bytes, settings.shard_documents
        shards = ShardSeries(folder / "part-", 3, dtype, settings.compression, *limits)
        repaired: Counter[str] = Counter()
        pieces: list[dict] = []
        good = 0  # documents that passed the filters
        with open(folder / QUARANTINE, "wb") as quarantine:
            for piece, reader in self._pieces(unit):
                rejected: Counter[str] = Counter()
                documents, start = 0, quarantine.tell()
                for item in counts.follow(reader):
                    result: Document | Reject
                    if isinstance(item, RawDocument):
                        good += 1
                        result = self._cut(item, good - 1 in dropped)
                        if isinstance(result, Reject):
                            counts.move_to_rejected()
                    else:
                        result = item
                    if isinstance(result, Reject):
                        rejected[result.reason] += 1
                        quarantine.write(_quarantine_line(piece, result))
                        continue
                    shards.add(result)
                    documents += 1
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
                        "damage": reader.damage,
                    }
                )
        shards.close()
        record = {"pieces": pieces, "repaired": repaired, "parts": shards.entries, "counts": counts.final()}
        record |= {"languages": shards.languages, "sources": shards.sources}
        (folder / RECORD).write_bytes(json_bytes(record))

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

    def _pieces(self, unit: int) -> Iterator[tuple[Piece, DocumentReader]]:
        settings = self.job.settings
        for piece in self.job.units[unit]:
            yield piece, DocumentReader(piece, settings.sentences.language, settings.hygiene)

    def _dropped(self, unit: int) -> set[int]:
        """Numbers of the unit's good documents that repeat an earlier one."""
        if not self.job.settings.deduplicate:
            return set()
        self.work.require("duplicates", [0])
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
        return Document(*facts, tokens, lengths, len(data), hash64(data), confidence=raw.confidence)


class _Counts:
    """Counts what readers yield, and reports the counts regularly."""

    def __init__(self, heartbeat: Heartbeat):
        self._heartbeat = heartbeat
        self._before = self._bytes = self._documents = self._rejected = 0
        self._sent = time.monotonic()

    def follow(self, reader: DocumentReader) -> Iterator[RawDocument | Reject]:
        for item in reader:
            if isinstance(item, Reject):
                self._rejected += 1
            else:
                self._documents += 1
            yield item
            if time.monotonic() - self._sent >= HEARTBEAT_SECONDS:
                self._sent = time.monotonic()
                self._bytes = self._before + reader.bytes_read
                self._heartbeat(self.final())
        self._before += reader.bytes_read
        self._bytes = self._before

    def move_to_rejected(self) -> None:
        """Count the last document as rejected: its text is a duplicate or cannot be tokenized."""
        self._documents -= 1
        self._rejected += 1

    def final(self) -> dict[str, int]:
        return {"bytes": self._bytes, "documents": self._documents, "rejected": self._rejected}


def _quarantine_line(piece: Piece, reject: Reject) -> bytes:
    member = {"member": reject.member} if reject.member else {}
    entry = {"file": piece.file.name, **member, "line": reject.line, "reason": reject.reason}
    return json.dumps(entry).encode("ascii") + b"\n"
