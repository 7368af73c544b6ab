"""`data-prep shard`: input files → a folder of shards, with any number of worker processes.

In: WanJuan files, a tokenizer folder, `SentenceSettings`. Out: the shard set's manifest; on disk the shards,
their indexes, the quarantine and a copy of the tokenizer.

The unit of work is one input file, whatever the number of workers, so the bytes depend on input and settings
alone. A finished unit leaves a record in `.unfinished/`; a run that was killed starts again there. When all
units are done, their shards are renamed to consecutive numbers and the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

from data_prep.documents import DocumentReader, InputFile, RawDocument, Reject, find_inputs, find_unread
from data_prep.errors import UserError
from data_prep.segment import VERSION as SEGMENTER_VERSION
from data_prep.segment import get_segmenter
from data_prep.sentences import SentenceSettings, cut_document
from data_prep.shards import (
    COUNTS,
    FORMAT_VERSION,
    MANIFEST,
    QUARANTINE,
    TOKENIZER_FOLDER,
    Document,
    ShardSet,
    ShardWriter,
    file_sha256,
    hash64,
    json_bytes,
    token_dtype,
    write_atomically,
)
from data_prep.tokenizer import LossyTokenization, Tokenizer, load_tokenizer

UNFINISHED = ".unfinished"
TICK_DOCUMENTS = 32  # documents between two reports of progress


@dataclass(frozen=True)
class Job:
    """For every worker. `shard_bytes` counts the arrays of a shard; `shard_documents` 0 is no limit."""

    work: Path
    tokenizer_folder: Path
    settings: SentenceSettings
    shard_bytes: int
    shard_documents: int


def make_shards(
    inputs: list[str | Path],
    output: str | Path,
    tokenizer_folder: str | Path,
    settings: SentenceSettings,
    workers: int = 1,
    shard_bytes: int = 64_000_000,
    shard_documents: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> tuple[dict, bool]:
    """Make the shard set, or finish it, or find it done.

    `report(bytes read, bytes in all)` is called now and then.

    Returns (manifest, whether it was there already). Raises `UserError` on bad input, and when `output` holds
    something else.
    """
    output = Path(output)
    for given in map(Path, inputs):
        if given.is_dir() and output.resolve().is_relative_to(given.resolve()):
            raise UserError(f"output {output} lies inside the input folder {given}; choose another place")
    files = find_inputs(inputs)
    tokenizer = load_tokenizer(tokenizer_folder)
    get_segmenter(settings.segmenter, settings.language)  # refuses unknown names before any work
    facts = {
        "format_version": FORMAT_VERSION,
        "settings": settings.to_dict()
        | {
            "segmenter_version": SEGMENTER_VERSION,
            "shard_bytes": shard_bytes,
            "shard_documents": shard_documents,
            "compression": "none",
        },
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
    }
    if (output / MANIFEST).is_file():
        return _same_or_refuse(output, facts, files), True
    work = output / UNFINISHED
    _begin(output, work, facts, files)
    job = Job(work, Path(tokenizer_folder).resolve(), settings, shard_bytes, shard_documents)
    records = _run_units(job, files, tokenizer, workers, report or (lambda done, total: None))
    if not sum(record["input"]["documents"] for record in records):
        shutil.rmtree(work)
        if not any(output.iterdir()):
            output.rmdir()
        reasons = _sum_counts(record["rejected"] for record in records)
        said = ", ".join(f"{n} × {reason}" for reason, n in reasons.items()) or "the files are empty"
        raise UserError(f"no usable document in {', '.join(map(str, inputs))}: {said}")
    return _merge(output, work, facts, records, find_unread(inputs), tokenizer), False


def _fingerprint(*values: object) -> str:
    return hashlib.sha256(json_bytes(values)).hexdigest()


def _same_or_refuse(output: Path, facts: dict, files: list[InputFile]) -> dict:
    """The manifest of a finished set, if this very command would make it again."""
    manifest = ShardSet.open(output).manifest
    advice = "choose another --output or delete the folder"
    if manifest["settings_fingerprint"] != _fingerprint(facts):
        raise UserError(f"{output} holds shards made with other settings or another tokenizer; {advice}")
    inputs = [(file.name, file_sha256(file.path)) for file in files]
    if inputs != [(entry["file"], entry["sha256"]) for entry in manifest["inputs"]]:
        raise UserError(f"{output} holds shards made from other input; {advice}")
    for entry in manifest["shards"]:
        for name in (entry["file"], entry["index"]):
            if not (output / name).is_file():
                raise UserError(f"{output / name} is missing; delete the folder and run again")
    return manifest


def _begin(output: Path, work: Path, facts: dict, files: list[InputFile]) -> None:
    """Make the work folder, or check that the one found belongs to this very job."""
    plan = json_bytes({"facts": facts, "inputs": [[file.name, str(file.path)] for file in files]})
    if (work / "plan.json").is_file():
        if (work / "plan.json").read_bytes() != plan:
            raise UserError(
                f"{output} holds an unfinished run with other settings or input; "
                "finish that one, choose another --output, or delete the folder"
            )
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file; --output must name a folder")
    if output.is_dir() and any(path.name != UNFINISHED for path in output.iterdir()):
        raise UserError(f"output folder {output} is not empty and holds no shards; choose another one")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    write_atomically(work / "plan.json", plan)


# One unit ----------------------------------------------------------------------------------------------


def _unit_folder(job: Job, unit: int) -> Path:
    return job.work / f"unit-{unit:06d}"


def run_unit(job: Job, unit: int, file: InputFile, tokenizer: Tokenizer, tick: Callable[[int], None]) -> dict:
    """Read one input file and write its shards as `part-NNN.tar`.

    Returns the unit's record, which is also left on disk.

    `tick(n)`: n more bytes of the file have been read.
    """
    folder = _unit_folder(job, unit)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader = DocumentReader(file, job.settings.language)
    # Every document by the rules of its own language, as evaluation does it.
    segmenters = {language: get_segmenter(job.settings.segmenter, language) for language in ("en", "zh")}
    rejected: Counter[str] = Counter()
    repaired: Counter[str] = Counter()
    languages: dict[str, Counter[str]] = {}
    parts: list[dict] = []
    writer: ShardWriter | None = None
    told = 0
    with open(folder / QUARANTINE, "w", encoding="ascii") as quarantine:
        for count, item in enumerate(reader):
            if count % TICK_DOCUMENTS == 0:
                tick(reader.bytes_read - told)
                told = reader.bytes_read
            if isinstance(item, RawDocument):
                try:
                    tokens, lengths = cut_document(
                        item.content, tokenizer, segmenters[item.language], job.settings.max_tokens
                    )
                except LossyTokenization:
                    item = Reject(item.line, "tokenizer loses text")
            if isinstance(item, Reject):
                rejected[item.reason] += 1
                entry = {"file": file.name, "line": item.line, "reason": item.reason}
                quarantine.write(json.dumps(entry) + "\n")
                continue
            if writer is None:
                names = [folder / f"part-{len(parts):03d}{ending}" for ending in (".tar", ".index.npy")]
                writer = ShardWriter(*names, token_dtype(tokenizer.vocab_size))
            data = item.content.encode("utf-8")
            size = len(data)
            writer.add(Document(item.id, item.language, item.source, tokens, lengths, size, hash64(data)))
            repaired.update(["missing id"] if item.id_repaired else [])
            totals = languages.setdefault(item.language, Counter())
            totals.update(documents=1, sentences=lengths.size, tokens=tokens.size, bytes=size)
            if writer.payload >= job.shard_bytes or writer.documents == job.shard_documents:
                parts.append(writer.close())
                writer = None
    if writer is not None:
        parts.append(writer.close())
    tick(reader.bytes_read - told)
    record = {
        "input": {
            "file": file.name,
            "sha256": reader.sha256,
            "documents": sum(part["documents"] for part in parts),
            "rejected": sum(rejected.values()),
            "damage": reader.damage,
        },
        "rejected": rejected,
        "repaired": repaired,
        "languages": languages,
        "parts": parts,
    }
    write_atomically(folder / "record.json", json_bytes(record))
    return record


# All units ---------------------------------------------------------------------------------------------


def _run_units(
    job: Job,
    files: list[InputFile],
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[int, int], None],
) -> list[dict]:
    """Records of all units, in order; those already done are not run again."""
    records: dict[int, dict] = dict(_finished_units(job, files))
    sizes = [file.path.stat().st_size for file in files]
    total, done = sum(sizes), sum(sizes[unit] for unit in records)
    # The largest first, so that no worker is left alone with a long one at the end.
    todo = sorted((unit for unit in range(len(files)) if unit not in records), key=lambda unit: -sizes[unit])
    report(done, total)
    if min(workers, len(todo)) <= 1:

        def tick(n: int) -> None:
            nonlocal done
            done += n
            report(done, total)

        for unit in todo:
            records[unit] = run_unit(job, unit, files[unit], tokenizer, tick)
    elif todo:
        records |= _run_in_processes(job, files, todo, workers, lambda n: report(done + n, total))
    return [records[unit] for unit in range(len(files))]


def _run_in_processes(
    job: Job, files: list[InputFile], todo: list[int], workers: int, report: Callable[[int], None]
) -> dict[int, dict]:
    context = get_context("spawn")  # a fork would copy the threads of the tokenizer library
    counter = context.Value("q", 0)
    executor = ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=context, initializer=_start_worker, initargs=(job, counter)
    )
    try:
        futures = {executor.submit(_worker_unit, unit, files[unit]): unit for unit in todo}
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5)
            for future in finished:
                future.result()
            report(counter.value)
        return {unit: future.result() for future, unit in futures.items()}
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?); "
            "run the same command again to go on, perhaps with fewer --workers"
        ) from None
    finally:
        # Work is still under way only after an error or Ctrl-C; the next run goes on from the records.
        for child in active_children() if waiting else []:
            child.terminate()
        executor.shutdown(cancel_futures=True)


_worker: tuple[Job, Tokenizer, object] | None = None  # this worker process's own state


def _start_worker(job: Job, counter: object) -> None:
    global _worker
    # Ctrl-C reaches the whole process group; the parent alone speaks. When it is gone, nobody waits for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = job, load_tokenizer(job.tokenizer_folder), counter


def _worker_unit(unit: int, file: InputFile) -> dict:
    job, tokenizer, counter = _worker

    def tick(n: int) -> None:
        with counter.get_lock():
            counter.value += n

    return run_unit(job, unit, file, tokenizer, tick)


def _finished_units(job: Job, files: list[InputFile]) -> Iterator[tuple[int, dict]]:
    """Units whose record, input and shards agree. An interrupted merge may have moved the shards already."""
    records: dict[int, dict] = {}
    for unit in range(len(files)):
        path = _unit_folder(job, unit) / "record.json"
        if path.is_file():
            records[unit] = json.loads(path.read_bytes())
    names = _shard_names([records[unit] for unit in sorted(records)]) if len(records) == len(files) else {}
    for position, unit in enumerate(sorted(records)):
        places = []
        for number in range(len(records[unit]["parts"])):
            here = _unit_folder(job, unit) / f"part-{number:03d}"
            moved = job.work.parent / names[position, number] if names else here
            places.append((here, moved))
        if records[unit]["input"]["sha256"] != file_sha256(files[unit].path):
            continue
        if all(_complete(part, *both) for part, both in zip(records[unit]["parts"], places, strict=True)):
            yield unit, records[unit]


def _complete(part: dict, here: Path, moved: Path) -> bool:
    for ending, sha256 in ((".tar", part["sha256"]), (".index.npy", part["index_sha256"])):
        files = [path for stem in (here, moved) if (path := Path(f"{stem}{ending}")).is_file()]
        if not files or file_sha256(files[0]) != sha256:
            return False
    return True


def _shard_names(records: list[dict]) -> dict[tuple[int, int], str]:
    """(unit, part) → final name without its ending, consecutive in unit order."""
    pairs = [(unit, part) for unit, record in enumerate(records) for part in range(len(record["parts"]))]
    return {pair: f"shard-{number:06d}" for number, pair in enumerate(pairs)}


# The end -----------------------------------------------------------------------------------------------


def _merge(
    output: Path, work: Path, facts: dict, records: list[dict], not_read: list[str], tokenizer: Tokenizer
) -> dict:
    """Move the shards to their final names and write quarantine, tokenizer and, last, the manifest."""
    shards = []
    for (unit, part), name in _shard_names(records).items():
        for ending in (".tar", ".index.npy"):
            here = work / f"unit-{unit:06d}" / f"part-{part:03d}{ending}"
            if here.exists():  # else an interrupted merge has moved it
                os.replace(here, output / f"{name}{ending}")
        shards.append({"file": f"{name}.tar", "index": f"{name}.index.npy"} | records[unit]["parts"][part])
    quarantine = b"".join(
        (work / f"unit-{unit:06d}" / QUARANTINE).read_bytes() for unit in range(len(records))
    )
    write_atomically(output / QUARANTINE, quarantine)
    tokenizer.save(output / TOKENIZER_FOLDER)
    tokenizer_files = {p.name: file_sha256(p) for p in sorted((output / TOKENIZER_FOLDER).iterdir())}
    languages: dict[str, dict[str, int]] = {}
    for record in records:
        for language, counts in record["languages"].items():
            languages[language] = _sum_counts([languages.get(language, {}), counts])
    inputs = [record["input"] for record in records]
    manifest = facts | {
        "fingerprint": _fingerprint(facts, [[entry["file"], entry["sha256"]] for entry in inputs]),
        "settings_fingerprint": _fingerprint(facts),
        "tokenizer": facts["tokenizer"] | {"files": tokenizer_files},
        "shards": shards,
        "totals": {name: sum(shard[name] for shard in shards) for name in COUNTS},
        "languages": languages,
        "rejected": _sum_counts(record["rejected"] for record in records),
        "repaired": _sum_counts(record["repaired"] for record in records),
        "damaged": [{"file": e["file"], "damage": e["damage"]} for e in inputs if e["damage"]],
        "quarantine_sha256": hashlib.sha256(quarantine).hexdigest(),
        "inputs": inputs,
        "not_read": not_read,
    }
    write_atomically(output / MANIFEST, json_bytes(manifest))
    shutil.rmtree(work)
    return json.loads(json_bytes(manifest))


def _sum_counts(counts: Iterator[dict[str, int]] | list[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


class Progress:
    """`report` for `make_shards`: a bar on a terminal, else a plain line every ten seconds."""

    def __init__(self, stream: object, label: str = "data-prep shard"):
        self._stream, self._label = stream, label
        self._bar = None
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._stream.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=self._label, file=self._stream)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            line = f"{self._label}: {done / 1e6:.1f} of {total / 1e6:.1f} MB read"
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
