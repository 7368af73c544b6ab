"""The work of one unit of `data-prep shard`, in whatever process runs it.

Phases: where documents are compared, first `seen` (the signatures of a shard of an earlier set), `hash`
(hashes and signatures of a unit's good documents) and `duplicates` (which of them repeat or resemble an
earlier one, one step for all units); then `shard` (a unit's shards, quarantine and record).
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from data_prep.common.errors import UserError
from data_prep.common.files import json_bytes, read_json
from data_prep.common.results import RECORD, WorkFolder
from data_prep.corpus import duplicates, near_duplicates
from data_prep.corpus.compression import CONTAMINATED, Damage, DamagedMember
from data_prep.corpus.decontamination import HeldOutSpans, HeldOutTexts
from data_prep.corpus.documents import DocumentReader, RawDocument, Reject, find_damage
from data_prep.corpus.filters import DUPLICATE, NEAR_DUPLICATE, SHARES_WORDS
from data_prep.corpus.inputs import Piece
from data_prep.jobs.job import Job, Task
from data_prep.jobs.limits import LEAST_RECORDS, UNVERIFIED_TEXT, Limits, TooManyRejected
from data_prep.shards.layout import QUARANTINE, Document, hash64, token_dtype
from data_prep.shards.reader import ShardSet
from data_prep.shards.writer import ShardSeries
from data_prep.text.sentences import cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer, load_tokenizer

HASHES, SPANS = "hashes.bin", "spans.npz"
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
        runs = {"seen": worker.sign_seen, "hash": worker.hash_unit, "shard": worker.shard_unit}
        runs[task.phase](task.unit, folder, heartbeat)

    with _one_at_a_time:
        task.job.work_folder().make(task.phase, task.unit, run)


def find_duplicates(job: Job, work: WorkFolder, heartbeat: Callable[[], None], folder: Path) -> None:
    """Which documents of every unit are dropped for an earlier one, in the order of units and documents.

    Writes {number: id of the earlier document, or null where the text is the same} for each unit.
    """
    settings = job.settings
    units, seen = list(job.units), range(len(job.seen))
    work.require("hash", units)
    results = [work.result("hash", n) for n in units]
    dropped: list[dict[int, str | None]] = [{} for _ in units]
    if settings.near_duplicates is not None:
        work.require("seen", seen)
        folders = [work.result("seen", n) for n in seen] + results
        found = near_duplicates.find(folders, settings.near_duplicates, heartbeat)
        dropped = list(itertools.islice(found, len(seen), None))
    if settings.deduplicate:
        files = [result / HASHES for result in results]
        for unit, same in zip(dropped, duplicates.find(files, heartbeat), strict=True):
            unit |= dict.fromkeys(same.tolist())
    for n, unit in enumerate(dropped):
        (folder / f"{n:06d}.json").write_text(json.dumps(unit), encoding="ascii")
    (folder / RECORD).write_bytes(json_bytes({"counts": {}}))


def write_test_spans(job: Job, folder: Path) -> None:
    """The spans of the test texts, for all processes."""
    texts, spans = HeldOutTexts.read(job.settings.test_texts.files)
    if texts != job.settings.test_texts:
        raise UserError(f"test texts {', '.join(texts.files)} have changed since the run started; run again")
    spans.write(folder / SPANS)
    (folder / RECORD).write_bytes(json_bytes({"counts": {}}))


class Worker:
    """Runs units of a job. Its public methods write the result of one unit to an empty folder."""

    def __init__(self, job: Job):
        self.job, self.work = job, job.work_folder()

    def sign_seen(self, number: int, folder: Path, heartbeat: Heartbeat) -> None:
        """The signatures of one shard of the sets whose documents count as earlier ones."""
        path, shard = self.job.seen[number]
        shards, signer = ShardSet.open(path), near_duplicates.Signer()
        tokenizer, documents = shards.tokenizer(), shards.shard(shard)
        for n in range(len(documents)):
            document = documents.document(n)
            signer.add(document.id, tokenizer.decode(document.tokens))
            heartbeat({})
        signer.write(folder)
        (folder / RECORD).write_bytes(json_bytes({"counts": {}}))

    def hash_unit(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """The hashes and signatures of a unit's good documents, in order."""
        settings = self.job.settings

        def read(readers: Readers, counts: _Counts) -> list[str]:
            hashes, found = bytearray(), []
            signer = near_duplicates.Signer() if settings.near_duplicates is not None else None
            for _, reader in readers:
                for item in counts.follow(reader):
                    if isinstance(item, RawDocument):
                        hashes += duplicates.hash128(item.content.encode("utf-8"))
                        if signer:
                            signer.add(item.id, item.content)
                found.append(reader.sha256)
            duplicates.write_hashes(folder / HASHES, hashes)
            if signer:
                signer.write(folder)
            return found

        found, counts = self._verified(unit, folder, heartbeat, read)
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
                        result = self._judge(item, good - 1, dropped)
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

    def _dropped(self, unit: int) -> dict[str, str | None]:
        """The unit's good documents that are dropped for an earlier one (see `find_duplicates`)."""
        if not self.job.settings.compares:
            return {}
        self.work.require("duplicates", [0])
        self.work.require("hash", [unit])
        return read_json(self.work.result("duplicates", 0) / f"{unit:06d}.json")

    def _judge(self, raw: RawDocument, number: int, dropped: dict[str, str | None]) -> Document | Reject:
        """A good document as it is stored, or why it is not. `number`: among the unit's good ones."""
        mark = raw.mark
        if (key := str(number)) in dropped:
            of = dropped[key]
            return Reject(raw.line, DUPLICATE if of is None else NEAR_DUPLICATE, raw.member, of or "")
        if self._spans and (words := self._spans.found_in(raw.content)):
            if not self.job.settings.mark_contaminated:
                return Reject(raw.line, SHARES_WORDS, raw.member, words)
            mark |= CONTAMINATED
        settings = self.job.settings.sentences
        segmenter = settings.segmenter_for(raw.language)
        try:
            tokens, lengths = cut_document(raw.content, self.tokenizer, segmenter, settings)
        except LossyTokenization:
            return Reject(raw.line, "tokenizer loses text", raw.member)
        data = raw.content.encode("utf-8")
        facts = raw.id, raw.language, raw.source
        return Document(*facts, tokens, lengths, len(data), hash64(data), mark)

    @functools.cached_property
    def _spans(self) -> HeldOutSpans | None:
        if self.job.settings.test_texts is None:
            return None
        self.work.require("spans", [0])
        return HeldOutSpans.load(self.work.result("spans", 0) / SPANS)


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
    if reject.of:
        entry["of"] = reject.of
    return json.dumps(entry).encode("ascii") + b"\n"
