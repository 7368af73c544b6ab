"""`sllm generate`, `export` and `inspect`: model folders and what a model costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter, validators

from data_prep.common.command_line import Natural, Positive
from data_prep.common.errors import UserError, counted, log
from data_prep.common.files import read_json
from pipeline.cli.options import VAE_RECIPE_HELP, Device, Dtype, Int8, Json, answer, app, print_json
from pipeline.costs.options import Cluster

Text = Annotated[str, Parameter(allow_leading_hyphen=True)]
ONE_PROMPT = Parameter(group=Group("Prompt (at most one)", validator=validators.LimitedChoice(0, 1)))
ONE_COUNT = Parameter(group=Group("Several texts (at most one)", validator=validators.LimitedChoice(0, 1)))
ONE_SIZE = Parameter(group=Group("Size (one of them)", validator=validators.LimitedChoice(1, 1)))
SAMPLING = Parameter(group=Group("Sampling"))


@app.command(group="Models")
def generate(
    *,
    model: str,
    prompt: Annotated[Text, ONE_PROMPT] = "",
    prompts: Annotated[str | None, ONE_PROMPT] = None,
    interactive: Annotated[bool, ONE_PROMPT] = False,
    output: str | None = None,
    batch: Positive = 8,
    max_sentences: Positive = 10,
    max_tokens: Positive | None = None,
    stop: Annotated[Sequence[str], Parameter(allow_leading_hyphen=True)] = (),
    temperature: Annotated[float | None, SAMPLING] = None,
    top_p: Annotated[float | None, SAMPLING] = None,
    top_k: Annotated[Positive | None, SAMPLING] = None,
    min_p: Annotated[float | None, SAMPLING] = None,
    repetition_penalty: Annotated[float, SAMPLING] = 1.0,
    seed: Annotated[Natural | None, SAMPLING] = None,
    samples: Annotated[Positive, ONE_COUNT] = 1,
    best_of: Annotated[Positive | None, ONE_COUNT] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    int8: Int8 = False,
    batch_invariant: bool = False,
    json: Json = False,
) -> int:
    """Continue a text, sentence by sentence; sampled, or greedy with --temperature 0.

    example:
      sllm generate --model demo/models/sllm --prompt 'The list is' --max-sentences 5 --temperature 0.8

    Args:
        model: folder of an exported SLLM
        prompt: text to continue (default: start a document)
        prompts: file of prompts, a line {"prompt": TEXT} each, with --output
        interactive: as `sllm chat`: type text, and the model continues it
        output: JSON lines, one per prompt; an unfinished file is resumed
        batch: with --prompts: texts generated at once
        max_sentences: stop after this many sentences
        max_tokens: stop after this many new tokens
        stop: stop before this text; may be repeated
        temperature: below 1: likelier symbols; 0: greedy, which repeats itself with small models (default: 1)
        top_p: sample from the smallest set of this mass
        top_k: sample from this many likeliest symbols
        min_p: sample from what has this share of the likeliest symbol's probability
        repetition_penalty: above 1: tokens of the text so far become less likely
        seed: makes sampling repeatable (default: drawn, printed)
        samples: texts of each prompt
        best_of: generate this many texts, keep the likeliest by the model's own probability
        batch_invariant: a text has the same bits in any batch (fp32 on a CPU); slower for few texts
    """
    from pipeline.cli import generate as generation

    sampling = (temperature, top_p, top_k, min_p, repetition_penalty)
    how = generation.settings(max_sentences, *sampling, max_tokens, stop, samples, best_of, seed, int8)
    how = replace(how, device=device, dtype=dtype, batch_invariant=batch_invariant)
    if (prompts is None) != (output is None):
        raise UserError("--prompts FILE and --output FILE belong together")
    if prompts is not None and output is not None:
        result = generation.generate_file(model, prompts, output, how, batch)
        answer(result, json, generation.format_counts)
        return 1 if result["errors"] else 0
    if interactive:
        if how.samples > 1:
            raise UserError("--interactive writes one text: --samples and --best-of are not for it")
        from pipeline.cli.chat import converse, line_reader

        for _ in converse(model, how, line_reader(), generation.show):
            pass
        return 0
    result = generation.generate_prompt(model, prompt, how, None if json else generation.show)
    if json:
        print_json(result)
        return 0
    print(flush=True)
    sampled = f"sampled at temperature {result['temperature']:g}, seed {result['seed']}"
    log(
        f"[{counted(len(result['sentences']), 'sentence')}, {counted(result['tokens'], 'token')} in "
        f"{result['seconds']:.2f} s; "
        f"stopped: {result['stopped']}; {sampled if result['temperature'] else 'greedy'}]"
    )
    return 0


@app.command(group="Models")
def export(
    run_dir: str,
    /,
    *,
    output: str,
    which: Literal["best", "last"] | None = None,
    weights: Literal["trained", "ema"] = "trained",
    average: Positive | None = None,
    json: Json = False,
) -> None:
    """Make a model folder (safetensors, config, tokenizer) of a training run; from_pretrained loads it.

    example:
      sllm export runs/sllm-demo --output models/sllm-demo

    Args:
        run_dir: run directory of a training
        output: model folder to write
        which: best by validation bits per byte (default), or the last checkpoint
        weights: the trained weights, or their running average (training.ema)
        average: the mean of so many last checkpoints, for runs of constant rate or before a WSD decay
    """
    from pipeline.export.model_card import ORIGIN
    from pipeline.export.model_folder import export_run

    origin = read_json(export_run(run_dir, output, which, weights, average) / ORIGIN)
    best = which != "last" and bool(origin["best"]) and origin["best"]["step"] == origin["step"]
    what = f"mean of the last {average}" if average else "best" if best else "last"
    result = {"run_dir": run_dir, "output": output, "which": what, "checkpoint": origin["checkpoint"]}
    answer(result, json, "exported {checkpoint} ({which}) of {run_dir} to {output}".format_map)


@app.command(name="import", group="Models")
def import_model(source: str, /, *, output: str, opt: str | None = None, json: Json = False) -> None:
    """Make a model folder of a pretrained language model (docs/pretrained.md), or of a checkpoint of the
    paper's own code (docs/reproduction.md).

    example:
      sllm import hub/Qwen2-0.5B --output models/qwen2
      sllm import SmolLM2-135M-Instruct.Q4_1.gguf --output models/smollm2
      sllm import exp/SentenceVAE-sllm_125m_h1_all/best.pth --opt model_repo/opt-125m --output models/theirs

    Args:
        source: Hugging Face folder or GGUF file of an OPT, Llama, Mistral, Qwen2, Qwen3 or GPT-NeoX; or the
            paper's checkpoint: a file of torch that holds tensors alone, or .safetensors
        output: model folder to write
        opt: with the paper's checkpoint: folder of the OPT that it was trained with (config and tokenizer)
    """
    from torch import nn

    from pipeline.export import pretrained, published
    from pipeline.models.folders import model_kind, parameter_count

    if pretrained.is_pretrained(source):
        if opt is not None:
            raise UserError(f"--opt belongs to a checkpoint of the paper's own code, and {source} is none")
        model: nn.Module = pretrained.import_pretrained(source, output)
    elif opt is None:
        if not Path(source).exists():
            raise UserError(f"{source} does not exist")
        raise UserError(
            f"{source}: is no Hugging Face folder and no GGUF file; with a checkpoint of the paper's own "
            "code give --opt too, the folder of its OPT"
        )
    else:
        model = published.import_published(source, opt, output)
    kind, count = model_kind(model), parameter_count(model)
    result = {"checkpoint": source, "output": output, "kind": kind, "parameters": count}
    size = counted(count, "parameter")
    answer(result, json, lambda found: f"imported {source} as {kind} of {size}: {output}")


@app.command(group="Cost and speed")
def inspect(
    *,
    recipe: Annotated[str | None, ONE_SIZE] = None,
    all: Annotated[bool, ONE_SIZE] = False,
    vae_recipe: Annotated[str | None, Parameter(help=VAE_RECIPE_HELP)] = None,
    vocab_size: Positive | None = None,
    tokens: Positive | None = None,
    tokens_per_sentence: float = 10.9,
    world: Annotated[Sequence[Positive], Parameter(consume_multiple=1)] = (1, 8, 64),
    dtype: Literal["bf16", "fp32"] = "bf16",
    cluster: Annotated[Cluster | None, Parameter(name="*", group="Cluster (in place of --world)")] = None,
    fit: str | None = None,
    json: Json = False,
) -> None:
    """Parameters, operations per token and memory per GPU of a recipe's model; with a cluster, what each GPU
    sends in a step, and the step's time. Nothing is allocated.

    example:
      sllm inspect --recipe sllm-1.3b-h1 --world 8 64
      sllm inspect --recipe sllm-1.3b-h1 --nodes 8 --bandwidth 400 --strategy zero1 zero3
      sllm inspect --recipe sllm-1.3b-h1 --fit 80GB --gpus 8

    Args:
        recipe: recipe file, or the name of one that ships with the package
        all: one row per published size, beside the paper's count
        vocab_size: vocabulary (default: what the recipe says, else OPT's 50272)
        tokens: tokens of a bin (default: the recipe's data.bin_tokens)
        tokens_per_sentence: mean of the text
        world: numbers of GPUs
        fit: choose strategy, bins and checkpointing for GPUs with this much memory (80GB)
    """
    from pipeline.costs import inspect as inspection

    if recipe is None and (cluster or fit):
        raise UserError("--all prints sizes alone: give --recipe for a cluster or --fit")
    if fit is not None and (tokens or (cluster and cluster.accumulation)):
        raise UserError("--fit chooses bins and micro-batches: leave out --tokens and --accumulation")
    if recipe is None:
        answer(inspection.inspect_all(vocab_size), json, inspection.format_all)
        return
    if fit is not None:
        from pipeline.costs import fit as fitting

        found = fitting.fit(
            recipe, vae_recipe, vocab_size, tokens_per_sentence, dtype, fit, cluster or Cluster()
        )
        answer(found, json, fitting.format_fit)
        return
    model = (recipe, vae_recipe, vocab_size, tokens, tokens_per_sentence, world, dtype)
    result = inspection.inspect(*model, cluster)
    answer(result, json, inspection.format_inspection)
