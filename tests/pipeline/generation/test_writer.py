"""Many texts at once: each is what it is alone, under every control; streamed is whole; the likelihood is the
evaluation's; and nothing is lost when prompts come and go.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.backbone_families import CONFIGS
from helpers.model_folders import STACK, small_model
from helpers.models import _wake
from helpers.prompt_ends import NaiveEnd

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.data.batch import build_batch
from pipeline.data.windows import Span
from pipeline.generation.api import generate, generate_many
from pipeline.generation.results import (
    DOCUMENT_END,
    SENTENCE_LIMIT,
    STOP_STRING,
    TOKEN_LIMIT,
    Limits,
    Request,
    TextStream,
)
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter
from pipeline.models.factory import build_model
from pipeline.models.inference import lay_out
from pipeline.models.kv_cache import CachedStep, KeyValueCache

PROMPTS = [
    "",
    "The list is set by hand, and its value is",
    "One is set.",
    "It ends. ",
    "他走了。然后",
    "a",
] * 2
CONTROLS = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top-k": {"temperature": 1.2, "top_k": 20},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.3, "min_p": 0.05},
    "penalty": {"repetition_penalty": 1.3},
    "penalty-sampled": {"temperature": 1.0, "repetition_penalty": 1.3},
}
LIMITS = {"max_sentences": 6, "max_tokens": 22, "stop": ("es", "\n\n")}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


def lively(model, tokenizer):
    """Sentences and documents that end, but not at once."""
    with torch.no_grad():
        getattr(model, "vae", model).head.bias[tokenizer.eos_id] += 3 if hasattr(model, "vae") else 1.5
        model.stop_head.bias -= 1
    return model.eval()


CONTEXT = {"positions": "rotary", "context_sentences": 2, "layers": 2}


@pytest.fixture(
    scope="module",
    params=[(7, {}), (3, {"vae": CONTEXT}), (4, {"stack": STACK})],
    ids=["alone", "context", "stack"],
)
def model(tokenizer, request):
    seed, settings = request.param
    return lively(small_model("sllm", tokenizer, seed=seed, max_tokens=12, **settings), tokenizer)


def family_model(family: str, tokenizer, layers: int):
    """An SLLM of `backbone_families` with the suite's tokenizer."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    sizes = {"hidden_size": 32, "layers": layers, "heads": 4}
    text = {"segmenter": "clause", "language": "en", "max_tokens": 10}
    backbone = {**config.to_dict(), "model_type": config.model_type}
    return lively(_wake(build_model("sllm", sizes, backbone, tokenizer, text, 60)), tokenizer)


def assert_same(batched, single) -> None:
    assert batched.text == single.text and batched.stopped == single.stopped
    assert [(s.text, s.tokens, s.forced, s.ended) for s in batched.sentences] == [
        (s.text, s.tokens, s.forced, s.ended) for s in single.sentences
    ]
    assert batched.log_probability == pytest.approx(single.log_probability, abs=1e-3)
    for a, b in zip(batched.sentences, single.sentences, strict=True):
        assert a.log_probability == pytest.approx(b.log_probability, abs=1e-3)
        assert a.stop_probability == pytest.approx(b.stop_probability, abs=1e-4)


def alone(model, tokenizer, prompt: str, seed: int, settings: dict):
    run = generate(model, tokenizer, prompt, seed=seed, **LIMITS, **settings)
    assert "".join(sentence.text for sentence in run) == run.result.text
    return run.result


@pytest.mark.parametrize("controls", CONTROLS)
@pytest.mark.parametrize("rows", [2, 5])
def test_batched_is_single_under_every_control(controls, rows, model, tokenizer):
    settings = CONTROLS[controls]
    many = generate_many(
        model, tokenizer, PROMPTS, Sampling(**settings), Limits(**LIMITS), batch_size=rows, seed=3
    )
    stopped = set()
    for number, (batched,) in enumerate(many):
        assert batched.seed == 3 + number and batched.prompt == PROMPTS[number]
        assert_same(batched, alone(model, tokenizer, PROMPTS[number], 3 + number, settings))
        stopped.add(batched.stopped)
    assert number == len(PROMPTS) - 1
    assert len(stopped) > 1


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["opt-post-norm", "llama-wide", "qwen2", "qwen3"])
def test_batched_is_single_for_every_family(family, layers, tokenizer):
    model = family_model(family, tokenizer, layers)
    settings = CONTROLS["temperature"]
    many = generate_many(model, tokenizer, PROMPTS[:6], Sampling(**settings), Limits(**LIMITS), batch_size=4)
    for number, (batched,) in enumerate(many):
        assert_same(batched, alone(model, tokenizer, PROMPTS[number], number, settings))


@pytest.mark.parametrize("short", [True, False])  # together, or one by one
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_a_step_attends_to_each_row_by_itself(window, short, monkeypatch):
    monkeypatch.setattr("pipeline.models.kv_cache.SHORT_ROW", 128 if short else 0)
    torch.manual_seed(0)
    cache = KeyValueCache(rows=4, most=9, places=2)
    for rows in ([0, 1, 2, 3], [0, 2, 3], [2, 3], [0, 3], [0, 1, 3], [0, 1, 2, 3]):
        at = np.asarray(rows)
        step = CachedStep(cache, at, torch.device("cpu"))
        q, k, v = torch.randn(len(at), 4, 8), torch.randn(len(at), 2, 8), torch.randn(len(at), 2, 8)
        keys, values = cache.layer(0, k)
        for row, length in enumerate(cache.lengths):  # what lies behind a row's end must not matter
            values[row, :, length:] = keys[row, :, length:] = 1e4
        out = step.attend(0, q, k, v, None, window)
        for n, row in enumerate(rows):  # by hand
            seen = slice(max(0, cache.lengths[row] - (window or 99)), cache.lengths[row])
            k_n, v_n = (x[row, :, seen].repeat_interleave(2, 0) for x in (keys, values))
            weights = torch.einsum("hd,hpd->hp", q[n], k_n) * 8**-0.5
            torch.testing.assert_close(out[n], torch.einsum("hp,hpd->hd", weights.softmax(-1), v_n))
    assert cache.lengths.tolist() == [5, 3, 4, 6]
    assert cache.bytes_per_place == 2 * 2 * 8 * 4  # keys and values, heads, width, fp32


@pytest.mark.parametrize("controls", CONTROLS)
def test_streamed_is_whole(controls, model, tokenizer):
    for number, prompt in enumerate(PROMPTS[:6]):
        whole = alone(model, tokenizer, prompt, number, CONTROLS[controls])
        run = generate(model, tokenizer, prompt, seed=number, **LIMITS, **CONTROLS[controls])
        pieces = list(run.pieces())
        assert "".join(piece.text for piece in pieces) == whole.text and run.stopped == whole.stopped
        tokens = [piece.token for piece in pieces if piece.token is not None]
        assert tokens == [token for sentence in whole.sentences for token in sentence.tokens]


@torch.no_grad()
def evaluated(model, prompt: list[list[int]], forced: int, written: list[list[int]], ends: bool) -> float:
    """Log-probability of sentences after a prompt, by the packed forward that the evaluation uses; the last
    stop decision counts only where the document `ends`."""
    sentences = [*prompt, *written]
    lengths = np.asarray([len(s) for s in sentences])
    span = Span(np.concatenate(sentences), lengths, ends)
    sums = model(build_batch([span]))
    starts = np.concatenate([[0], np.cumsum(lengths + 1)])
    first = starts[len(prompt)] + forced
    stops = sums.stop_nll_S[max(len(prompt) - 1 + (forced > 0), 0) : None if ends else -1]
    return -float(sums.target_nll_N[first:].sum() + stops.sum())


@pytest.mark.parametrize(
    "prompt", ["", "One is set.", "The list is set by hand, and its value is", "One is s"]
)
def test_the_likelihood_is_that_of_the_evaluation(prompt, model, tokenizer):
    """Of the text given the prompt: all the nats of the document after the certain tokens, less those of all
    choices that the prompt's end leaves."""
    prompt_end = NaiveEnd(prompt, tokenizer, model.config.sentence_settings, tokenizer.eos_id, checked=False)
    sentences, certain = prompt_end.sentences, prompt_end.certain

    @torch.no_grad()
    def logits_after(tokens: list[int]) -> torch.Tensor:
        state = model.new_state(1)
        model.read(state, np.zeros(1, dtype=np.int64), [sentences])
        decoder = model.decode_begin(state)
        for token in tokens:
            model.decode_step(decoder, token)
        return decoder.logits

    choices = prompt_end.log_probabilities(logits_after)
    given = 0.0
    if len(prompt_end.paths) > 1:
        (at,) = {sum(logits_after(certain[:n]).log_softmax(-1)[t].item() for n, t in enumerate(certain))}
        given = torch.tensor(list(choices.values())).logsumexp(0).item() - at
    ended = set()
    for seed in range(12):
        run = generate(model, tokenizer, prompt, 4, temperature=1.0, seed=seed, min_p=0.02)
        list(run)
        result = run.result
        if not result.sentences:
            continue
        written = [list(s.tokens) for s in result.sentences]
        tokens = tokenizer.encode(prompt + result.text).tolist() if prompt_end.paths else []
        inside = tokens[len(prompt_end.complete) :][: result.sentences[0].forced]
        written[0] = [*inside, *written[0]]
        assert inside[: len(certain)] == certain
        ends = result.stopped == DOCUMENT_END
        expected = evaluated(model, sentences, len(certain), written, ends) - given
        assert result.log_probability == pytest.approx(expected, abs=2e-3)
        ended |= {sentence.ended for sentence in result.sentences}
        stops = [s.stop_probability for s in result.sentences]
        assert all(p is not None for p in stops[:-1]) and (stops[-1] is not None) == ends
    assert ended == {True, False}  # sentences cut at the limit are scored with their end, as in training


def test_best_of_is_the_likeliest(model, tokenizer):
    settings, limits = Sampling(temperature=1.0), Limits(max_sentences=3)
    (every,) = generate_many(model, tokenizer, ["The"], settings, limits, samples=6, seed=5)
    (best,) = generate_many(model, tokenizer, ["The"], settings, limits, samples=6, best_of=True, seed=5)
    assert [text.seed for text in every] == [5, 6, 7, 8, 9, 10]
    assert len({text.text for text in every}) == 6
    assert best == [max(every, key=lambda text: text.log_probability)]


@pytest.mark.parametrize("controls", [name for name in CONTROLS if CONTROLS[name].get("temperature")])
def test_best_of_in_a_batch_is_the_best_alone(controls, model, tokenizer):
    prompts, settings = PROMPTS[:4], CONTROLS[controls]
    many = generate_many(
        model, tokenizer, prompts, Sampling(**settings), Limits(**LIMITS), 5, samples=3, best_of=True
    )
    for number, (best,) in enumerate(many):
        every = [alone(model, tokenizer, prompts[number], 3 * number + j, settings) for j in range(3)]
        assert_same(best, max(every, key=lambda text: text.log_probability))


def test_a_prompt_that_is_refused_stops_no_other(model, tokenizer):
    prompts = ["It is. " * (model.max_sentences + 3), "The", "It is. " * (model.max_sentences + 3)]
    refused, texts, other = generate_many(model, tokenizer, prompts, batch_size=2)
    assert isinstance(refused, UserError) and isinstance(other, UserError)
    assert texts[0].prompt == "The" and texts[0].text


def test_texts_that_end_at_once_make_room(tokenizer):
    model = small_model("sllm", tokenizer, max_tokens=12)
    with torch.no_grad():
        model.stop_head.weight.zero_()
        model.stop_head.bias.fill_(100.0)
    found = [texts[0] for texts in generate_many(model, tokenizer, ["It ends."] * 5, batch_size=2)]
    assert len(found) == 5 and all(t.stopped == DOCUMENT_END and not t.sentences for t in found)
    assert all(t.prompt_stop_probability == pytest.approx(1) for t in found)


# --- limits and stop strings ---


def test_token_and_sentence_limits(model, tokenizer):
    run = generate(model, tokenizer, "", 50, temperature=1.0, seed=1, max_tokens=7)
    assert sum(len(s.tokens) for s in run) == 7 and run.stopped == TOKEN_LIMIT
    run = generate(model, tokenizer, "The", 1, temperature=1.0, seed=2)
    assert len(list(run)) == 1 and run.stopped == SENTENCE_LIMIT


@pytest.mark.parametrize("settings", [{"max_sentences": 0}, {"max_tokens": 0}, {"stop": ("a", "")}])
def test_senseless_limits_are_refused(settings):
    with pytest.raises(UserError, match="must"):
        Limits(**settings)


def test_a_stop_string_is_cut_off_wherever_it_falls(model, tokenizer):
    whole = alone(model, tokenizer, "", 11, {"temperature": 1.0}).text
    settings = {"temperature": 1.0, "seed": 11, "max_sentences": 6, "max_tokens": 40}
    for at in range(1, len(whole) - 2):
        stop = whole[at : at + 3]
        run = generate(model, tokenizer, "", **settings, stop=[stop, "never there"])
        pieces = "".join(piece.text for piece in run.pieces())
        assert pieces == run.result.text == whole[: whole.index(stop)] and run.stopped == STOP_STRING


def test_text_stream_holds_back_what_may_become_a_stop_string():
    stream = TextStream(("END", "ND!"))
    assert [stream.push(x.encode()) for x in "a E EN"] == ["a", " ", "", "E ", "", ""]
    assert stream.push("好".encode()[:1]) == "" and stream.push("好".encode()[1:]) == "EN好"
    assert stream.push(b"N") == "" and stream.push(b"", final=True) == "N"
    stream = TextStream(("END", "ND!"))
    assert stream.push(b"xEND and more") == "x" and stream.stopped


# --- measuring ---


def test_forced_sentence_lengths(model, tokenizer):
    limits = Limits(max_sentences=5, sentence_tokens=7)
    (texts,) = generate_many(model, tokenizer, ["One is set."], Sampling(), limits)
    assert [len(s.tokens) for s in texts[0].sentences] == [7] * 5
    assert texts[0].stopped == SENTENCE_LIMIT
    with pytest.raises(UserError, match="must be below 12"):
        BatchWriter(model, tokenizer, Sampling(), Limits(sentence_tokens=12))


def test_columns_change_no_text(tokenizer, tmp_path):
    model = lively(small_model("sllm", tokenizer, seed=7, max_tokens=12), tokenizer)
    before = alone(model, tokenizer, "The", 3, {"temperature": 1.0})
    assert lay_out(model) is model and not model.vae.head.weight.is_contiguous()
    assert_same(alone(model, tokenizer, "The", 3, {"temperature": 1.0}), before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.vae.head.weight.is_contiguous() and torch.equal(again.vae.head.weight, model.vae.head.weight)


def test_cached_bytes_are_of_one_place_per_sentence(model, tokenizer):
    writer = BatchWriter(model, tokenizer, Sampling(), Limits(max_sentences=3), rows=2)
    events = list(writer.run([Request(0, "One is set. " * 100), Request(1, "a")]))
    assert len(events) > 2
    backbone = model.config.backbone
    assert writer.cached_bytes_per_sentence == 2 * backbone.num_hidden_layers * backbone.hidden_size * 4
    assert writer.cached_bytes >= 102 * 2 * writer.cached_bytes_per_sentence
