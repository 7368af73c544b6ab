"""`sllm benchmark train`: what is run, on which text, and that the figures are what they are called."""

from __future__ import annotations

import gc
import json
import mmap
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.recipes import write_recipe
from transformers import OPTConfig, OPTForCausalLM

from data_prep.common.command_line import parse
from data_prep.common.errors import UserError, run_main
from data_prep.common.measuring import in_new_process
from data_prep.shards.reader import ShardSet
from pipeline.cli import main as cli
from pipeline.cli.options import app
from pipeline.costs import benchmark_training
from pipeline.costs.benchmark import published_opt
from pipeline.costs.benchmark_training import PlainModel, RecipeModel, Settings, Stepper, count
from pipeline.costs.inspect import inspect
from pipeline.costs.options import TrainingBenchmark
from pipeline.costs.sized_recipe import sized_recipe

pytestmark = pytest.mark.launch


def options(*words: str | Path) -> TrainingBenchmark:
    command = parse(app, ["benchmark", "train", "--threads", "1", *map(str, words)])
    return command.keywords["options"]


def settings(recipe: Path, shards: Path, tokens: int = 512) -> Settings:
    sized = benchmark_training._fitting(sized_recipe(recipe), tokens)
    return Settings(sized, recipe.stem, ShardSet.open(shards), tokens, "fp32", torch.device("cpu"))


def plain_folder(folder: Path, vocab_size: int = 520) -> Path:
    """A small OPT as Hugging Face saves it."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=1100,
        dropout=0.5,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def test_everything_side_by_side(tmp_path, tiny_shards, capsys):
    recipe, output = write_recipe(tmp_path), tmp_path / "result.json"
    plain = plain_folder(tmp_path / "plain-opt")
    words = ("--recipe", recipe, "--against", plain, "--shards", tiny_shards, "--tokens", 512, "--runs", 3)
    result = benchmark_training.run(options(*words, "--output", output))
    order = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    assert order == [f"run {i} of 3, {name}" for i in (1, 2, 3) for name in ("tiny", "plain-opt")]
    assert json.loads(output.read_text()) == result

    for name in ("model", "against"):
        side = result[name]
        rates = [n / s for n, s in zip(side["tokens"], side["seconds"], strict=True)]
        assert side["tokens_per_second"] == {"median": statistics.median(rates), "values": rates}
        limit = result["peak_gflops"] * 1e9 / (6 * side["multiply_adds_per_token"]["forward"])
        assert side["limit_tokens_per_second"] == pytest.approx(limit)
        assert side["share_of_limit"] == pytest.approx(statistics.median(rates) / limit)
        per_second = statistics.median(rates) * 3 * side["multiply_adds_per_token"]["forward"]
        assert side["multiply_adds_per_second"] == pytest.approx(per_second)
        # The products alone take part of a step.
        assert side["matmul_only_tokens_per_second"] > side["tokens_per_second"]["median"]
        assert 0 < side["share_of_limit"] < 1 and 0 <= side["padding_share"] < 0.2
        memory = side["memory_bytes"]
        assert memory["before"] > 0 and memory["step"] == memory["peak"] - memory["before"] > 0
    ours, theirs = result["model"], result["against"]
    assert theirs["tokens"] == [512] * 3 and theirs["padding_share"] == 0
    assert all(0 < n <= 512 for n in ours["tokens"])
    assert result["ratios"]["tokens_per_second"] == pytest.approx(
        ours["tokens_per_second"]["median"] / theirs["tokens_per_second"]["median"]
    )
    pairs = zip(ours["tokens_per_second"]["values"], theirs["tokens_per_second"]["values"], strict=True)
    assert result["ratios"]["by_turn"] == [a / b for a, b in pairs]
    assert result["ratios"]["memory_peak"] == ours["memory_bytes"]["peak"] / theirs["memory_bytes"]["peak"]
    ratio = ours["multiply_adds_per_second"] / theirs["multiply_adds_per_second"]
    assert result["ratios"]["multiply_adds_per_second"] == pytest.approx(ratio)
    assert result["peak_gflops"] == max(
        shape["gflops"] for side in (ours, theirs) for shape in side["matmul_gflops"]
    )
    assert result["cpu"] and result["packages"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(result) and str(tiny_shards.parent) not in json.dumps(result)
    text = benchmark_training.format_benchmark(result)
    assert f"{ratio:.2f} × the multiply-adds/s" in text and "matrix products alone" in text
    assert "share of the limit" in text and "tiny by plain-opt" in text
    turns = result["ratios"]["by_turn"]
    assert f"turn by turn {min(turns):.2f} to {max(turns):.2f}" in text
    assert f"512 tokens a step, {result['shards']['tokens_per_sentence']:.1f} a sentence" in text


def test_a_plain_model_reads_the_same_text_in_full_rows_with_its_own_loss(tmp_path, tiny_shards):
    shared = settings(write_recipe(tmp_path), tiny_shards, tokens=2100)
    model = OPTForCausalLM.from_pretrained(plain_folder(tmp_path / "plain"))
    ours, theirs = RecipeModel(shared.recipe, "ours", shared), PlainModel(model, "theirs", shared)
    text = []
    for turn in range(3):
        ours.prepare(turn)
        text.append(ours._batch.tokens_T.numpy())
    text = np.concatenate(text)
    for turn in range(2):
        theirs.prepare(turn)
        assert theirs.tokens == 2048 and theirs._ids.shape == (2, 1024)
        assert np.array_equal(theirs._ids.numpy().reshape(-1), text[turn * 2048 : (turn + 1) * 2048])
    logits = model(input_ids=theirs._ids).logits
    by_hand = F.cross_entropy(logits[:, :-1].reshape(-1, 520), theirs._ids[:, 1:].reshape(-1))
    assert theirs.loss().item() == pytest.approx(by_hand.item(), abs=1e-5)  # twice the same: no dropout


@pytest.mark.parametrize("objective", ["vae", "sllm", "lm"])
def test_a_recipe_is_run_as_the_trainer_would_without_dropout(objective, tmp_path, tiny_shards):
    noisy = {"vae": {"dropout": 0.5}, "backbone": {"dropout": 0.5}}
    shared = settings(write_recipe(tmp_path, objective, **noisy), tiny_shards)
    side = RecipeModel(shared.recipe, "x", shared)
    side.prepare(1)
    first, batch = side.loss().item(), side._batch
    side.prepare(1)
    assert side.loss().item() == first and side._batch is not batch  # layouts are computed again
    losses = side.model(side._batch)
    targets = batch.tokens + (int(batch.document_end_D.sum()) if objective == "lm" else batch.sentences)
    assert first == pytest.approx(losses.objective.item() / targets)


def test_the_update_is_part_of_a_step_only_when_asked_for(tmp_path, tiny_shards):
    shared = settings(write_recipe(tmp_path), tiny_shards)
    for with_update in (False, True):
        side = RecipeModel(shared.recipe, "x", shared)
        side.prepare(0)
        before = [p.detach().clone() for p in side.model.parameters()]
        stepper = Stepper(side, with_update)
        stepper()
        assert all(p.grad is not None for p in side.model.parameters())
        moved = [not torch.equal(b, p) for b, p in zip(before, side.model.parameters(), strict=True)]
        assert any(moved) == with_update
        stepper.clear()
        assert all(p.grad is None for p in side.model.parameters())


def test_counting_on_a_batch_agrees_with_the_batch(tmp_path, tiny_shards):
    shared = settings(write_recipe(tmp_path, "vae"), tiny_shards)
    side = RecipeModel(shared.recipe, "x", shared)
    side.prepare(0)
    (_, rows), batch = count(side), side._batch
    assert side.tokens == batch.tokens
    assert rows["head"] == batch.tokens + batch.sentences
    assert rows["encoder.layers.0.ffn_in"] == batch.tokens
    assert rows["decoder.layers.1.condition"] == batch.sentences


def test_the_memory_measured_is_the_memory_predicted(tmp_path, tiny_shards, monkeypatch):
    sizes = {"vae": {"hidden_size": 256, "layers": 4, "vocab_size": 8000}}
    recipe = write_recipe(tmp_path, "vae", **sizes)
    words = options("--recipe", recipe, "--shards", tiny_shards, "--tokens", 4096)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed leaves the process at once
    measured = in_new_process(benchmark_training.memory_of, "model", words)
    side = RecipeModel(sized_recipe(recipe), "x", settings(recipe, tiny_shards, 4096))
    side.prepare(0)
    per_sentence = side.tokens / side._batch.sentences
    found = inspect(recipe, tokens=4096, tokens_per_sentence=per_sentence, dtype="fp32", worlds=[1])
    weights = 4 * found["parameters"]["total"]
    # Real sentences differ in length and the bin is not quite full.
    assert measured["step"] == pytest.approx(found["step_memory"]["peak_one_process"] - weights, rel=0.1)
    assert measured["before"] > weights


def test_what_was_freed_before_a_step_is_not_its_memory():
    class Side:
        def prepare(self, turn: int) -> None:
            pass

    def touch(size: int) -> mmap.mmap:
        pages = mmap.mmap(-1, size)  # not malloc: it may hold resident pages that were freed
        np.frombuffer(pages, dtype=np.uint8)[:] = 1
        return pages

    touch(400_000_000)
    gc.collect()  # nothing that earlier tests left may be freed inside the step
    memory = benchmark_training.step_memory(Side(), lambda: touch(160_000_000), torch.device("cpu"))
    assert 150e6 < memory["step"] < 190e6


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("opt-125m", 125_239_296), ("opt-350m", 331_196_416), ("opt-1.3b", 1_315_758_080)],
)
def test_opt_is_the_published_one(size, parameters):
    with torch.device("meta"):
        model = published_opt(size)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_bad_input_is_refused_in_one_line(tmp_path, tiny_shards, capsys):
    recipe = write_recipe(tmp_path)
    small = plain_folder(tmp_path / "small", vocab_size=100)
    base = ["benchmark", "train", "--threads", "1", "--tokens", "512", "--recipe", str(recipe)]
    shards = ["--shards", str(tiny_shards)]
    cases = [
        ([*base, *shards, "--against", "opt-9b"], "opt-125m"),
        ([*base, *shards, "--against", str(small)], "vocabulary of 100"),
        ([*base, "--shards", str(tmp_path / "gone")], "gone"),
        ([*base, *shards, "--output", str(tmp_path / "no" / "x.json")], "folder"),
        (base, "nowhere"),  # the recipe's own shards
    ]
    if not torch.cuda.is_available():
        cases.append(([*base, *shards, "--device", "cuda"], "CUDA"))
    for words, part in cases:
        capsys.readouterr()
        status = run_main("sllm", lambda words=words: cli.main(words))
        out, err = capsys.readouterr()
        assert status == 2 and out == "" and part in err, err
        assert err.startswith("sllm: error: ") and len(err.strip().splitlines()) == 1


def test_our_own_folders_are_no_plain_models(tmp_path, tiny_shards):
    recipe = write_recipe(tmp_path, "vae")
    RecipeModel(sized_recipe(recipe), "x", settings(recipe, tiny_shards)).model.save_pretrained(
        tmp_path / "ours"
    )
    words = ("--recipe", recipe, "--shards", tiny_shards, "--against", tmp_path / "ours", "--tokens", 512)
    with pytest.raises(UserError, match="give its recipe"):
        benchmark_training.run(options(*words))


@pytest.mark.cuda
def test_on_cuda_in_bf16(tmp_path, tiny_shards):
    """Not run so far: no GPU was at hand."""
    recipe = write_recipe(tmp_path)
    words = ("--recipe", recipe, "--against", plain_folder(tmp_path / "plain"), "--shards", tiny_shards)
    result = benchmark_training.run(
        options(*words, "--tokens", 512, "--runs", 2, "--device", "cuda", "--dtype", "bf16", "--step")
    )
    assert result["gpu"] and result["model"]["share_of_limit"] < 1 and "mfu" in result["model"]
    assert result["model"]["memory_bytes"]["step"] > 0


def test_a_recipe_is_measured_against_one_with_other_parts_and_another_optimizer(tmp_path, tiny_shards):
    """Each side has the update of the recipe it was made of."""
    parts = {"optimizer": {"parts": {"vae.encoder": {"lr_scale": 0.5}}}}
    ours = write_recipe(tmp_path, optimizer=parts["optimizer"])
    theirs = write_recipe(tmp_path, "lm", "other", optimizer={"kind": "muon"})
    words = ("--recipe", ours, "--against", theirs, "--shards", tiny_shards, "--tokens", 512)
    result = benchmark_training.run(options(*words, "--runs", 1, "--step", "--no-memory"))
    assert result["with_update"] and result["against"]["name"] == "other"
    assert "forward, backward and update" in benchmark_training.format_benchmark(result)
