"""The work of one process of `data-prep shard`: units of each phase, one after another.

Phases: with `--deduplicate` first `hash` (the hashes of a unit's good documents) and `duplicates` (which of
them repeat an earlier one); then `shard` (a unit's shards, quarantine and record); then `merge`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.common.files import json_bytes
from data_prep.corpus import duplicates
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject
from data_prep.corpus.inputs import Piece
from data_prep.jobs.executor import HEARTBEAT_SECONDS, RECORD, Heartbeat, Incomplete, Phase, run_phases
from data_prep.jobs.job import Job
from data_prep.jobs.merge import merge, restore_shards
from data_prep.shards.layout import QUARANTINE, Document, hash64, token_dtype
from data_prep.shards.writer import ShardSeries
from data_prep.text.sentences import cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer

HASHES = "hashes.bin"


def run_worker(job: Job, tokenizer: Tokenizer, watch: Callable[[], None] | None = None) -> None:
    """Run units of the job until all of them are done. `watch()` is called regularly."""
    worker = Worker(job, tokenizer, watch or (lambda: None))
    # The largest first, so that no process runs a long unit alone at the end.
    order = sorted(range(len(job.units)), key=lambda unit: -job.unit_bytes(unit))
    phases = []
    if job.settings.deduplicate:
        phases.append(Phase("hash", order, worker.hash_unit))
        phases.append(Phase("duplicates", [0], worker.find_duplicates))
    if job.only is not None:
        order = [unit for unit in order if unit in job.only]
    phases += [Phase("shard", order, worker.shard_unit), Phase("merge", [0], worker.merge)]
    run_phases(worker.work, phases)


class Worker:
    """One process of a job. Its public methods run one unit each, as `Phase.run`."""

    def __init__(self, job: Job, tokenizer: Tokenizer, watch: Callable[[], None]):
        self.job, self.tokenizer, self.work, self._watch = job, tokenizer, job.work_folder(), watch

    def hash_unit(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """The hashes of a unit's good documents, in order."""
        counts = _Counts(heartbeat, self._watch)
        hashes = bytearray()
        for _, reader in self._pieces(unit):
            for item in counts.follow(reader):
                if isinstance(item, RawDocument):
                    hashes += duplicates.hash128(item.content.encode("utf-8"))
        duplicates.write_hashes(folder / HASHES, hashes)
        (folder / RECORD).write_bytes(json_bytes({"counts": counts.final()}))

    def find_duplicates(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """The documents of every unit whose text occurs earlier, in the order of units and documents."""
        every = range(len(self.job.units))
        self._require("hash", every)
        files = [self.work.result("hash", n) / HASHES for n in every]
        for n, dropped in enumerate(duplicates.find(files, lambda: heartbeat({}))):
            np.save(folder / f"{n:06d}.npy", dropped)
        (folder / RECORD).write_bytes(json_bytes({"counts": {}}))

    def shard_unit(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """Read one unit; write its shards as `part-NNN.tar`, its quarantine and a record."""
        settings = self.job.settings
        counts = _Counts(heartbeat, self._watch)
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

    def merge(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """Finish the set."""
        if self.job.only is None:
            merge(self.job, self.work, self.tokenizer, folder, heartbeat)
        else:
            restore_shards(self.job, self.work, heartbeat)

    def _pieces(self, unit: int) -> Iterator[tuple[Piece, DocumentReader]]:
        settings = self.job.settings
        for piece in self.job.units[unit]:
            yield piece, DocumentReader(piece, settings.sentences.language, settings.hygiene)

    def _dropped(self, unit: int) -> set[int]:
        """Numbers of the unit's good documents that repeat an earlier one."""
        if not self.job.settings.deduplicate:
            return set()
        self._require("duplicates", [0])
        return set(np.load(self.work.result("duplicates", 0) / f"{unit:06d}.npy").tolist())

    def _require(self, phase: str, units: Iterable[int]) -> None:
        """Raises `Incomplete` after discarding results that a crash of the machine truncated."""
        if broken := [unit for unit in units if not self.work.is_complete(phase, unit)]:
            for unit in broken:
                self.work.discard(phase, unit)
            raise Incomplete

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

    def __init__(self, heartbeat: Heartbeat, watch: Callable[[], None]):
        self._heartbeat, self._watch = heartbeat, watch
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
                self._watch()
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
