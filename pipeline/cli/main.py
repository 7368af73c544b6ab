"""The `sllm` command: evaluate, generate, check, export models; audit and compare runs, inspect recipes;
measure speed.

Comes in: command-line arguments (`sllm COMMAND …`, or `python -m pipeline.cli COMMAND …`). Goes out: a
readable result, or one JSON object with `--json`, on stdout; progress on stderr; exit status 0, 1 (a check
failed) or 2 (bad input, one line on stderr). torch and transformers are imported only by the command that
needs them, so that `sllm --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import pipeline
from data_prep.common.errors import UserError, run_main
from pipeline.cli.benchmark import add_benchmarks
from pipeline.cli.evaluation import add_evaluation
from pipeline.cli.options import INT8_HELP, VAE_RECIPE_HELP, answer, command, positive, print_json
from pipeline.cli.research import add_research
from pipeline.cli.train import add_train

DESCRIPTION = "Evaluate, generate with, check, export, audit, inspect and measure sentence-level models."


def _quiet_libraries() -> None:
    """Keep Hugging Face offline and silent: models come from local folders, stdout and stderr are ours."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _generate(args: argparse.Namespace) -> int:
    from pipeline.cli import generate as generating

    how = generating.settings(
        max_sentences=args.max_sentences,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_tokens=args.max_tokens,
        stop=args.stop or (),
        samples=args.samples,
        best_of=args.best_of,
        seed=args.seed,
        int8=args.int8,
    )
    if (args.prompts is None) != (args.output is None):
        raise UserError("--prompts FILE and --output FILE belong together")
    if args.prompts is not None:
        result = generating.generate_file(args.model, args.prompts, args.output, how, args.batch)
        text = (
            "{prompts} prompts ({resumed} were there), {errors} refused, {tokens} new tokens in "
            "{seconds:.2f} s: {output}"
        )
        answer(args, result, text.format_map)
        return 1 if result["errors"] else 0
    if args.interactive:
        if how.samples > 1:
            raise UserError("--interactive writes one text: --samples and --best-of are not for it")
        for _ in generating.converse(args.model, how, lambda: input("> "), generating.show):
            pass
        return 0
    result = generating.generate_prompt(args.model, args.prompt, how, None if args.json else generating.show)
    if args.json:
        print_json(result)
    else:
        seed = "" if result["seed"] is None else f"; seed {result['seed']}"
        print(flush=True)
        print(
            f"[{len(result['sentences'])} sentences, {result['tokens']} tokens in {result['seconds']:.2f} s; "
            f"stopped: {result['stopped']}{seed}]",
            file=sys.stderr,
        )
    return 0


def _check(args: argparse.Namespace) -> int:
    from pipeline.evaluation.self_check import check_folder, format_report

    report = check_folder(args.model, documents=args.documents, seed=args.seed, tolerance=args.tolerance)
    answer(args, report, format_report)
    return 0 if report["passed"] else 1


def _export(args: argparse.Namespace) -> int:
    from pipeline.export.model_folder import export_run

    export_run(args.run_dir, args.output, args.which, args.weights)
    result = {"run_dir": args.run_dir, "output": args.output, "which": args.which}
    answer(args, result, "exported {which} of {run_dir} to {output}".format_map)
    return 0


def _audit(args: argparse.Namespace) -> int:
    from pipeline.evaluation.audit import audit, format_audit

    result = audit(args.run_dir, args.shards)
    answer(args, result, format_audit)
    return 0 if result["clean"] else 1


def _report(args: argparse.Namespace) -> int:
    from pipeline.reports.run_report import format_report, report

    result = report(args.run_dirs, args.output)
    answer(args, result, format_report)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from pipeline.costs import inspect as inspection

    if args.all:
        result, text = inspection.inspect_all(args.vocab_size), inspection.format_all
    else:
        text = inspection.format_inspection
        result = inspection.inspect(
            args.recipe,
            vae_recipe=args.vae_recipe,
            vocab_size=args.vocab_size,
            tokens=args.tokens,
            tokens_per_sentence=args.tokens_per_sentence,
            worlds=args.world,
            dtype=args.dtype,
        )
    answer(args, result, text)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from pipeline.cluster import doctor

    return doctor.run(args)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; `run` of the parsed arguments is the function to call with them."""
    parser = argparse.ArgumentParser(
        prog="sllm",
        description=DESCRIPTION,
        epilog="example:\n  sllm generate --model demo/models/sllm --prompt 'The list is' --max-sentences 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sllm {pipeline.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_train(commands)
    add_evaluation(commands)
    add_research(commands)

    generate = command(
        commands,
        "generate",
        _generate,
        "Continue a text, sentence by sentence; greedy unless a temperature is given.",
        "sllm generate --model demo/models/sllm --prompt 'The list is' --max-sentences 5 --temperature 0.8",
    )
    generate.add_argument("--model", required=True, metavar="DIR", help="folder of an exported SLLM")
    source = generate.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", default="", metavar="TEXT", help="text to continue (default: start a document)"
    )
    source.add_argument(
        "--prompts", metavar="FILE", help='file of prompts, a line {"prompt": TEXT} each, with --output'
    )
    source.add_argument(
        "--interactive", action="store_true", help="type text, let the model go on; /new begins anew"
    )
    generate.add_argument(
        "--output", metavar="FILE", help="JSON lines, one per prompt; a file begun before is continued"
    )
    generate.add_argument(
        "--batch",
        type=positive,
        default=8,
        metavar="N",
        help="with --prompts: texts written at once (default 8)",
    )
    generate.add_argument(
        "--max-sentences", type=positive, default=10, metavar="N", help="stop after N sentences (default 10)"
    )
    generate.add_argument("--max-tokens", type=positive, metavar="N", help="stop after N new tokens")
    generate.add_argument(
        "--stop", action="append", metavar="TEXT", help="stop before TEXT; may be given more than once"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 is greedy (default; 1 when --top-p, --top-k, --min-p or several texts are asked for)",
    )
    generate.add_argument("--top-p", type=float, metavar="P", help="sample from the smallest set of mass P")
    generate.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest symbols")
    generate.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="sample from what has P times the likeliest one's probability",
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens of the text so far become less likely (default 1)",
    )
    several = generate.add_mutually_exclusive_group()
    several.add_argument("--samples", type=positive, default=1, metavar="N", help="texts of each prompt")
    several.add_argument(
        "--best-of", type=positive, metavar="N", help="write N texts, keep the likeliest by the model's own"
    )
    generate.add_argument(
        "--seed", type=int, metavar="S", help="makes sampling repeatable (default: drawn, printed)"
    )
    generate.add_argument("--int8", action="store_true", help=INT8_HELP)
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end")

    check = command(
        commands,
        "check",
        _check,
        "Prove on a model folder: causal, cached = uncached, packed = one by one. Status 1 if a check fails.",
        "sllm check --model demo/models/sllm --json",
    )
    check.add_argument(
        "--model", required=True, metavar="DIR", help="SLLM, SentenceVAE or token-level model folder"
    )
    check.add_argument(
        "--documents", type=positive, default=6, metavar="N", help="random documents to try (default 6)"
    )
    check.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the random documents (default 0)"
    )
    check.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="largest accepted difference (default 1e-5)",
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")

    export = command(
        commands,
        "export",
        _export,
        "Make a model folder (safetensors, config, tokenizer) of a training run; from_pretrained loads it.",
        "sllm export runs/sllm-demo --output models/sllm-demo",
    )
    export.add_argument("run_dir", metavar="RUN_DIR", help="run directory of pipeline/train.py")
    export.add_argument("--output", required=True, metavar="DIR", help="model folder to write")
    export.add_argument(
        "--which",
        choices=["best", "last"],
        default="best",
        help="best by validation bits per byte, or the last checkpoint (default best)",
    )
    export.add_argument(
        "--weights",
        choices=["trained", "ema"],
        default="trained",
        help="the trained weights, or their running average (training.ema; default trained)",
    )
    export.add_argument("--json", action="store_true", help="print one JSON object")

    audit = command(
        commands,
        "audit",
        _audit,
        "Prove that a training run skipped and repeated no bin, over all its restarts. Status 1 if it did.",
        "sllm audit runs/sllm-demo",
    )
    audit.add_argument("run_dir", metavar="RUN_DIR", help="run directory of pipeline/train.py")
    audit.add_argument(
        "--shards", nargs="+", metavar="DIR", help="the recipe's shard folders, where they lie now"
    )
    audit.add_argument("--json", action="store_true", help="print one JSON object")

    report = command(
        commands,
        "report",
        _report,
        "One HTML page about training runs, side by side: curves, restarts, skips, saves, and what differs.",
        "sllm report runs/first runs/second --output report.html",
    )
    report.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="run directories of pipeline/train.py")
    report.add_argument(
        "--output", default="report.html", metavar="FILE", help="page to write (default report.html)"
    )
    report.add_argument("--json", action="store_true", help="print one JSON object")

    inspect = command(
        commands,
        "inspect",
        _inspect,
        "Parameters, operations per token and memory per GPU of a recipe's model; nothing is allocated.",
        "sllm inspect --recipe sllm-1.3b-h1 --world 8 64",
    )
    which = inspect.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipe", metavar="FILE", help="recipe file, or the name of one that comes along")
    which.add_argument(
        "--all", action="store_true", help="one row per published size, beside the paper's count"
    )
    inspect.add_argument("--vae-recipe", metavar="FILE", help=VAE_RECIPE_HELP)
    inspect.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help="vocabulary (default: what the recipe says, else OPT's 50272)",
    )
    inspect.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens of a bin (default: the recipe's data.bin_tokens)",
    )
    inspect.add_argument(
        "--tokens-per-sentence", type=float, default=10.9, metavar="X", help="of the text (default 10.9)"
    )
    inspect.add_argument(
        "--world",
        type=positive,
        nargs="+",
        default=[1, 8, 64],
        metavar="N",
        help="numbers of GPUs (default 1 8 64)",
    )
    inspect.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="default bf16")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    doctor = command(
        commands,
        "doctor",
        _doctor,
        "Are these machines fit for a run? Versions, shards, disks, clocks, GPUs, network; names a bad one.",
        "srun --nodes=8 --ntasks-per-node=8 sllm doctor --shards shards/train --output_dir runs/svae",
    )
    from pipeline.cluster.doctor import add_arguments

    add_arguments(doctor)

    add_benchmarks(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the process's arguments) and run the command; returns its exit status."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "overrides"):  # for the others it is a mistake
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = rest
    _quiet_libraries()
    return args.run(args)


def console() -> int:
    """Entry point of the `sllm` console script and of `python -m pipeline.cli`."""
    return run_main("sllm", main)


if __name__ == "__main__":
    raise SystemExit(console())
