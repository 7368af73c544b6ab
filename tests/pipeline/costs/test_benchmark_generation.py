"""`sllm benchmark generation`: both sides write what was asked for, caches are counted by their storage, and
what a model has no positions for is said. Nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from data_prep.common.charts import figure
from data_prep.common.command_line import parse
from data_prep.common.errors import UserError
from pipeline.cli import main as cli
from pipeline.cli.options import app
from pipeline.costs.benchmark_generation import (
    Case,
    SentenceSide,
    TokenSide,
    format_benchmark,
    held_per_token,
    memory,
    run,
)
from pipeline.costs.options import GenerationBenchmark
from pipeline.data.segments import up_to_lanes
from pipeline.reports.charts import generation_chart, generation_plots

pytestmark = pytest.mark.launch

RECIPE = """
objective: sllm
output_dir: runs/x
data: {shards: [x], window_tokens: 40}
model:
  vae: {vocab_size: 64, hidden_size: 32, heads: 4, layers: 1}
  backbone: BACKBONE
training: {max_steps: 1}
"""
TOKENS = RECIPE.replace("objective: sllm", "objective: lm").replace(
    "  vae: {vocab_size: 64, hidden_size: 32, heads: 4, layers: 1}\n", ""
)
BACKBONE = (
    "{model_type: opt, vocab_size: 64, hidden_size: 32, word_embed_proj_dim: 32, num_hidden_layers: 2, "
    "num_attention_heads: 4, ffn_dim: 64, max_position_embeddings: 60, dropout: 0.0}"
)


@pytest.fixture
def recipes(tmp_path):
    for name, text in (("sllm", RECIPE), ("lm", TOKENS)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("BACKBONE", BACKBONE))
    return str(tmp_path / "sllm.yaml"), str(tmp_path / "lm.yaml")


def words(recipes, *more: str) -> list[str]:
    sllm, lm = recipes
    flags = ["benchmark", "generation", "--recipe", sllm, "--against", lm, "--runs", "2", "--threads", "1"]
    return [*flags, *more]


def options(recipes, *more: str) -> GenerationBenchmark:
    return parse(app, words(recipes, *more)).keywords["options"]


def test_figures_and_chart(recipes, tmp_path, capsys):
    output = tmp_path / "result.json"
    flags = (
        "--batch",
        "1",
        "3",
        "--context",
        "10",
        "37",
        "100",
        "--sentences",
        "2",
        "--sentence-tokens",
        "4",
    )
    # With a process for each one's memory.
    assert cli.main(words(recipes, *flags, "--output", str(output), "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == result
    assert [(p["batch"], p["context"]) for p in result["points"]] == [
        (batch, context) for batch in (1, 3) for context in (10, 37, 100)
    ]
    for point in result["points"]:
        ours, other = point["model"], point["against"]
        assert len(ours["tokens_per_second"]["values"]) == 2 and ours["first_sentence"]["median"] > 0
        layers, width, fp32 = 2, 32, 4
        place = 2 * layers * width * fp32
        sentences = -(-point["context"] // 4) + 1  # of the context, and the first new one
        cached = (sentences + 1) * place / (point["context"] + 4)
        assert ours["cached_bytes_per_token"] == pytest.approx(cached)
        if point["context"] == 100:  # more tokens than positions, but not more sentences
            assert other == {"refused": "108 tokens, 60 positions"} and "ratios" not in point
            assert point["model"]["memory"]["peak"] > 1e8
        else:
            assert other["cached_bytes_per_token"] >= place
            assert point["ratios"]["cached_bytes_per_token"] < 0.5
            assert point["ratios"]["memory_peak"] == pytest.approx(1, abs=0.5)
    assert "108 tokens, 60 positions" in format_benchmark(result)
    # None where such small caches drown in noise.
    assert set(result["held_per_token"]) <= {"model", "against"}
    root = ElementTree.fromstring(output.with_suffix(".svg").read_text())
    texts = [e.text for e in root.iter() if e.tag.endswith("}text")]
    assert texts.count("memory at the peak, GB") == 2 and "tokens of context (batch 1)" in texts
    # Along three contexts (two of the other's), then along two batches; speed and memory each.
    drawn = [line for axes in figure(generation_plots(result)).axes for line in axes.get_lines()]
    assert sum(len(line.get_xdata()) for line in drawn) == 2 * (5 + 4)
    # Every speed is drawn where it was measured, and the axis starts at zero.
    speed = figure(generation_plots(result)).axes[0]
    ours = [p["model"]["tokens_per_second"]["median"] for p in result["points"] if p["batch"] == 1]
    assert list(speed.get_lines()[0].get_ydata()) == ours and speed.get_ylim()[0] == 0
    assert generation_chart(result) == output.with_suffix(".svg").read_text()


def test_forced_lengths_are_what_is_written(recipes):
    side = SentenceSide(options(recipes), torch.device("cpu"))
    case = Case(batch=2, context=9, sentences=3, sentence_tokens=5)
    turn = side.turn(case, np.full((2, 9), 7))
    assert turn.cached_tokens == 2 * (9 + 10) and turn.step_bytes > 0
    assert side.limit(Case(1, 58 * 5, 3, 5)) == "61 sentences, 60 positions"


@pytest.mark.parametrize("kind", ["sllm", "lm"])
def test_the_memory_that_is_held_is_the_cache(kind, tmp_path):
    """As resident in the process, so also what is allocated but not counted would show."""
    wide = BACKBONE.replace("32", "256").replace("num_hidden_layers: 2", "num_hidden_layers: 6")
    text = {"sllm": RECIPE, "lm": TOKENS}[kind].replace("hidden_size: 32", "hidden_size: 256")
    (tmp_path / "wide.yaml").write_text(text.replace("BACKBONE", wide))
    recipe = str(tmp_path / "wide.yaml")
    side = (SentenceSide if kind == "sllm" else TokenSide)(options((recipe, recipe)), torch.device("cpu"))
    tokens = 2 if kind == "sllm" else 1  # of a sentence
    case = Case(batch=96, context=50 * tokens, sentences=3, sentence_tokens=tokens)
    found, refused = memory(side, [case, Case(1, 500, 3, tokens)])
    assert refused is None and found["tokens"] >= 96 * 50
    # Ours holds whole vectors of places, and one place more.
    cached = 96 * (up_to_lanes(53) if kind == "sllm" else 52) * 2 * 6 * 256 * 4
    if kind == "sllm":  # and the decoder's, of one layer: BOS and the longest sentence of every row
        cached += 96 * up_to_lanes(66) * 2 * 256 * 4
    assert found["held"] == pytest.approx(cached, rel=0.2)
    assert found["peak"] - found["before"] >= 0.9 * found["held"]


def test_a_token_more_is_measured_between_the_shortest_and_the_longest_context():
    def point(tokens, held, batch=1):
        memory = {"tokens": tokens, "held": held}
        return {"batch": batch, "model": {"memory": memory}, "against": {"refused": "why"}}

    refused = {"batch": 1, "model": {"refused": "why"}, "against": {"refused": "why"}}
    points = [point(10, 2_000), point(110, 7_000), refused, point(50, 0), point(999, 1e6, batch=8)]
    assert held_per_token(points, "model") == 50
    for few in (points[:1], [point(10, 2_000), point(20, 1_000)], [points[0], points[-1]]):
        assert held_per_token(few, "model") is None
    assert held_per_token(points, "against") is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--sentences", "1"), "at least 2"),
        (("--sentence-tokens", "64"), "must be below 64"),
        (("--output", "/nowhere/x.json"), "its folder does not exist"),
        (("--device", "cuda"), "no CUDA device"),
    ],
)
def test_senseless_arguments_are_refused(flags, says, recipes):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("cuda: there is one here")
    with pytest.raises(UserError, match=says):
        run(options(recipes, *flags))


def test_other_objectives_are_refused(recipes):
    sllm, lm = recipes
    with pytest.raises(UserError, match="only an SLLM writes sentences"):
        run(options((lm, lm)))
    with pytest.raises(UserError, match="give a token-level model"):
        run(options((sllm, sllm)))
    with pytest.raises(UserError, match="neither opt-125m"):
        run(options((sllm, "gone")))
