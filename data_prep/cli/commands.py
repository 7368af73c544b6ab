"""The `data-prep` command: one typed function per subcommand, which calls its module and prints the result.

Results go to stdout (`--json` for machines), progress and warnings to stderr. Bad input ends in one line and
status 2. Heavy imports happen inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, validators

import data_prep
from data_prep.common.command_line import Many, Natural, Positive, make_app, run_app
from data_prep.common.errors import (
    NO_PATH,
    REQUEUE,
    UserError,
    counted,
    describe,
    log,
    print_result,
)
from data_prep.common.remote import is_url
from data_prep.corpus.filters import Filters

# Set before numpy is imported: nothing here multiplies matrices, and a process with one thread can be forked.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

LEAST_UNIT_MB = 0.001  # a plan of units of a few bytes is larger than the input
STANDARD_INPUT = "/dev/stdin"
# JSON leaves these as they are, but programs that read line by line may take them for line ends.
LINE_SEPARATORS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}

Megabytes = Annotated[float, Parameter(validator=validators.Number(gt=0, lt=1e9))]
Inputs = Annotated[
    Sequence[str],
    Parameter(
        consume_multiple=1,
        help="files, folders, 'patterns' or URLs of JSON lines, csv, text (packed too), tar, parquet, arrow; "
        "-: standard input; hf:NAME: a dataset",
    ),
]
Folder = Annotated[str, Parameter(help="a shard folder")]
Language = Annotated[
    str,
    Parameter(
        help="code or name (docs/segmentation.md lists those with rules of their own); auto: by the record, "
        "else a folder EN, CN or lang=CODE, else the script"
    ),
]
Cut = Annotated[
    Literal["clause", "sentence"],
    Parameter(help="clause cuts at commas too, sentence at sentence ends only"),
]
Rules = Annotated[Filters, Parameter(name="*", group=Group("Hygiene (all off by default)"))]
Json = Annotated[bool, Parameter(help="print one JSON object")]
NO_RULES = Filters()
COMPARED = Parameter(group=Group("Comparisons (all off by default)"))
DAMAGE = Parameter(group=Group("Damaged input"))
DAMAGED = 3  # exit status: a set was made, but input was damaged or lost
SHOWN = 20  # damaged parts that are printed
WORK = Parameter(group=Group("Shards and work"))

app = make_app(
    "data-prep",
    data_prep.__version__,
    "Turn a WanJuan corpus into sentence shards.",
    "data-prep shard --input corpus/EN --output shards --tokenizer opt --workers 8",
)


def run(argv: Sequence[str] | None) -> int:
    """Run the command that `argv` (default: the process's arguments) asks for; returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    return run_app(app, [STANDARD_INPUT if word == "-" else word for word in words])


@app.command(group="Corpus")
def segment(file: str = STANDARD_INPUT, /, *, lang: Language = "auto", segmenter: Cut = "clause") -> None:
    """Cut a text into sentences: one JSON string per line, which joined give the text back.

    example: data-prep segment book.txt --lang en --segmenter clause

    Args:
        file: UTF-8 text, - for standard input
    """
    from data_prep.text.sentences import SentenceSettings

    name = "standard input" if file == STANDARD_INPUT else file
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}); convert it first") from error
    out = sys.stdout.buffer
    settings = SentenceSettings(segmenter, _language(lang), max_tokens=64)
    for sentence in settings.segmenter_for()(text):
        line = jsonlib.dumps(sentence, ensure_ascii=False).translate(LINE_SEPARATORS)
        out.write(line.encode("utf-8") + b"\n")
    out.flush()


@app.command(group="Shards")
def shard(
    *,
    input: Inputs,
    output: str,
    tokenizer: str,
    lang: Language = "auto",
    segmenter: Cut = "clause",
    max_tokens: Positive = 64,
    min_tokens: Positive = 1,
    rules: Rules = NO_RULES,
    deduplicate: Annotated[bool, COMPARED] = False,
    near_duplicates: Annotated[float | None, COMPARED] = None,
    seen: Annotated[Many, COMPARED] = (),
    decontaminate: Annotated[Many, COMPARED] = (),
    mark_contaminated: Annotated[bool, COMPARED] = False,
    shard_mb: Annotated[Megabytes, WORK] = 64.0,
    shard_documents: Annotated[Positive | None, WORK] = None,
    compression: Annotated[Literal["none", "zstd"], WORK] = "none",
    unit_mb: Annotated[Megabytes | None, WORK] = None,
    workers: Annotated[Positive | None, WORK] = None,
    backend: Annotated[Literal["auto", "local", "mpi", "slurm", "dask"], WORK] = "auto",
    scheduler: Annotated[str, WORK] = "",
    salvage: Annotated[bool, DAMAGE] = False,
    strict: Annotated[bool, DAMAGE] = False,
    max_rejected: Annotated[float, DAMAGE, Parameter(validator=validators.Number(gte=0, lte=1))] = 1.0,
    json: Json = False,
) -> int:
    """Tokenize and cut documents and write them as sentence shards. Run again after a stop, it resumes.

    example: data-prep shard --input corpus/EN corpus/CN --output shards --tokenizer opt-tokenizer --workers 8

    Args:
        output: folder for the shards: new or unfinished
        tokenizer: folder of a tokenizer that loses no text
        max_tokens: longest sentence
        min_tokens: join shorter sentences to a neighbour (1: off)
        deduplicate: keep one of documents with the same text
        near_duplicates: keep one of documents of which this share of the words is the same, such as 0.8
        seen: with --near-duplicates: folders of shard sets whose documents count as earlier ones
        decontaminate: drop documents that share 13 words in a row with a text of these files
        mark_contaminated: with --decontaminate: mark such documents in the index, and keep them
        shard_mb: size of a shard
        shard_documents: at most this many in a shard
        compression: of each member of a shard
        unit_mb: text per unit of work (default: 8 to 256, by the size of the input)
        workers: processes on this machine (default 1; for the slurm backend $SLURM_CPUS_PER_TASK)
        backend: local processes, MPI ranks, tasks of a Slurm array, a Dask cluster; auto: by the environment
        scheduler: address of the Dask cluster's scheduler, such as tcp://node1:8786
        salvage: take what parses of members whose checksum fails, and mark these documents in the index
        strict: stop at damaged input, and at packed text without a checksum
        max_rejected: stop when a larger share of the records cannot be used
    """
    from data_prep.common.progress_line import ProgressLine
    from data_prep.corpus.decontamination import HeldOutTexts
    from data_prep.corpus.limits import Limits
    from data_prep.jobs.job import ShardSettings
    from data_prep.jobs.run import Unfinished, choose_backend, make_shards
    from data_prep.text.sentences import SentenceSettings

    if unit_mb is not None and unit_mb < LEAST_UNIT_MB:
        raise UserError(f"--unit-mb must be at least {LEAST_UNIT_MB}, not {unit_mb:g}")
    if salvage and strict:
        raise UserError("--strict stops at damaged input, which --salvage reads: give one of them")
    if rules.identify_language and lang != "auto":
        raise UserError(f"--identify-lang has nothing to do with --lang {lang}; leave one out")
    if lang == "auto":
        _say_how_languages_are_told(rules)
    chosen = choose_backend(backend, scheduler)
    settings = ShardSettings(
        sentences=SentenceSettings(segmenter, _language(lang), max_tokens, min_tokens),
        hygiene=rules,
        deduplicate=deduplicate,
        near_duplicates=near_duplicates,
        seen=tuple(folder if is_url(folder) else os.path.abspath(folder) for folder in seen),
        test_texts=HeldOutTexts.read(decontaminate)[0] if decontaminate else None,
        mark_contaminated=mark_contaminated,
        shard_bytes=int(shard_mb * 1e6),
        shard_documents=shard_documents or 0,
        compression=compression,
        unit_bytes=int(unit_mb * 1e6) if unit_mb else None,
        salvage=salvage,
    )
    cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", 1)) if chosen == "slurm" else 1
    progress = ProgressLine(sys.stderr)
    started = time.monotonic()
    try:
        with _writing(output):
            manifest, found = make_shards(
                list(input),
                output,
                tokenizer,
                settings,
                workers=workers or cpus,
                backend=chosen,
                scheduler=scheduler,
                report=progress,
                limits=Limits(strict, max_rejected),
            )
    except Unfinished as unfinished:
        log(f"data-prep: this task's share is done; {unfinished}: run the array again")
        sys.exit(REQUEUE)
    finally:
        progress.close()
    for line in _damage_lines(manifest):
        log(f"data-prep: warning: {line}")
    summary = _shard_summary(output, manifest, found, time.monotonic() - started)
    print_result(jsonlib.dumps(summary) if json else _shard_text(summary))
    return DAMAGED if manifest["damaged"] or manifest.get("lost") else 0


def _damage_lines(manifest: dict[str, Any]) -> Iterator[str]:
    """What was left out of the input, or is not sure."""
    damaged, marked = manifest["damaged"], manifest.get("marked", {})
    salvage = manifest["settings"].get("salvage", False)
    for one in damaged[:SHOWN]:
        place = f" (from byte {one['offset']:,})" if one.get("offset") else ""
        yield f"{one['file']}: {one['damage']}{place}"
    if len(damaged) > SHOWN:
        yield f"{counted(len(damaged) - SHOWN, 'more damaged part')}, see `damaged` in the manifest"
    if damaged:
        left_out = "damaged parts were left out (--salvage takes what parses)"
        salvaged = counted(marked.get("salvaged", 0), "document was", "documents were")
        salvaged += " salvaged from damaged parts"
        yield f"{salvaged if salvage else left_out}; exit status {DAMAGED}"
    if "unverified" in marked:
        files = sum("unverified" in entry for entry in manifest["inputs"])
        count = f"{counted(marked['unverified'], 'document')} from {counted(files, 'file')}"
        yield f"{count} cannot be verified: packed without a checksum (`zstd --check` and `xz` write one)"


def _say_how_languages_are_told(rules: Filters) -> None:
    if rules.keep_languages and not rules.identify_language:
        log(
            "data-prep: --keep-lang tells documents without a label by folder and script only: German is en; "
            "add --identify-lang to go by their letters (pip install 'sentence-llm[lang]')"
        )


def _shard_summary(output: str, manifest: dict[str, Any], found: bool, seconds: float) -> dict[str, Any]:
    totals = manifest["totals"]
    return {
        "output": output,
        "fingerprint": manifest["fingerprint"],
        "shards": len(manifest["shards"]),
        **totals,
        **{key: manifest[key] for key in ("languages", "rejected", "repaired", "damaged")},
        "marked": manifest.get("marked", {}),
        "already_there": found,
        "seconds": round(seconds, 2),
        "mb_per_second": None if found else round(totals["bytes"] / 1e6 / seconds, 3),
    }


def _shard_text(summary: dict[str, Any]) -> str:
    found, rejected = summary["already_there"], sum(summary["rejected"].values())
    return (
        f"{summary['output']}: {'already there: ' if found else ''}{counted(summary['shards'], 'shard')}, "
        + ", ".join(counted(summary[f"{one}s"], one) for one in ("document", "sentence", "token"))
        + f", {summary['bytes'] / 1e6:.1f} MB of text"
        + ("" if found else f" in {summary['seconds']:.1f} s ({summary['mb_per_second']:.2f} MB/s)")
        + (f"; {counted(rejected, 'record')} rejected, see quarantine.jsonl" if rejected else "")
    )


def _language(lang: str) -> str:
    from data_prep.common.language_codes import require_language

    return lang if lang in ("auto", "other") else require_language(lang, "--lang")


@contextmanager
def _writing(output: str) -> Iterator[None]:
    """Errors without a path (a full disk, met by a file that is open already) name the output folder."""
    try:
        yield
    except BrokenPipeError:  # of a stream, not of the output
        raise
    except (UserError, OSError) as error:
        # A worker's error comes as the `UserError` that `describe` made of it.
        path, _, reason = describe(error).partition(": ")
        if path != NO_PATH:
            raise
        raise UserError(f"cannot write to {output}: {reason}") from error


@app.command(group="Shards")
def verify(folder: Folder, /, *, deep: bool = False, input: Inputs = (), json: Json = False) -> None:
    """Check every file of a shard folder.

    example: data-prep verify shards --deep

    Args:
        deep: also decode every document, compare its text's hash, and check that its sentences join to it
        input: with --deep: compare with the text of these files, too
    """
    from data_prep.shards import verify as verification

    if input and not deep:
        raise UserError("--input is for --deep: give both")
    result = verification.verify(folder)
    whole = "is whole" if result["shards"] == 1 else "are whole"
    counts = f"{counted(result['shards'], 'shard')} with {counted(result['documents'], 'document')}"
    text = f"{folder}: {counts} {whole}"
    if deep:
        result |= verification.verify_deep(folder, list(input) or None)
        text += "; every text comes back from its tokens, and from its sentences"
        if input:
            same = counted(result["compared"], "document is", "documents are")
            text += f"; {same} the input's, byte for byte"
    print_result(jsonlib.dumps(result) if json else text)


@app.command(group="Shards")
def stage(folders: Sequence[str], /, *, to: str) -> None:
    """Copy shard folders to a disk of this machine, compare every sha256, print the copies' folders.

    example: data-prep stage shards/train --to /tmp/shards

    Args:
        folders: shard folders
        to: local folder; a whole copy there is used
    """
    import signal

    from data_prep.shards import stage as staging

    def leave(number: int, _frame: object) -> None:
        # The unfinished copy is removed. Under srun the first task to end gets the others terminated, and the
        # highest status counts: it must be REQUEUE.
        for one in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        sys.exit(REQUEUE if number == signal.SIGUSR1 else 2)

    for one in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(one, leave)
    copies = [staging.stage(folder, to) for folder in folders]
    if os.environ.get("SLURM_PROCID", "0") == "0":  # under srun one task a node: one task prints for all
        print("\n".join(map(str, copies)))


@app.command(group="Shards")
def split(
    folder: Folder,
    /,
    *,
    output: str,
    parts: Many,
    by: Literal["text", "id"] = "text",
    seed: Natural = 0,
    json: Json = False,
) -> None:
    """Split a shard set by document hash into parts, such as train, valid and test.

    example: data-prep split shards --output parts --parts train=0.98 valid=0.01 test=0.01

    Args:
        output: folder for one shard set per part
        parts: names and shares as NAME=SHARE, which add up to 1
        by: what is hashed
        seed: another seed gives another split
    """
    from data_prep.shards import split as splitting

    shares = splitting.parse_parts(list(parts))
    with _writing(output):
        result = splitting.split(folder, output, shares, by=by, seed=seed)
    if json:
        print(jsonlib.dumps(result))
        return
    for name, totals in result.items():
        print(
            f"{Path(output) / name}: "
            + ", ".join(counted(totals[f"{one}s"], one) for one in ("shard", "document", "token"))
        )


@app.command(group="Shards")
def stats(folder: Folder, /, *, html: str | None = None, json: Json = False) -> None:
    """Count documents, sentences and tokens, as text or as a page.

    example: data-prep stats shards --html stats.html

    Args:
        html: write a page with pictures to this file
    """
    from data_prep.common import charts
    from data_prep.shards import stats as statistics

    if html:
        charts.require()
    result = statistics.stats(folder)
    if html:
        from data_prep.common.files import write_atomically
        from data_prep.shards.stats_page import stats_page

        write_atomically(Path(html), stats_page(result).encode("utf-8"))
    print_result(jsonlib.dumps(result) if json else statistics.stats_text(result))


@app.command(group="Shards")
def show(
    folder: Folder, /, *, count: Positive = 1, number: int = 0, id: str | None = None, json: Json = False
) -> None:
    """Print documents sentence by sentence.

    example: data-prep show shards --count 3

    Args:
        count: documents to print
        number: the first one to print, from 0
        id: print the documents with this id
        json: print a JSON object per document
    """
    from data_prep.shards import show as showing

    for line in showing.show(folder, count, number, id, json):
        print(line)


@app.command(group="Corpus")
def tokenizer(
    *,
    input: Inputs,
    output: str,
    vocab_size: Positive,
    sample_mb: Megabytes = 20.0,
    rules: Rules = NO_RULES,
    json: Json = False,
) -> None:
    """Train a SentencePiece tokenizer that loses no text.

    example: data-prep tokenizer --input corpus/EN --output tokenizer --vocab-size 8000

    Args:
        output: folder for the tokenizer
        vocab_size: entries in all
        sample_mb: text to learn from, in memory
    """
    from data_prep.corpus.documents import sample_lines
    from data_prep.corpus.finding import survey
    from data_prep.text.tokenizer import train_sentencepiece

    _say_how_languages_are_told(rules)
    found = survey(list(input), output)
    for line in found.lines():
        log(f"data-prep: {line}")
    sample = sample_lines(found.files, int(sample_mb * 1e6), rules)
    made = train_sentencepiece(sample, output, vocab_size)
    facts = {"output": output, "entries": made.vocab_size, "fingerprint": made.fingerprint}
    text = f"{output}: {counted(made.vocab_size, 'entry', 'entries')}, fingerprint {made.fingerprint[:16]}"
    print_result(jsonlib.dumps(facts) if json else text)


@app.command(group="Corpus")
def demo_corpus(*, output: str, json: Json = False) -> None:
    """Write a small English corpus in WanJuan format from Python's own documentation. Needs no download.

    example: data-prep demo-corpus --output demo/corpus

    Args:
        output: folder for EN/ (training) and valid/
    """
    from data_prep.corpus.demo_corpus import write_demo_corpus

    written = write_demo_corpus(output)
    lines = (
        f"{part}: {counted(counts['documents'], 'document')}, {counted(counts['bytes'], 'byte')} of text"
        for part, counts in written.items()
    )
    print_result(jsonlib.dumps(written) if json else "\n".join(lines))
