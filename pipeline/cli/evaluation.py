"""`sllm evaluate`, `compare`, `ngram`, `robustness` and `check`: how well models predict, and beside what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import Group, Parameter, validators

from data_prep.common.command_line import Amount, Many, Natural, Positive
from data_prep.common.errors import UserError, in_thread, log
from pipeline.cli.options import Device, Dtype, Int8, Json, Output, Overrides, answer, app

SOURCE = Parameter(group=Group("Text (one of them)", validator=validators.LimitedChoice(1, 1)))
CUT = Parameter(group=Group("With --text"))


@app.command(group="Evaluate")
def evaluate(
    *,
    model: str,
    data: Annotated[str | None, SOURCE] = None,
    text: Annotated[str | None, SOURCE] = None,
    generated: Annotated[str | None, SOURCE] = None,
    window_tokens: Positive | None = None,
    batch_tokens: Positive = 8192,
    max_documents: Positive | None = None,
    segmenter: Annotated[Literal["clause", "sentence"] | None, CUT] = None,
    lang: Annotated[Literal["en", "zh", "auto"] | None, CUT] = None,
    max_tokens: Annotated[Positive | None, CUT] = None,
    context_curve: str | None = None,
    context_block: Positive | None = None,
    context_blocks: Positive = 1,
    start_symbol: bool = True,
    ngram: str | None = None,
    record: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    int8: Int8 = False,
    json: Json = False,
) -> int:
    """Bits per byte and perplexity of an SLLM, a SentenceVAE or a token-level model (docs/evaluation.md).

    example:
      sllm evaluate --model demo/models/sllm --data demo/shards/validation --json

    Args:
        model: exported SLLM, SentenceVAE, or the folder of a Hugging Face causal language model
        data: shard folder made with the model's own tokenizer
        text: WanJuan documents, .jsonl or .jsonl.gz
        generated: output of `sllm generate --prompts`; adds the cut agreement of its sentence ends
        window_tokens: longest window (default: the model's window_tokens, else 1024)
        batch_tokens: tokens per forward pass
        max_documents: score the first documents only
        segmenter: how sentences are cut (default: as the model was trained, else clause)
        lang: language (default: as trained, else auto)
        max_tokens: longest sentence in tokens (default: as trained, else 64)
        context_curve: context lengths, such as 16,64,256: adds the loss of the same sentences at each
        context_block: with --context-curve: score blocks of so many tokens alone
        context_blocks: with --context-block: blocks of a document
        start_symbol: with --context-block: a start symbol before every context; --no-start-symbol for models
            whose documents started without one, in pretraining
        ngram: shard folder of the training text: adds the bits per byte of a Kneser-Ney model counted on it
        record: run directory that the model was exported from: keep the result for its model card
    """
    from pipeline.evaluation import evaluate as evaluation
    from pipeline.export.model_card import record_result, require_export_of
    from pipeline.parallel.agreement import AgreedError
    from pipeline.parallel.ranks import find_ranks, join, leave

    # Alone, nothing is left in the environment: a process started from here would take itself for the only
    # rank.
    environment = dict(os.environ)
    ranks = find_ranks(environment)
    if ranks.world > 1:
        os.environ.update(environment)
        join(ranks)
    try:
        if record is not None:
            require_export_of(model, record)
        result = evaluation.evaluate(
            model,
            data=data,
            text=text,
            generated=generated,
            window_tokens=window_tokens,
            batch_tokens=batch_tokens,
            max_documents=max_documents,
            segmenter=segmenter,
            language=lang,
            max_tokens=max_tokens,
            int8=int8,
            context_curve=_numbers(context_curve),
            context_block=context_block,
            context_blocks=context_blocks,
            start_symbol=start_symbol,
            ngram=ngram,
            device=device,
            dtype=dtype,
            progress=ranks.rank == 0,
            ranks=ranks,
        )
    except AgreedError:
        if ranks.rank == 0:
            raise
        return 2
    finally:
        leave()
    if ranks.rank == 0:
        if record is not None:
            path = record_result(result, record)
            log(f"recorded in {path}: the next `sllm export {record}` puts it on the model card")
        answer(result, json, evaluation.format_result)
    return 0


def _numbers(text: str | None) -> list[int]:
    """`16,64` → [16, 64]. Raises: UserError for anything else."""
    parts = text.split(",") if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--context-curve {text}: must be numbers of tokens above 0, such as 16,64,256")
    return [int(part) for part in parts]


@app.command(group="Evaluate")
def compare(
    run_dirs: Sequence[str],
    /,
    *,
    vae_run: Many = (),
    model: Many = (),
    data: str | None = None,
    generation: Many = (),
    output: str = "compare.html",
    json: Json = False,
) -> None:
    """SLLMs and token-level models at equal tokens, time and operations, with their speed: one table, one
    HTML page (docs/evaluation.md).

    example:
      sllm compare runs/sllm runs/lm --vae-run sllm=runs/vae --model sllm=models/sllm lm=models/lm

    Args:
        run_dirs: runs of objective sllm or lm; named by their folders
        vae_run: NAME=RUN, the SentenceVAE's run that the SLLM run NAME starts from: its cost is counted
        model: NAME=DIR, export of run NAME, to be evaluated on the whole text
        data: with --model: shard folder of the text (default: the recipes' validation shards)
        generation: NAME=FILE, result of `sllm benchmark generation`: NAME's speed and memory
        output: page to write
    """
    from pipeline.research import compare as comparison

    result = comparison.compare(run_dirs, output, vae_run, model, data, generation)
    answer(result, json, comparison.format_comparison)


@app.command(group="Evaluate")
def ngram(
    *,
    train: Annotated[str, Parameter(alias="--shards")],
    data: Annotated[str, Parameter(alias="--validation")],
    order: Positive = 5,
    train_tokens: Positive | None = None,
    window_tokens: Positive = 1024,
    output: Output = None,
    json: Json = False,
) -> None:
    """Bits per byte of a Kneser-Ney n-gram model: what a trained baseline must beat (docs/evaluation.md).

    example:
      sllm ngram --train shards/train --data shards/valid --train-tokens 5000000

    Args:
        train: shard folder to count
        data: shard folder to score
        order: longest n-gram
        train_tokens: tokens to count, in windows drawn as by a training run with seed 1 (default: all)
        window_tokens: longest window
    """
    from data_prep.common.environment import require_folder, write_result
    from pipeline.evaluation import ngram as counting

    require_folder(output)
    # Sorts of hundreds of millions of n-grams look at no signal.
    result = in_thread(lambda: counting.run(train, data, order, window_tokens, train_tokens))
    write_result(result, output)
    answer(result, json, counting.format_result)


@app.command(group="Evaluate")
def robustness(
    *,
    model: Many,
    text: str,
    mix: str | None = None,
    max_documents: Positive | None = None,
    seed: Natural = 1,
    output: Output = None,
    json: Json = False,
) -> None:
    """How bits per byte move on text that is not clean: other punctuation, no punctuation, noise, two
    languages (docs/evaluation.md).

    example:
      sllm robustness --model models/sllm models/lm --text valid.jsonl --mix chinese.jsonl --max-documents 20

    Args:
        model: model folders of any kind
        text: WanJuan documents, as for `sllm evaluate --text`
        mix: documents in another language: every second sentence is replaced by one of theirs
        max_documents: read the first documents only
        seed: seed of every random choice
    """
    from pipeline.evaluation import robustness as variants

    result = variants.run(model, text, mix, max_documents, seed, output)
    answer(result, json, variants.format_result)


@app.command(group="Evaluate")
def check(
    *,
    model: str,
    documents: Positive = 6,
    seed: Natural = 0,
    tolerance: Amount | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> int:
    """Prove on a model folder: causal, cached = uncached, packed = one by one. Status 1 if a check fails.

    example:
      sllm check --model demo/models/sllm --json

    Args:
        model: SLLM, SentenceVAE or token-level model folder
        documents: random documents to try
        seed: seed of the random documents
        tolerance: largest accepted difference (default: 1e-5 in fp32, 0.05 in bf16)
        dtype: precision; auto checks in fp32, and the GPU's own attention kernels in bf16
    """
    from pipeline.evaluation.self_check import check_folder, format_report

    report = check_folder(model, documents, seed, tolerance, device, dtype)
    answer(report, json, format_report)
    return 0 if report["passed"] else 1


@app.command(name="lm-eval", group="Evaluate")
def lm_eval(*words: Overrides, model: str) -> None:
    """Evaluate on the tasks of lm-evaluation-harness; all other arguments are those of its command
    (docs/evaluation.md).

    example:
      sllm lm-eval --model demo/models/sllm --tasks sllm_cloze,sllm_next_sentence,sllm_sentence_order

    Args:
        model: exported SLLM, or the folder of a token-level model
    """
    from pipeline.interop import harness

    harness.run(model, words)
