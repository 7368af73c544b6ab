"""What every process of a run of `data-prep shard` does: units of its phases, one after another.

In: a `Job` and a tokenizer. Out: the results of units, as folders (`execution.py` hands out the units and
publishes the folders). Called by `sharding.py`, once per process.

Phases: with `--deduplicate` first `hash` (the hashes of a unit's good documents) and `duplicates` (which of
them repeat an earlier one); then `shard`: a unit's shards, its quarantine and a record; then `merge`.
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
from data_prep.jobs import merge as merging
from data_prep.jobs.executor import BEAT_SECONDS, RECORD, Incomplete, Phase, run_phases
from data_prep.jobs.job import Job
from data_prep.shards.layout import QUARANTINE, Document, hash64, token_dtype
from data_prep.shards.writer import ShardSeries
from data_prep.text.sentences import cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer

HASHES = "hashes.bin"

Beat = Callable[[dict], None]


def take_part(job: Job, tokenizer: Tokenizer, watch: Callable[[], None] | None = None) -> None:
    """Do units of the job until all of it is done, by whomever. `watch()` is called now and then."""
    worker = Worker(job, tokenizer, watch or (lambda: None))
    # The largest first, so that nobody is left alone with a long one at the end.
    order = sorted(range(len(job.units)), key=lambda unit: -job.unit_bytes(unit))
    phases = []
    if job.settings.deduplicate:
        phases.append(Phase("hash", order, worker.hash_unit))
        phases.append(Phase("duplicates", [0], worker.find_duplicates))
    if job.only is not None:
        order = [unit for unit in order if unit in job.only]
    phases += [Phase("shard", order, worker.shard_unit), Phase("merge", [0], worker.merge)]
    run_phases(worker.board, phases)


class Worker:
    """One process's part in a job. Its methods run one unit each, as `execution.Phase` wants it."""

    def __init__(self, job: Job, tokenizer: Tokenizer, watch: Callable[[], None]):
        self.job, self.tokenizer, self.board, self._watch = job, tokenizer, job.board(), watch

    def hash_unit(self, unit: int, folder: Path, beat: Beat) -> None:
        """The hashes of a unit's good documents, in order."""
        counts = _Counts(beat, self._watch)
        hashes = bytearray()
        for _, reader in self._pieces(unit):
            for item in counts.follow(reader):
                if isinstance(item, RawDocument):
                    hashes += duplicates.hash128(item.content.encode("utf-8"))
        duplicates.write_hashes(folder / HASHES, hashes)
        (folder / RECORD).write_bytes(json_bytes({"counts": counts.final()}))

    def find_duplicates(self, unit: int, folder: Path, beat: Beat) -> None:
        """For every unit the documents whose text came before, in the order of units and documents."""
        every = range(len(self.job.units))
        self._require("hash", every)
        files = [self.board.result("hash", n) / HASHES for n in every]
        for n, dropped in enumerate(duplicates.find(files, lambda: beat({}))):
            np.save(folder / f"{n:06d}.npy", dropped)
        (folder / RECORD).write_bytes(json_bytes({"counts": {}}))

    def shard_unit(self, unit: int, folder: Path, beat: Beat) -> None:
        """Read one unit and write its shards as `part-NNN.tar`, their quarantine and a record."""
        settings = self.job.settings
        counts = _Counts(beat, self._watch)
        dropped = self._dropped(unit)
        dtype = token_dtype(self.tokenizer.vocab_size)
        limits = settings.shard_bytes, settings.shard_documents
        shards = ShardSeries(folder / "part-", 3, dtype, settings.compression, *limits)
        repaired: Counter[str] = Counter()
        pieces: list[dict] = []
        good = 0  # documents that hygiene let pass
        with open(folder / QUARANTINE, "wb") as quarantine:
            for piece, reader in self._pieces(unit):
                rejected: Counter[str] = Counter()
                documents, began = 0, quarantine.tell()
                for item in counts.follow(reader):
                    if isinstance(item, RawDocument):
                        good += 1
                        item = self._cut(item, good - 1 in dropped)
                        if isinstance(item, Reject):
                            counts.take_back()
                    if isinstance(item, Reject):
                        rejected[item.reason] += 1
                        quarantine.write(_quarantine_line(piece, item))
                        continue
                    shards.add(item)
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
                        "quarantine_bytes": quarantine.tell() - began,
                        "damage": reader.damage,
                    }
                )
        shards.close()
        record = {"pieces": pieces, "repaired": repaired, "parts": shards.entries, "counts": counts.final()}
        record |= {"languages": shards.languages, "sources": shards.sources}
        (folder / RECORD).write_bytes(json_bytes(record))

    def merge(self, unit: int, folder: Path, beat: Beat) -> None:
        """The end of the run."""
        if self.job.only is None:
            merging.merge(self.job, self.board, self.tokenizer, folder, beat)
        else:
            merging.put_back(self.job, self.board, beat)

    def _pieces(self, unit: int) -> Iterator[tuple[Piece, DocumentReader]]:
        settings = self.job.settings
        for piece in self.job.units[unit]:
            yield piece, DocumentReader(piece, settings.sentences.language, settings.hygiene)

    def _dropped(self, unit: int) -> set[int]:
        """Numbers of the unit's good documents that repeat an earlier one."""
        if not self.job.settings.deduplicate:
            return set()
        self._require("duplicates", [0])
        return set(np.load(self.board.result("duplicates", 0) / f"{unit:06d}.npy").tolist())

    def _require(self, phase: str, units: Iterable[int]) -> None:
        """Raises `Incomplete` after dropping results that a crash of the machine cut short."""
        if broken := [unit for unit in units if not self.board.whole(phase, unit)]:
            for unit in broken:
                self.board.drop(phase, unit)
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
        return Document(raw.id, raw.language, raw.source, tokens, lengths, len(data), hash64(data))


class _Counts:
    """Follows readers and tells, now and then, how far they are."""

    def __init__(self, beat: Beat, watch: Callable[[], None]):
        self._beat, self._watch = beat, watch
        self._before = self._bytes = self._documents = self._rejected = 0
        self._told = time.monotonic()

    def follow(self, reader: DocumentReader) -> Iterator[RawDocument | Reject]:
        for item in reader:
            if isinstance(item, Reject):
                self._rejected += 1
            else:
                self._documents += 1
            yield item
            if time.monotonic() - self._told >= BEAT_SECONDS:
                self._told = time.monotonic()
                self._bytes = self._before + reader.bytes_read
                self._beat(self.final())
                self._watch()
        self._before += reader.bytes_read
        self._bytes = self._before

    def take_back(self) -> None:
        """The last document was none after all: its text stands elsewhere, or cannot be tokenized."""
        self._documents -= 1
        self._rejected += 1

    def final(self) -> dict[str, int]:
        return {"bytes": self._bytes, "documents": self._documents, "rejected": self._rejected}


def _quarantine_line(piece: Piece, reject: Reject) -> bytes:
    member = {"member": reject.member} if reject.member else {}
    entry = {"file": piece.file.name, **member, "line": reject.line, "reason": reject.reason}
    return json.dumps(entry).encode("ascii") + b"\n"
