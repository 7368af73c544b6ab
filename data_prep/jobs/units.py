"""The work of one unit of `data-prep shard`, in whatever process runs it.

Phases: where documents are compared, first `seen` (the signatures of a shard of an earlier set), `hash`
(hashes and signatures of a unit's good documents) and `duplicates` (which of them repeat or resemble an
earlier one, one step for all units); then `shard` (a unit's shards, quarantine and record).
"""

from __future__ import annotations

import functools
import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.common.files import json_bytes, read_json
from data_prep.common.results import RECORD, WorkFolder
from data_prep.corpus.comparisons import Fingerprints, find_earlier
from data_prep.corpus.compression import CONTAMINATED
from data_prep.corpus.decontamination import HeldOutSpans, HeldOutTexts
from data_prep.corpus.documents import RawDocument, Reject
from data_prep.corpus.filters import DUPLICATE, NEAR_DUPLICATE, SHARES_WORDS
from data_prep.corpus.verified import Counts, Heartbeat, Readers, VerifiedReading
from data_prep.jobs.job import Job, Task
from data_prep.shards.layout import QUARANTINE, Document, hash64, token_dtype
from data_prep.shards.quarantine import DAMAGED, damaged_line, rejected_line
from data_prep.shards.reader import ShardSet
from data_prep.shards.writer import ShardSeries
from data_prep.text.sentences import cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer, load_tokenizer

SPANS = "spans.npz"

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
    work.require("hash", job.units)
    work.require("seen", range(len(job.settings.seen_shards)))
    units = [work.result("hash", n) for n in job.units]
    seen = [work.result("seen", n) for n in range(len(job.settings.seen_shards))]
    found = find_earlier(units, seen, settings.deduplicate, settings.near_duplicates, heartbeat)
    for n, dropped in enumerate(found):
        (folder / f"{n:06d}.json").write_text(json.dumps(dropped), encoding="ascii")
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
        self.job, self.work, settings = job, job.work_folder(), job.settings
        language = settings.sentences.language
        self._reading = VerifiedReading(language, settings.hygiene, settings.salvage, job.limits)

    def sign_seen(self, number: int, folder: Path, heartbeat: Heartbeat) -> None:
        """The signatures of one shard of the sets whose documents count as earlier ones."""
        path, shard = self.job.settings.seen_shards[number]
        shards, prints = ShardSet.open(path), Fingerprints(near=True)
        tokenizer, documents = shards.tokenizer(), shards.shard(shard)
        for n in range(len(documents)):
            document = documents.document(n)
            prints.add(document.id, tokenizer.decode(document.tokens))
        prints.write(folder)
        (folder / RECORD).write_bytes(json_bytes({"counts": {}}))

    def hash_unit(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """The hashes and signatures of a unit's good documents, in order."""

        def make(readers: Readers, counts: Counts) -> list[str]:
            prints, found = Fingerprints(self.job.settings.near_duplicates is not None), []
            for _, reader in readers:
                for item in counts.follow(reader):
                    if isinstance(item, RawDocument):
                        prints.add(item.id, item.content)
                found.append(reader.sha256)
            prints.write(folder)
            return found

        found, counts = self._reading.read(self.job.units[unit], folder, heartbeat, make)
        (folder / RECORD).write_bytes(json_bytes({"counts": counts.final(), "sha256": found}))

    def shard_unit(self, unit: int, folder: Path, heartbeat: Heartbeat) -> None:
        """Read one unit; write its shards as `part-NNN.tar`, its quarantine and a record."""
        dropped = self._dropped(unit)

        def make(readers: Readers, counts: Counts) -> dict:
            return self._shard(readers, counts, folder, dropped)

        record, counts = self._reading.read(self.job.units[unit], folder, heartbeat, make)
        if self.job.settings.compares:
            hashed = json.loads((self.work.result("hash", unit) / RECORD).read_bytes())
            # The numbers of duplicates count the documents that were hashed.
            if hashed["sha256"] != [piece["sha256"] for piece in record["pieces"]]:
                names = ", ".join(piece.file.name for piece in self.job.units[unit][:3])
                raise UserError(f"{names}: changed while it was read; delete {self.job.work} and run again")
        (folder / RECORD).write_bytes(json_bytes(record | {"counts": counts.final()}))

    def _shard(self, readers: Readers, counts: Counts, folder: Path, dropped: dict[str, str | None]) -> dict:
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
                        quarantine.write(rejected_line(piece, result))
                        continue
                    shards.add(result)
                    documents += 1
                for damage in reader.damage:
                    rejected[DAMAGED] += 1
                    quarantine.write(damaged_line(piece, damage))
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
        tokens = tokens.astype(token_dtype(self.tokenizer.vocab_size), copy=False)  # a group waits as stored
        return Document(*facts, tokens, lengths, len(data), hash64(data), mark, raw.confidence)

    @functools.cached_property
    def _spans(self) -> HeldOutSpans | None:
        if self.job.settings.test_texts is None:
            return None
        self.work.require("spans", [0])
        return HeldOutSpans.load(self.work.result("spans", 0) / SPANS)
