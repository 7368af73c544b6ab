"""`data-prep shard`: plans a run, or finds one that was stopped, or a finished set.

A unit of work is a list of pieces of input, whatever the number of workers, so the bytes depend on input and
settings alone. Unfinished work is in `.unfinished/`; a run that was killed resumes from there.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from data_prep.common.errors import UserError, counted, log
from data_prep.common.files import json_bytes, partial_name, write_atomically
from data_prep.corpus.finding import survey
from data_prep.corpus.inputs import Piece, plan_units, text_bytes, unit_size
from data_prep.corpus.limits import Limits
from data_prep.jobs.job import Job, ShardSettings
from data_prep.shards.changes import changed_input, describe_facts, describe_inputs
from data_prep.shards.layout import FORMAT_VERSION, MANIFEST, PLAN, UNFINISHED, fingerprint
from data_prep.shards.manifest import missing_units
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import Tokenizer

# The input of a set that exists is compared by content up to this size, beyond it by name and size alone.
COMPARED_BYTES = 2_000_000_000
NO_LIMITS = Limits()


def plan(
    inputs: list[str | Path],
    output: str | Path,
    tokenizer: Tokenizer,
    tokenizer_folder: str | Path,
    settings: ShardSettings,
    limits: Limits = NO_LIMITS,
) -> Job | None:
    """The work to do; None when it is done. Makes the work folder, or checks an existing one."""
    output = Path(output)
    for given in map(Path, inputs):
        if given.is_dir() and output.resolve() == given.resolve():
            raise UserError(f"output {output} is the input folder; choose another place")
    if tokenizer.strips:
        raise UserError(f"tokenizer {tokenizer.folder} would lose text: {tokenizer.advice}")
    found = survey(inputs, output)
    settings.sentences.segmenter_for()  # refuses unknown names before any work
    facts = {
        "format_version": FORMAT_VERSION,
        "settings": settings.to_dict(),
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
    }
    for line in found.lines():
        log(f"data-prep: {line}")
    planned = dict(enumerate(plan_units(found.files, settings.unit_bytes)))
    job = Job(output, settings, facts, found, planned, Path(tokenizer_folder), limits)
    limits.refuse_damage("input", next(iter(found.lost), None))
    for _ in range(3):
        try:
            return _check_finished(job) if (output / MANIFEST).is_file() else _start(job)
        except FileNotFoundError:  # another process finished the set in the meantime: check again
            if not (output / MANIFEST).is_file():
                raise
    raise UserError(f"{output}: other processes are finishing this set; run again")


def idle_workers(job: Job, workers: int) -> str | None:
    """A line where files that cannot be split leave workers without work, else None."""
    sizes = {unit: job.unit_bytes(unit) for unit in job.units}
    largest = max(sizes, key=lambda unit: sizes[unit], default=0)
    total, most = sum(sizes.values()), sizes.get(largest, 0)
    if workers * most <= total or len(job.units[largest]) > 1:
        return None
    file = job.units[largest][0].file
    if text_bytes(file) <= unit_size(job.files, job.settings.unit_bytes):
        return None
    return (
        f"{file.name} cannot be split and is {most / total:.0%} of the input: about {-(-total // most)} of "
        f"{counted(workers, 'worker is', 'workers are')} busy; more need smaller or unpacked files"
    )


def _start(job: Job) -> Job:
    """Make the work folder, or check that the existing one is of this job. Returns the job as started."""
    output, work = job.output, job.work
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file; --output must name a folder")
    content = {
        "facts": job.facts,
        "inputs": [[file.name, file.shown_path, file.size, file.stamp] for file in job.files],
    }
    if (started := _read_plan(job)) is not None:
        _require_same(job, started, json.loads(json_bytes(content)))
        only = started["only"]
        return replace(job, only=None if only is None else tuple(only))
    if job.only is None and output.is_dir() and any(path.name != UNFINISHED for path in output.iterdir()):
        raise UserError(f"output folder {output} is not empty and holds no shards; choose another one")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    # Of several processes that start together one writes the plan; the others compare theirs with it.
    partial = partial_name(work / PLAN)
    partial.write_bytes(json_bytes(content | {"only": job.only}))
    try:
        os.link(partial, work / PLAN)
    except FileExistsError:
        return _start(job)
    finally:
        partial.unlink(missing_ok=True)
    return job


def _require_same(job: Job, started: dict, wanted: dict) -> None:
    """Raises `UserError` unless a started run has these settings and this input. Of files that were only
    touched or moved, what finished units have read is compared."""
    sizes = ([(name, size) for name, _, size, _ in plan["inputs"]] for plan in (started, wanted))
    problem = describe_facts(started["facts"], wanted["facts"]) or describe_inputs(*sizes)
    if not problem and (started["only"] is None) != (job.only is None):
        problem = "another purpose: it repairs a set" if started["only"] else "another purpose"
    if not problem and started["inputs"] != wanted["inputs"]:
        pairs = zip(started["inputs"], wanted["inputs"], strict=True)
        touched = {new[0] for old, new in pairs if old != new}
        if changed := changed_input(job.work_folder(), job.units, touched):
            problem = f"other input: {changed} has changed"
        else:
            write_atomically(job.work / PLAN, json_bytes(wanted | {"only": started["only"]}))
    if problem:
        raise UserError(
            f"{job.output} holds an unfinished run with {problem}; "
            "finish that one, choose another --output, or delete the folder"
        )


def _read_plan(job: Job) -> dict | None:
    """The plan of a started run; None when there is none, or when a crash truncated it."""
    try:
        return json.loads((job.work / PLAN).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        shutil.rmtree(job.work, ignore_errors=True)
        return None


def _check_finished(job: Job) -> Job | None:
    """None when the finished set is what this command would make; a smaller job when shards are missing."""
    output = job.output
    manifest = ShardSet.open(output).manifest
    advice = "choose another --output or delete the folder"
    if manifest["settings_fingerprint"] != fingerprint(job.facts):
        raise UserError(f"{output} holds shards made with {describe_facts(manifest, job.facts)}; {advice}")
    sizes = [(entry["file"], entry["size"]) for entry in manifest["inputs"]]
    if problem := describe_inputs(sizes, [(file.name, file.size) for file in job.files]):
        raise UserError(f"{output} holds shards made from {problem}; {advice}")
    job.limits.refuse(manifest["damaged"], manifest["inputs"], manifest["rejected"])
    missing = missing_units(output, manifest)
    if not missing and sum(file.size for file in job.files) <= COMPARED_BYTES:
        for file, entry in zip(job.files, manifest["inputs"], strict=True):
            for piece in entry["pieces"]:
                if Piece(file, piece["start"], piece["end"]).sha256() != piece["sha256"]:
                    raise UserError(f"{output} holds shards made from another {file.name}; {advice}")
    started = _read_plan(job)
    if not missing or (started is not None and started["only"] is None):
        shutil.rmtree(job.work, ignore_errors=True)  # left by a process that was killed during removal
    # Rebuilt shards must match the manifest; `restore_shards` checks that.
    return _start(replace(job, only=tuple(sorted(missing)))) if missing else None
