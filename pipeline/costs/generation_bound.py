"""`sllm benchmark bound`: what writing one token costs by arithmetic, beside token models of the same depth.

The cost of one more sentence behind a context, divided by its tokens: multiply-adds of linear layers and
attention, and bytes read at batch 1: weights once per call, keys and values of all that is attended to.
Nothing is run: the models are made of fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data_prep.common.errors import UserError, counted
from data_prep.common.page import Table, to_text
from pipeline.common.text import millions
from pipeline.config.schema import Recipe
from pipeline.costs.sized_recipe import DTYPES, Vocabulary, sized_recipe
from pipeline.data.batch import build_batch
from pipeline.data.windows import Span
from pipeline.models import flops
from pipeline.models.factory import new_model
from pipeline.models.folders import model_config

COSTS = ("multiply_adds", "bytes")


def run(
    recipe: str,
    against: str,
    layers: Sequence[int],
    vocab_sizes: Sequence[int],
    context: int,
    sentence_tokens: int,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """Costs of a new token for each depth and vocabulary, as plain JSON.

    Args:
        recipe: an SLLM's; its backbone gets the layers that its token layers leave of a depth.
        against: a token model's; it is counted with full attention and with the narrowest window that the
            recipe's token layers have.
        layers: depths, of all layers that a token's prediction goes through.
    Raises: UserError for recipes that do not fit.
    """
    ours, theirs = sized_recipe(recipe), sized_recipe(against)
    if (ours.objective, theirs.objective) != ("sllm", "lm"):
        raise UserError("the bound compares a recipe of objective sllm with one of objective lm")
    rows = []
    for depth in layers:
        shallow = _token_layers(ours)
        if depth <= shallow:
            raise UserError(f"--layers {depth}: {recipe} has {shallow} token layers and a backbone")
        for vocabulary in vocab_sizes:
            settings = vocabulary, context, sentence_tokens, torch.finfo(DTYPES[dtype]).bits // 8
            window = ours.model.tokens.get("attention_window")
            [model] = _per_token(ours, depth - shallow, [None], *settings)
            windows = {"full": None, **({f"window {window}": window} if window else {})}
            costs = _per_token(theirs, depth, windows.values(), *settings)
            other = dict(zip(windows, costs, strict=True))
            best = {cost: min(one[cost] for one in other.values()) for cost in COSTS}
            ratios = {cost: best[cost] / model[cost] for cost in COSTS}
            row = {"layers": depth, "vocab_size": vocabulary, "model": model, "against": other}
            rows.append({**row, "ratios": ratios})
    what = {"recipe": recipe, "against": against, "dtype": dtype}
    return {**what, "context": context, "sentence_tokens": sentence_tokens, "rows": rows}


def _token_layers(recipe: Recipe) -> int:
    tokens, vae = recipe.model.tokens, recipe.model.vae
    if recipe.model.layout == "stack":
        return tokens.get("lower_layers", 1) + tokens.get("upper_layers", 2)
    return vae.get("layers", 1) + (vae.get("encoder_layers") or vae.get("layers", 1))


def _per_token(
    recipe: Recipe,
    depth: int | None,
    windows: Iterable[int | None],
    vocabulary: int,
    context: int,
    tokens: int,
    size: int,
) -> list[dict[str, float]]:
    """Costs with each of some limits of a token model's attention. depth: None leaves the recipe's."""
    recipe = recipe.model_copy(deep=True)
    recipe.data.window_tokens = context
    recipe.model.backbone |= {"max_position_embeddings": 2 * (context + tokens)}
    if depth is not None:
        recipe.model.backbone |= {"num_hidden_layers": depth}
    recipe.reading_part["vocab_size"] = vocabulary
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = new_model(recipe, Vocabulary(vocabulary), {}).eval()
        few, many = (_counts(model, context // tokens + more, tokens) for more in (0, 1))
    parts, weights = flops.part_of(model), flops.linear_weights(model)
    config = model_config(model)
    backbone = getattr(config, "backbone", config)
    heads = getattr(backbone, "num_attention_heads", 1)
    shared = (getattr(backbone, "num_key_value_heads", None) or heads) / heads
    linear = read = 0.0
    for name, count in many[0].items():
        rows = (count - few[0].get(name, 0)) / tokens
        linear += weights[name] * rows
        # A sentence is encoded in one call.
        read += weights[name] * (rows / tokens if parts[name] == "encoder" else rows)
    found = []
    for window in windows:
        attention = cached = 0.0
        for (part, wide), count in many[1].items():
            pairs = (count - few[1][part, wide]) / tokens
            if window is not None:
                pairs = min(pairs, window * config.num_hidden_layers)
            attention += 2 * wide * pairs
            cached += 2 * wide * pairs * (0 if part == "encoder" else shared if part == "backbone" else 1)
        found.append({"multiply_adds": linear + attention, "bytes": (read + cached) * size})
    return found


def cost_of_token(recipe: Recipe, vocabulary: int, context: int, tokens: int, size: int) -> dict[str, float]:
    """`COSTS` of a new token of a recipe's model at batch 1, in sentences of `tokens` tokens."""
    return _per_token(recipe, None, [None], vocabulary, context, tokens, size)[0]


def bytes_per_token(recipe: Recipe, vocabulary: int, context: int, tokens: int, size: int) -> float:
    """The bytes of `cost_of_token`."""
    return cost_of_token(recipe, vocabulary, context, tokens, size)["bytes"]


def _counts(
    model: nn.Module, sentences: int, tokens: int
) -> tuple[dict[str, int], dict[tuple[str, int], int]]:
    """Of a window of equal sentences: rows of every linear layer; needed pairs of every part's layers."""
    span = Span(np.zeros(sentences * tokens, dtype=np.int64), np.full(sentences, tokens), False)
    # A model that sees sentence ends puts them between the tokens, which fake tensors do not hold.
    batch = replace(build_batch([span]), host_tokens_T=span.tokens)
    with flops.counted_rows(model) as rows:
        model(batch)
    pairs: dict[tuple[str, int], int] = {}
    for core in flops.batch_cores(model, batch):
        key = core.part, core.width
        pairs[key] = pairs.get(key, 0) + core.layers * core.needed
    return rows, pairs


def format_bound(result: dict[str, Any]) -> str:
    """The result of `run` as a text table."""
    names = list(result["rows"][0]["against"])
    header = ["layers", "vocabulary"]
    for cost in ("M multiply-adds", "MB read"):
        header += [f"{cost}: {result['recipe']}", *(f"{result['against']}, {name}" for name in names), "×"]
    rows = []
    for row in result["rows"]:
        cells = [str(row["layers"]), f"{row['vocab_size']:,}"]
        for cost in COSTS:
            figures = [row["model"], *row["against"].values()]
            cells += [millions(figure[cost])[:-1] for figure in figures]
            cells.append(f"{row['ratios'][cost]:.2f}")
        rows.append(cells)
    return (
        f"a new token behind {counted(result['context'], 'token')}, "
        f"sentences of {result['sentence_tokens']}, {result['dtype']}, batch 1; "
        "× is the cheaper token model's cost by the SLLM's\n\n" + to_text(Table(header, rows))
    )
