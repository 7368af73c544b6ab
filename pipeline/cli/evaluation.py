"""`sllm evaluate`, `compare`, `ngram` and `robustness`: how well models predict, and beside what. The
arguments, and what each command calls."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from data_prep.common.environment import require_folder, write_result
from pipeline.cli.options import INT8_HELP, answer, command, positive

if TYPE_CHECKING:
    from pipeline.parallel.ranks import Ranks


def _evaluate(args: argparse.Namespace) -> int:
    from pipeline.parallel.agreement import AgreedError
    from pipeline.parallel.ranks import find_ranks, join, leave

    # Alone, nothing is left in the environment: what this process starts next would take itself for the only
    # rank.
    environment = dict(os.environ)
    ranks = find_ranks(environment)
    if ranks.world > 1:
        os.environ.update(environment)
        join(ranks)
    try:
        return _evaluate_as(ranks, args)
    except AgreedError:
        if ranks.rank == 0:
            raise
        return 2
    finally:
        leave()


def _evaluate_as(ranks: Ranks, args: argparse.Namespace) -> int:
    from pipeline.evaluation.evaluate import evaluate, format_result

    result = evaluate(
        args.model,
        data=args.data,
        text=args.text,
        window_tokens=args.window_tokens,
        batch_tokens=args.batch_tokens,
        max_documents=args.max_documents,
        segmenter=args.segmenter,
        language=args.lang,
        max_tokens=args.max_tokens,
        int8=args.int8,
        progress=ranks.rank == 0,
        ranks=ranks,
    )
    if ranks.rank == 0:
        answer(args, result, format_result)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from pipeline.research.compare import compare, format_comparison

    result = compare(
        args.run_dirs, args.output, args.vae_run or (), args.model or (), args.data, args.generation or ()
    )
    answer(args, result, format_comparison)
    return 0


def _ngram(args: argparse.Namespace) -> int:
    from pipeline.evaluation import ngram

    require_folder(args.output)
    result = ngram.run(args.shards, args.validation, args.order, args.window_tokens, args.train_tokens)
    write_result(result, args.output)
    answer(args, result, ngram.format_result)
    return 0


def _robustness(args: argparse.Namespace) -> int:
    from pipeline.evaluation import robustness

    result = robustness.run(args.model, args.text, args.mix, args.max_documents, args.seed, args.output)
    answer(args, result, robustness.format_result)
    return 0


def add_evaluation(commands: Any) -> None:
    """These commands, to those of `sllm`."""
    evaluate = command(
        commands,
        "evaluate",
        _evaluate,
        "Bits per byte and perplexity of an SLLM, a SentenceVAE or a token-level model (docs/evaluation.md).",
        "sllm evaluate --model demo/models/sllm --data demo/shards/validation --json",
    )
    evaluate.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="exported SLLM, SentenceVAE, or the folder of a Hugging Face causal language model",
    )
    source = evaluate.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="SHARDS", help="shard folder made with the model's own tokenizer")
    source.add_argument("--text", metavar="FILE", help="WanJuan documents, .jsonl or .jsonl.gz")
    evaluate.add_argument(
        "--window-tokens",
        type=positive,
        metavar="W",
        help="longest window (default: the model's window_tokens, else 1024)",
    )
    evaluate.add_argument(
        "--batch-tokens",
        type=positive,
        default=8192,
        metavar="N",
        help="tokens per forward pass (default 8192)",
    )
    evaluate.add_argument(
        "--max-documents", type=positive, metavar="N", help="score the first N documents only"
    )
    evaluate.add_argument(
        "--segmenter",
        choices=["clause", "sentence"],
        help="with --text: how sentences are cut (default: as the model was trained, else clause)",
    )
    evaluate.add_argument(
        "--lang",
        choices=["en", "zh", "auto"],
        help="with --text: language (default: as trained, else auto)",
    )
    evaluate.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="with --text: longest sentence in tokens (default: as trained, else 64)",
    )
    evaluate.add_argument("--int8", action="store_true", help=INT8_HELP)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    compare = command(
        commands,
        "compare",
        _compare,
        "SLLMs and token-level models at equal tokens, time and operations, with their speed: one table, one "
        "HTML page (docs/evaluation.md).",
        "sllm compare runs/sllm runs/lm --vae-run sllm=runs/vae --model sllm=models/sllm lm=models/lm",
    )
    compare.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", help="runs of objective sllm or lm; named by their folders"
    )
    compare.add_argument(
        "--vae-run",
        nargs="+",
        metavar="NAME=RUN",
        help="run of the SentenceVAE that the SLLM run NAME starts from: its cost is counted",
    )
    compare.add_argument(
        "--model", nargs="+", metavar="NAME=DIR", help="export of run NAME, to be evaluated on the whole text"
    )
    compare.add_argument(
        "--data", metavar="SHARDS", help="with --model: the text (default: the recipes' validation shards)"
    )
    compare.add_argument(
        "--generation",
        nargs="+",
        metavar="NAME=FILE",
        help="result of `sllm benchmark generation`: NAME's speed and memory",
    )
    compare.add_argument(
        "--output", default="compare.html", metavar="FILE", help="page to write (default compare.html)"
    )
    compare.add_argument("--json", action="store_true", help="print one JSON object")

    ngram = command(
        commands,
        "ngram",
        _ngram,
        "Bits per byte of a Kneser-Ney n-gram model: what a trained baseline must beat (docs/evaluation.md).",
        "sllm ngram --shards shards/train --validation shards/valid --train-tokens 5000000",
    )
    ngram.add_argument("--shards", required=True, metavar="DIR", help="shard folder to count")
    ngram.add_argument("--validation", required=True, metavar="DIR", help="shard folder to score")
    ngram.add_argument("--order", type=positive, default=5, metavar="N", help="longest n-gram (default 5)")
    ngram.add_argument(
        "--train-tokens",
        type=positive,
        metavar="N",
        help="tokens to count, of windows drawn as a training run with seed 1 draws them (default: all)",
    )
    ngram.add_argument(
        "--window-tokens", type=positive, default=1024, metavar="W", help="longest window (default 1024)"
    )
    ngram.add_argument("--output", metavar="FILE", help="also write the figures to FILE, as JSON")
    ngram.add_argument("--json", action="store_true", help="print one JSON object")

    robustness = command(
        commands,
        "robustness",
        _robustness,
        "How bits per byte move on text that is not clean: other punctuation, no punctuation, noise, two "
        "languages (docs/evaluation.md).",
        "sllm robustness --model models/sllm models/lm --text valid.jsonl --mix chinese.jsonl "
        "--max-documents 20",
    )
    robustness.add_argument(
        "--model", nargs="+", required=True, metavar="DIR", help="model folders of any kind"
    )
    robustness.add_argument(
        "--text", required=True, metavar="FILE", help="WanJuan documents, as for `sllm evaluate --text`"
    )
    robustness.add_argument(
        "--mix",
        metavar="FILE",
        help="documents in another language: every second sentence is replaced by one of theirs",
    )
    robustness.add_argument(
        "--max-documents", type=positive, metavar="N", help="read the first N documents (default: all)"
    )
    robustness.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of all that is drawn (default 1)"
    )
    robustness.add_argument("--output", metavar="FILE", help="also write the figures to FILE, as JSON")
    robustness.add_argument("--json", action="store_true", help="print one JSON object")
