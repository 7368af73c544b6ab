"""The sums behind `sllm evaluate`, beside loops over single sentences."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers.models import VOCABULARY, small_lm, small_sllm, small_vae

from pipeline.data.batch import build_batch
from pipeline.evaluation.reconstruction import edit_distances, rebuild
from pipeline.evaluation.scores import Scores, Window, bucket, document_windows

MODELS = {"sllm": small_sllm, "lm": small_lm, "vae": small_vae}
BYTES = np.random.default_rng(8).integers(0, 5, VOCABULARY)
WINDOW_TOKENS = 40


def corpus() -> list[list[Window]]:
    """The windows of four documents: one sentence, some in one window, two of several windows."""
    rng, documents = np.random.default_rng(2), []
    for number, sentences in enumerate((1, 4, 13, 22)):
        lengths = rng.integers(1, 13, sentences)
        tokens = rng.integers(4, VOCABULARY, lengths.sum())
        source = ("books", "web")[number % 2]
        documents.append(
            list(document_windows(tokens, lengths, WINDOW_TOKENS, number, source, ("en", "zh")[number // 2]))
        )
    return documents


def scored(model: torch.nn.Module, kind: str, windows: list[Window]) -> Scores:
    scores = Scores(kind)
    scores.add(model, build_batch([window.span for window in windows]), windows, BYTES)
    return scores


def sentences_of(model: torch.nn.Module, kind: str, documents: list[list[Window]]) -> list[dict]:
    """Every sentence's place, length, bytes and nats, from the losses of its window alone."""
    found = []
    for document in documents:
        place = 0
        for window in document:
            batch = build_batch([window.span])
            with torch.no_grad():
                losses = model(batch)
                without = losses
                if kind == "sllm":  # the first sentence's vector is the start's
                    start = model.sentence_vectors(batch)[:1].expand(batch.sentences, -1)
                    without = model(batch, vectors_Sd=start)
            nll, bare = losses.target_nll_N.tolist(), without.target_nll_N.tolist()
            parts = np.split(window.span.tokens, np.cumsum(window.span.sentence_lengths)[:-1])
            for number, part in enumerate(parts):
                place += 1
                last = number == len(parts) - 1
                end = kind != "lm" or (last and window.span.document_end)
                size = len(part) + end
                stop = float(losses.stop_nll_S[number]) if kind == "sllm" else 0.0
                found.append(
                    {
                        "document": window.document,
                        "place": place,
                        "length": len(part),
                        "tokens": len(part),
                        "bytes": int(BYTES[part].sum()),
                        "nats": sum(nll[:size]) + stop,
                        "without": sum(bare[:size]) + stop,
                        "end": nll[size - 1] if end else 0.0,
                        "stop": stop,
                    }
                )
                nll, bare = nll[size:], bare[size:]
            assert not nll
    return found


def covers(group: str, number: int) -> bool:
    low, _, high = group.partition("-")
    return int(low) <= number <= int(high or low)


def expect(figures: dict, sentences: list[dict], kind: str) -> None:
    total = {key: sum(one[key] for one in sentences) for key in ("tokens", "bytes", "nats", "without")}
    assert (figures["tokens"], figures["bytes"]) == (total["tokens"], total["bytes"])
    assert figures["sentences"] == len(sentences)
    bits = 1 / math.log(2) / total["bytes"] if total["bytes"] else math.nan
    assert figures["bits_per_byte"] == pytest.approx(total["nats"] * bits, rel=1e-5)
    # Ends and stop decisions cost nats and are not among the tokens that these are shared by.
    assert figures["ppl"] == pytest.approx(math.exp(total["nats"] / total["tokens"]), rel=1e-4)
    if kind == "sllm":
        assert figures["bits_per_byte_without_vectors"] == pytest.approx(total["without"] * bits, rel=1e-5)
        gain = (total["without"] - total["nats"]) * bits
        assert figures["vector_gain"] == pytest.approx(gain, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_every_figure_is_that_of_loops_over_sentences(kind: str) -> None:
    model, documents = MODELS[kind](), corpus()
    windows = [window for document in documents for window in document]
    assert len(windows) > len(documents) + 3
    figures, sentences = scored(model, kind, windows).figures(), sentences_of(model, kind, documents)
    expect(figures, sentences, kind)
    assert (figures["documents"], figures["windows"]) == (len(documents), len(windows))
    for name in ("end", "stop"):
        expected = sum(one[name] for one in sentences)
        assert figures[f"{name}_nll_nats"] == pytest.approx(expected, rel=1e-5)
    for name, key in (("by_sentence_length", "length"), ("by_sentence_position", "place")):
        assert sum(group["sentences"] for group in figures[name].values()) == len(sentences)
        for group, its in figures[name].items():
            expect(its, [one for one in sentences if covers(group, one[key])], kind)
    for name, labels in (("by_source", ("books", "web") * 2), ("by_language", ("en", "en", "zh", "zh"))):
        assert list(figures[name]) == sorted(set(labels))
        for label, its in figures[name].items():
            mine = [number for number, one in enumerate(labels) if one == label]
            expect(its, [one for one in sentences if one["document"] in mine], kind)
            assert its["documents"] == len(mine)


def test_groups_are_powers_of_two() -> None:
    names = {number: bucket(number) for number in range(1, 70)}
    assert all(covers(name, number) for number, name in names.items())
    assert list(dict.fromkeys(names.values())) == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128"]


@pytest.mark.parametrize("kind", MODELS)
def test_merged_ranks_are_the_whole(kind: str) -> None:
    model, documents = MODELS[kind](), corpus()
    whole = scored(model, kind, [window for document in documents for window in document]).figures()
    merged = Scores(kind)
    for rank in (1, 0):
        merged.merge(scored(model, kind, [w for d in documents[rank::2] for w in d]))
    assert_near(merged.figures(), whole)


def assert_near(found: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_near(found[key], expected[key])
    elif isinstance(expected, float | list):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    else:
        assert found == expected


def test_edit_distances_by_length_are_per_token() -> None:
    model, documents = small_vae(), corpus()
    windows = [window for document in documents for window in document]
    batch = build_batch([window.span for window in windows])
    figures = scored(model, "vae", windows).figures()
    sentences = np.split(batch.tokens_T.numpy(), batch.cu_sentences[1:-1])
    edits = edit_distances(sentences, rebuild(model, batch, np.arange(len(sentences))))
    of_length = defaultdict(list)
    for sentence, count in zip(sentences, edits.tolist(), strict=True):
        of_length[len(sentence)].append(count)
    assert sum(edits) > 0 and len(of_length) > 5
    assert list(figures["exact_match_by_length"]) == [str(length) for length in sorted(of_length)]
    for length, counts in of_length.items():
        its = figures["exact_match_by_length"][str(length)]
        assert its["edit_distance"] == pytest.approx(np.mean(counts) / length)
        assert (its["sentences"], its["exact_match"]) == (len(counts), counts.count(0) / len(counts))
    assert figures["edit_distance"] == pytest.approx(sum(edits) / figures["tokens"])
