"""The `data-prep` command: reads arguments, calls one module per subcommand, prints the result.

Results go to stdout (`--json` for machines), progress and warnings to stderr. Bad input ends in one line and
status 2. Heavy imports happen inside the subcommands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import data_prep
from data_prep.common.errors import NO_PATH, REQUEUE, UserError, describe, run_main
from data_prep.corpus import filters

# Set before numpy is imported: nothing here multiplies matrices, and a process with one thread can be forked.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

LEAST_UNIT_MB = 0.001  # a plan of units of a few bytes is larger than the input
# JSON leaves these as they are, but programs that read line by line may take them for line ends.
LINE_SEPARATORS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments) or 0


def console() -> int:
    """Entry point of the installed command; returns the exit status."""
    return run_main("data-prep", main)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data-prep",
        description="Turn a WanJuan corpus into sentence shards.",
        epilog="example: data-prep shard --input corpus/EN --output shards --tokenizer opt --workers 8",
    )
    parser.add_argument("--version", action="version", version=f"data-prep {data_prep.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example: data-prep {name} {example}"
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "segment",
        _segment,
        "Cut a text into sentences: one JSON string per line, which joined give the text back.",
        "book.txt --lang en --segmenter clause",
    )
    sub.add_argument("file", nargs="?", default="-", metavar="FILE", help="UTF-8 text, - for standard input")
    _add_segmenter(sub)

    sub = command(
        "shard",
        _shard,
        "Tokenize and cut documents and write them as sentence shards. Run again after a stop, it goes on.",
        "--input corpus/EN corpus/CN --output shards --tokenizer opt-tokenizer --workers 8",
    )
    _add_input(sub)
    sub.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the shards: new or unfinished"
    )
    sub.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="folder of a tokenizer that loses no text"
    )
    _add_segmenter(sub)
    sub.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest sentence (default 64)")
    sub.add_argument(
        "--min-tokens",
        type=int,
        default=1,
        metavar="N",
        help="join shorter sentences to a neighbour (default 1: off)",
    )
    filters.add_arguments(sub)
    sub.add_argument("--deduplicate", action="store_true", help="keep one of documents with the same text")
    group = sub.add_argument_group("shards and work")
    group.add_argument(
        "--shard-mb", type=_positive_float, default=64.0, metavar="MB", help="size of a shard (default 64)"
    )
    group.add_argument(
        "--shard-documents", type=_positive, default=0, metavar="N", help="at most N in a shard"
    )
    group.add_argument(
        "--compression",
        choices=("none", "zstd"),
        default="none",
        help="of each member of a shard (default none)",
    )
    group.add_argument(
        "--unit-mb",
        type=_positive_float,
        metavar="MB",
        help="text per unit of work (default: 8 to 256, by the size of the input)",
    )
    group.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="processes on this machine (default 1; for the slurm backend $SLURM_CPUS_PER_TASK)",
    )
    group.add_argument(
        "--backend",
        choices=("auto", "local", "mpi", "slurm"),
        default="auto",
        help="local processes, MPI ranks, or tasks of a Slurm array; auto (default): by the environment",
    )
    sub.add_argument("--json", action="store_true", help="print the summary as JSON")

    sub = command("verify", _verify, "Check every file of a shard folder.", "shards --deep")
    _add_folder(sub)
    sub.add_argument(
        "--deep",
        action="store_true",
        help="also decode every document, compare its text's hash, and check that its sentences join to it",
    )
    sub.add_argument(
        "--input", nargs="+", metavar="PATH", help="with --deep: compare with the text of these files, too"
    )
    sub.add_argument("--json", action="store_true", help="print the result as JSON")

    sub = command(
        "stage",
        _stage,
        "Copy shard folders to a disk of this machine, compare every sha256, print the copies' folders.",
        "shards/train --to /tmp/shards",
    )
    sub.add_argument("folders", nargs="+", metavar="DIR", help="shard folder")
    sub.add_argument("--to", required=True, metavar="DIR", help="local folder; a whole copy there is used")

    sub = command(
        "split",
        _split,
        "Split a shard set by document hash into parts, such as train, valid and test.",
        "shards --output parts --parts train=0.98 valid=0.01 test=0.01",
    )
    _add_folder(sub)
    sub.add_argument("--output", required=True, metavar="DIR", help="folder for one shard set per part")
    sub.add_argument(
        "--parts", required=True, nargs="+", metavar="NAME=SHARE", help="names and shares, which add up to 1"
    )
    sub.add_argument("--by", choices=("text", "id"), default="text", help="what is hashed (default text)")
    sub.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another seed, another split (default 0)"
    )
    sub.add_argument("--json", action="store_true", help="print the result as JSON")

    sub = command(
        "stats",
        _stats,
        "Count documents, sentences and tokens, as text or as a page.",
        "shards --html stats.html",
    )
    _add_folder(sub)
    sub.add_argument("--html", metavar="FILE", help="write a page with pictures")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")

    sub = command("show", _show, "Print documents sentence by sentence.", "shards --count 3")
    _add_folder(sub)
    sub.add_argument("--count", type=_positive, default=1, metavar="N", help="documents to print (default 1)")
    sub.add_argument("--number", type=int, default=0, metavar="N", help="the first one to print, from 0")
    sub.add_argument("--id", metavar="ID", help="print the document with this id")

    sub = command(
        "tokenizer",
        _tokenizer,
        "Train a SentencePiece tokenizer that loses no text.",
        "--input corpus/EN --output tokenizer --vocab-size 8000",
    )
    _add_input(sub)
    sub.add_argument("--output", required=True, metavar="DIR", help="folder for the tokenizer")
    sub.add_argument("--vocab-size", type=_positive, required=True, metavar="N", help="entries in all")
    sub.add_argument(
        "--sample-mb",
        type=_positive_float,
        default=20.0,
        metavar="MB",
        help="text to learn from, in memory (default 20)",
    )
    filters.add_arguments(sub)

    sub = command(
        "demo-corpus",
        _demo_corpus,
        "Write a small English corpus in WanJuan format from Python's own documentation. Needs no download.",
        "--output demo/corpus",
    )
    sub.add_argument("--output", required=True, metavar="DIR", help="folder for EN/ (training) and valid/")
    return parser


def _add_input(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="files, folders or URLs of jsonl (.gz, .zst, .tar.gz), text, parquet; hf:NAME: a dataset",
    )


def _add_folder(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", metavar="DIR", help="a shard folder")


def _add_segmenter(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--lang",
        choices=("en", "zh", "other", "auto"),
        default="auto",
        help="language; auto (default): by a folder named EN or CN (the input or below it), else by script",
    )
    sub.add_argument(
        "--segmenter",
        choices=("clause", "sentence"),
        default="clause",
        help="clause (default) cuts at commas too, sentence at sentence ends only",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _segment(arguments: argparse.Namespace) -> None:
    from data_prep.text.segmenter import get_segmenter

    name = "standard input" if arguments.file == "-" else arguments.file
    try:
        data = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}); convert it first") from error
    out = sys.stdout.buffer
    for sentence in get_segmenter(arguments.segmenter, arguments.lang)(text):
        line = json.dumps(sentence, ensure_ascii=False).translate(LINE_SEPARATORS)
        out.write(line.encode("utf-8") + b"\n")
    out.flush()


def _shard(arguments: argparse.Namespace) -> None:
    from data_prep.jobs.job import ShardSettings
    from data_prep.jobs.plan import choose_backend, make_shards, mpi_number
    from data_prep.jobs.progress import ProgressLine
    from data_prep.text.sentences import SentenceSettings

    _check_output(arguments.output)
    if arguments.unit_mb is not None and arguments.unit_mb < LEAST_UNIT_MB:
        raise UserError(f"--unit-mb must be at least {LEAST_UNIT_MB}, not {arguments.unit_mb:g}")
    backend = choose_backend(arguments.backend)
    settings = ShardSettings(
        sentences=SentenceSettings(
            arguments.segmenter, arguments.lang, arguments.max_tokens, arguments.min_tokens
        ),
        hygiene=filters.from_arguments(arguments),
        deduplicate=arguments.deduplicate,
        shard_bytes=int(arguments.shard_mb * 1e6),
        shard_documents=arguments.shard_documents,
        compression=arguments.compression,
        unit_bytes=arguments.unit_mb and int(arguments.unit_mb * 1e6),
    )
    progress = ProgressLine(sys.stderr)
    began = time.monotonic()
    try:
        with _writing(arguments.output):
            manifest, found = make_shards(
                arguments.input,
                arguments.output,
                arguments.tokenizer,
                settings,
                workers=arguments.workers or _default_workers(backend),
                backend=backend,
                report=progress,
            )
    finally:
        progress.close()
    if backend == "mpi" and mpi_number("RANK") != 0:  # one of them speaks
        return
    seconds = time.monotonic() - began
    totals = manifest["totals"]
    for item in manifest["damaged"]:
        warning = f"{item['file']}: {item['damage']}; kept what could be read"
        print(f"data-prep: warning: {warning}", file=sys.stderr)
    summary = {
        "output": str(arguments.output),
        "fingerprint": manifest["fingerprint"],
        "shards": len(manifest["shards"]),
        **totals,
        "languages": manifest["languages"],
        "rejected": manifest["rejected"],
        "repaired": manifest["repaired"],
        "damaged": manifest["damaged"],
        "already_there": found,
        "seconds": round(seconds, 2),
        "mb_per_second": None if found else round(totals["bytes"] / 1e6 / seconds, 3),
    }
    if arguments.json:
        print(json.dumps(summary))
        return
    rejected = sum(manifest["rejected"].values())
    print(
        f"{arguments.output}: {'already there: ' if found else ''}{summary['shards']} shards, "
        f"{totals['documents']:,} documents, {totals['sentences']:,} sentences, {totals['tokens']:,} tokens, "
        f"{totals['bytes'] / 1e6:.1f} MB of text"
        + ("" if found else f" in {seconds:.1f} s ({summary['mb_per_second']:.2f} MB/s)")
        + (f"; {rejected:,} records rejected, see quarantine.jsonl" if rejected else "")
    )


def _default_workers(backend: str) -> int:
    return int(os.environ.get("SLURM_CPUS_PER_TASK", 1)) if backend == "slurm" else 1


def _check_output(output: str) -> None:
    """Raises `UserError` on a URL: output is written to this machine's file systems only."""
    if "://" in output:
        raise UserError(f"--output {output} is a URL; name a folder, and copy it from there when it is done")


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


def _verify(arguments: argparse.Namespace) -> None:
    from data_prep.shards.verify import verify, verify_deep

    if arguments.input and not arguments.deep:
        raise UserError("--input is for --deep: give both")
    result = verify(arguments.folder)
    deep = ""
    if arguments.deep:
        result |= verify_deep(arguments.folder, arguments.input)
        deep = "; every text comes back from its tokens, and from its sentences"
        if arguments.input:
            deep += f"; {result['compared']:,} documents are the input's, byte for byte"
    found = f"{result['shards']} shards with {result['documents']:,} documents are whole"
    print(json.dumps(result) if arguments.json else f"{arguments.folder}: {found}{deep}")


def _stage(arguments: argparse.Namespace) -> None:
    import signal

    from data_prep.shards.stage import stage

    def leave(number: int, _frame: object) -> None:
        # The copy begun goes with it. Under srun the first task to end gets the others terminated, and the
        # highest status counts: it must be REQUEUE.
        for one in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        sys.exit(REQUEUE if number == signal.SIGUSR1 else 2)

    for one in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(one, leave)
    copies = [stage(folder, arguments.to) for folder in arguments.folders]
    if os.environ.get("SLURM_PROCID", "0") == "0":  # under srun one task a node: one of them speaks
        print("\n".join(map(str, copies)))


def _split(arguments: argparse.Namespace) -> None:
    from data_prep.shards.split import parse_parts, split

    _check_output(arguments.output)
    parts = parse_parts(arguments.parts)
    with _writing(arguments.output):
        result = split(arguments.folder, arguments.output, parts, by=arguments.by, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, totals in result.items():
        print(
            f"{Path(arguments.output) / name}: {totals['shards']} shards, {totals['documents']:,} documents, "
            f"{totals['tokens']:,} tokens"
        )


def _stats(arguments: argparse.Namespace) -> None:
    from data_prep.common import page
    from data_prep.shards.stats import stats, stats_text

    if arguments.html:
        page.require()
    result = stats(arguments.folder)
    if arguments.html:
        from data_prep.common.files import write_atomically
        from data_prep.shards.stats_page import stats_page

        write_atomically(Path(arguments.html), stats_page(result).encode("utf-8"))
    print(json.dumps(result) if arguments.json else stats_text(result))


def _show(arguments: argparse.Namespace) -> None:
    from data_prep.shards.show import show

    for line in show(arguments.folder, arguments.count, arguments.number, arguments.id):
        print(line)


def _tokenizer(arguments: argparse.Namespace) -> None:
    from data_prep.corpus.documents import sample_lines
    from data_prep.corpus.inputs import survey, unread_line
    from data_prep.text.tokenizer import train_sentencepiece

    _check_output(arguments.output)
    files, unread = survey(arguments.input)
    if unread:
        print(f"data-prep: not read: {unread_line(unread)}", file=sys.stderr)
    tokenizer = train_sentencepiece(
        sample_lines(files, int(arguments.sample_mb * 1e6), filters.from_arguments(arguments)),
        arguments.output,
        arguments.vocab_size,
    )
    print(f"{arguments.output}: {tokenizer.vocab_size:,} entries, fingerprint {tokenizer.fingerprint[:16]}")


def _demo_corpus(arguments: argparse.Namespace) -> None:
    from data_prep.corpus.demo_corpus import write_demo_corpus

    for part, counts in write_demo_corpus(arguments.output).items():
        print(f"{part}: {counts['documents']:,} documents, {counts['bytes']:,} bytes of text")


if __name__ == "__main__":
    sys.exit(console())
