"""Generation: equal to a loop without any cache, reproducible, faithful to the prompt, stopped for a stated
reason.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers.model_folders import SETTINGS, save, small_model
from helpers.prompt_ends import NaiveEnd, may_follow, word_has_started

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli import generate as generate_command
from pipeline.cli.generate import generate_prompt
from pipeline.data.batch import build_batch
from pipeline.data.windows import Span
from pipeline.generation.api import generate
from pipeline.generation.prompt import split_prompt
from pipeline.generation.results import (
    DOCUMENT_END,
    POSITIONS_EXHAUSTED,
    SENTENCE_LIMIT,
    STOP_STRING,
    TOKEN_LIMIT,
    Limits,
)
from pipeline.generation.sampling import Sampling, choose

PROMPT = "The list is set by hand, and its value is"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, sentences of at most 12 tokens, and a document that practically never ends."""
    model = small_model("sllm", tokenizer, seed=4, max_tokens=12)
    with torch.no_grad():
        model.stop_head.bias.fill_(-100)
    return model


def with_stop_bias(model, bias: float):
    with torch.no_grad():
        model.stop_head.weight.zero_()
        model.stop_head.bias.fill_(bias)
    return model


# --- against the uncached forward ---


def span(sentences: list[list[int]]) -> Span:
    return Span(np.concatenate(sentences), np.asarray([len(s) for s in sentences]), False)


@torch.no_grad()
def uncached_logits(model, sentences: list[list[int]], unfinished: list[int]) -> torch.Tensor:
    """Logits of the next symbol, by the packed forward of everything written so far."""
    # Without an unfinished sentence any token will do: its first row sees BOS alone.
    vae, last = model.config.vae, unfinished or [5]
    batch = build_batch([span([*sentences, last])])
    vector_Sd = model._out_of(model.contextualise(batch)[batch.predicting_row_S])
    inputs, _ = batch.decoder_symbols(vae.bos_token_id, vae.eos_token_id)
    rows = batch.decoder_rows(inputs, vae.bos_token_id, vae.slots, vae.context_sentences)
    hidden = model.vae.decoder(rows, vector_Sd)
    return model.vae.head(hidden[-len(last) - 1 :])[len(unfinished)]


@torch.no_grad()
def uncached_stop(model, sentences: list[list[int]]) -> float:
    return torch.sigmoid(model.stop_head(model.contextualise(build_batch([span(sentences)]))[-1])).item()


def brute_force(
    model, tokenizer, prompt: str, limits: Limits, sampling: Sampling | None = None, seed: int = 0
) -> tuple[list[list[int]], str]:
    """New tokens of each sentence and why the text stopped, with no cache and no code of
    `pipeline.generation` but the prompt's cut and the choice among logits.
    """
    sampling, rng = sampling or Sampling(), torch.Generator().manual_seed(seed)
    end_rng = torch.Generator().manual_seed(seed ^ 0x9E3779B9)
    special = [t for t in np.flatnonzero(tokenizer.byte_lengths == 0) if t != model.config.eos_token_id]
    end, limit = model.config.eos_token_id, model.config.sentence_settings["max_tokens"]
    prompt_end = NaiveEnd(prompt, tokenizer, model.config.sentence_settings, end, checked=False)
    sentences, unfinished, open_end = prompt_end.sentences, prompt_end.certain, bool(prompt)
    seen = {token for sentence in (*sentences, unfinished) for token in sentence}

    def penalised(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for token in seen:
            factor = sampling.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        return logits

    made, written = [], []
    while len(made) < limits.max_sentences:
        if sentences and not prompt_end.paths:
            p = uncached_stop(model, sentences)
            if p > 0.5 if sampling.greedy else torch.rand((), generator=rng).item() < p:
                return made, DOCUMENT_END
        tokens, forced, first = [], 0, []
        if prompt_end.paths:
            after = partial(uncached_logits, model, sentences)
            *tokens, first = prompt_end.choose(after, penalised, sampling, rng, end_rng)
            forced, first, prompt_end.paths = len(tokens), [first], {}
            seen.update(tokens)
        while len(tokens) < limit:
            banned = [*special, *([] if tokens else [end])]
            before = [token for sentence in (*sentences, tokens) for token in sentence]
            while True:
                if first:
                    symbol = first.pop()
                else:
                    logits = penalised(uncached_logits(model, sentences, tokens))
                    logits[banned] = -torch.inf
                    if sampling.greedy:
                        symbol = int(logits.argmax())
                    else:
                        uniform = torch.rand((), generator=rng, dtype=torch.float64)[None]
                        symbol = int(sampling.choose(logits[None], uniform))
                if not open_end or symbol == end or may_follow(prompt, tokenizer, [*before, symbol]):
                    break
                banned.append(symbol)
            if symbol == end:
                break
            open_end = open_end and not word_has_started(prompt, tokenizer, [*before, symbol])
            tokens.append(symbol)
            written.append(symbol)
            seen.add(symbol)
            text = tokenizer.decode([*before, symbol])[len(prompt) :]
            if any(stop in text for stop in limits.stop):
                return [*made, tokens[forced:]], STOP_STRING
            if len(written) == limits.max_tokens:
                return [*made, tokens[forced:]], TOKEN_LIMIT
        made.append(tokens[forced:])
        sentences = [*sentences, tokens]
    return made, SENTENCE_LIMIT


@pytest.mark.parametrize("prompt", ["", PROMPT, "One is set.", "One is set. "])
@pytest.mark.parametrize("seed", [4, 7])
def test_cached_greedy_generation_equals_brute_force(prompt, seed, tokenizer):
    model = lively_model(tokenizer, seed)
    expected, stopped = brute_force(model, tokenizer, prompt, Limits(8))
    generation = generate(model, tokenizer, prompt, 8)
    assert [list(sentence.tokens) for sentence in generation] == expected
    assert generation.stopped == stopped


CONTEXTS = (
    {},
    {"positions": "rotary", "context_sentences": 1},
    {"positions": "rotary", "context_sentences": 2, "condition": "prefix", "prefix_slots": 2, "layers": 2},
)


def lively_model(tokenizer, seed: int, **vae):
    """Sentence ends and document ends that do come, but not at once."""
    model = small_model("sllm", tokenizer, seed=seed, max_tokens=12, vae=vae)
    with torch.no_grad():
        model.vae.head.bias[tokenizer.eos_id] += 2
        model.stop_head.bias -= 1
    return model


@pytest.mark.parametrize(
    "controls",
    [
        {"temperature": 1.0},
        {"temperature": 1.2, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 1.3, "top_p": 0.9},
    ],
    ids=lambda controls: "-".join(controls),
)
@pytest.mark.parametrize("vae", CONTEXTS, ids=["paper", "context", "prefix-context"])
def test_cached_is_uncached_under_every_control(controls, tokenizer, vae):
    model, reasons = lively_model(tokenizer, 4, **vae), set()
    for number, prompt in enumerate(["", PROMPT, "One is set.", "他走了。然后"] * 2):
        limits = Limits(5, max_tokens=30, stop=("es", "\n\n"))
        expected, stopped = brute_force(model, tokenizer, prompt, limits, Sampling(**controls), number)
        run = generate(model, tokenizer, prompt, 5, seed=number, max_tokens=30, stop=limits.stop, **controls)
        assert [list(sentence.tokens) for sentence in run] == expected and run.stopped == stopped
        reasons.add(stopped)
    assert len(reasons) > 1 or vae


def test_sentence_ends_and_limits_both_occur(model, tokenizer):
    """The comparison above would be weak if no sentence ever ended by itself."""
    with torch.no_grad():
        before = model.vae.head.bias[tokenizer.eos_id].item()
        model.vae.head.bias[tokenizer.eos_id] += 2
    try:
        ended = [
            s.ended
            for seed in range(3)
            for s in generate(model, tokenizer, "", 10, temperature=1.0, seed=seed)
        ]
    finally:
        with torch.no_grad():
            model.vae.head.bias[tokenizer.eos_id] = before
    assert any(ended) and not all(ended)


# --- sampling ---


def texts(generation) -> list[str]:
    return [sentence.text for sentence in generation]


def test_sampling_is_reproducible_by_seed(model, tokenizer):
    first, again, other = (
        texts(generate(model, tokenizer, PROMPT, 4, temperature=0.9, top_p=0.9, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def shares(probability: torch.Tensor, **settings) -> np.ndarray:
    """How often each symbol is drawn, at 4,000 evenly spread random numbers."""
    rows = 4000
    logits_RV = probability.log().float().expand(rows, -1)
    uniform_R = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    drawn_R = Sampling(**settings).choose(logits_RV, uniform_R)
    return np.bincount(drawn_R.numpy(), minlength=len(probability)) / rows


def test_sampling_follows_temperature_top_k_top_p_and_min_p():
    probability = torch.tensor([0.3, 0.5, 0.05, 0.15])
    near = dict(abs=0.002)
    cases = [
        ({"temperature": 1.0}, [0.3, 0.5, 0.05, 0.15]),
        ({"temperature": 1.0, "top_k": 2}, [0.375, 0.625, 0, 0]),
        # 0.5 has not reached 0.6, so the second likeliest stays; the third does not.
        ({"temperature": 1.0, "top_p": 0.6}, [0.375, 0.625, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.2}, [0.3 / 0.95, 0.5 / 0.95, 0, 0.15 / 0.95]),
        ({"temperature": 1.0, "min_p": 1.0}, [0, 1, 0, 0]),
        # Cut one after another: of the two that top-k leaves, the likelier one has 0.625.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.62}, [0, 1, 0, 0]),
        ({"temperature": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ]
    for settings, expected in cases:
        assert shares(probability, **settings) == pytest.approx(expected, **near), settings
    squared = probability.numpy() ** 2
    assert shares(probability, temperature=0.5) == pytest.approx(squared / squared.sum(), **near)


def test_greedy_rows_beside_drawn_ones_are_both():
    logits_RV = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    settings = [Sampling(), Sampling(temperature=1.0)]
    for uniform, drawn in ((0.01, 0), (0.99, 1)):
        uniform_R = torch.full((2,), uniform, dtype=torch.float64)
        assert choose(logits_RV, uniform_R, settings).tolist() == [1, drawn]


def test_top_p_is_the_same_where_the_nucleus_is_larger_than_the_first_look():
    probability = torch.rand(2000, generator=torch.Generator().manual_seed(0)).softmax(0)
    kept = shares(probability, temperature=1.0, top_p=0.9) > 0
    order = probability.argsort(descending=True)
    nucleus = int((probability[order].double().cumsum(0) < 0.9).sum()) + 1
    assert nucleus > 1000
    assert not kept[order[nucleus:].numpy()].any() and kept[order[:nucleus].numpy()].mean() > 0.9


def test_the_repetition_penalty_lowers_what_was_seen():
    logits_RV = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    seen_RV = torch.tensor([[True, True, False], [False, False, True]])
    penalised = Sampling(repetition_penalty=2.0).penalise(logits_RV, seen_RV)
    assert penalised.tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 0.5]]


def test_special_symbols_are_never_generated(tokenizer):
    model = small_model("sllm", tokenizer, max_tokens=12)
    special = np.flatnonzero(tokenizer.byte_lengths == 0)
    assert {tokenizer.bos_id, tokenizer.pad_id} < set(special.tolist())
    with torch.no_grad():
        model.vae.head.bias[special] += 50
        model.vae.head.bias[tokenizer.eos_id] += 50  # the end symbol would always win: sentences of one token
        model.stop_head.bias.fill_(-100)
    for settings in ({}, {"temperature": 2.0, "seed": 0}):
        sentences = list(generate(model, tokenizer, "", 5, **settings))
        assert all(len(s.tokens) == 1 and s.ended for s in sentences)
        assert not set(special.tolist()) & {t for s in sentences for t in s.tokens}


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}]
    + [{"temperature": 1, **limit} for limit in ({"top_p": 0}, {"top_k": 0}, {"repetition_penalty": 0})],
)
def test_senseless_settings_are_refused(settings, model, tokenizer):
    with pytest.raises(UserError, match="must be"):
        generate(model, tokenizer, "", 1, **settings)


# --- the prompt ---


@pytest.mark.parametrize(
    ("prompt", "complete", "tail"),
    [
        ("", [], ""),
        ("The cat", [], "The cat"),
        ("It ends. The cat", ["It ends."], " The cat"),
        ("It ends.", ["It ends."], ""),
        ("It ends. ", ["It ends."], " "),
        ("It ends.\n\n", ["It ends."], "\n\n"),
        ("First, it", ["First,"], " it"),
        (" ", [], " "),
        ("他走了。然后", ["他走了。"], "然后"),
    ],
)
def test_prompt_is_cut_as_training_cuts(prompt, complete, tail, tokenizer):
    sentences, unfinished = split_prompt(prompt, tokenizer, {**SETTINGS, "language": "auto"})
    assert [tokenizer.decode(s) for s in sentences] == complete
    assert tokenizer.decode(unfinished) == tail


def test_prompt_tail_at_the_limit_is_a_sentence(tokenizer):
    words = "name " * 40
    sentences, unfinished = split_prompt(words, tokenizer, {**SETTINGS, "max_tokens": 8})
    assert all(1 <= len(s) <= 8 for s in sentences) and len(unfinished) < 8
    assert tokenizer.decode(np.concatenate([*sentences, unfinished]).astype(int)) == words


def test_forced_prefix_is_kept_and_continued(model, tokenizer):
    sentences, unfinished = split_prompt(PROMPT, tokenizer, model.config.sentence_settings)
    assert len(sentences) >= 1 and unfinished
    first, second = generate(model, tokenizer, PROMPT, 2)
    assert first.forced == len(unfinished) and second.forced == 0
    assert len(first.tokens) <= model.config.sentence_settings["max_tokens"] - len(unfinished)


@pytest.mark.parametrize("prompt", ["", PROMPT, "It ends. ", "他走了。然后", "unfinished \u00e9"])
def test_output_begins_with_the_prompt(prompt, model, tokenizer, tmp_path):
    folder = save(model, tmp_path / "sllm", tokenizer)
    pieces = []
    result = generate_prompt(
        folder, prompt, generate_command.settings(3, temperature=1.0, seed=5), pieces.append
    )
    assert result["text"].startswith(prompt) and pieces[0] == prompt
    assert "".join(pieces) == result["text"] == prompt + "".join(result["sentences"])
    assert len(result["sentences"]) == 3 and result["stopped"] == SENTENCE_LIMIT
    assert result["tokens"] > 0 and result["seconds"] >= 0 and result["seed"] == 5


def test_a_drawn_seed_is_told_and_repeats_the_text(model, tokenizer, tmp_path):
    folder = save(model, tmp_path / "sllm", tokenizer)
    first = generate_prompt(folder, PROMPT, generate_command.settings(3, top_p=0.95))
    assert first["temperature"] == 1.0 and first["seed"] is not None
    again = generate_prompt(folder, PROMPT, generate_command.settings(3, top_p=0.95, seed=first["seed"]))
    assert again["text"] == first["text"]


# --- where it stops ---


def test_stop_head_is_obeyed(tokenizer):
    model = with_stop_bias(small_model("sllm", tokenizer, max_tokens=12), 100.0)
    for settings in ({}, {"temperature": 1.0, "seed": 0}):
        generation = generate(model, tokenizer, "", 5, **settings)
        assert len(list(generation)) == 1 and generation.stopped == DOCUMENT_END
        generation = generate(
            model, tokenizer, "It ends.", 5, **settings
        )  # nothing need follow a complete prompt
        assert list(generation) == [] and generation.stopped == DOCUMENT_END
        generation = generate(
            model, tokenizer, "It ends. The", 5, **settings
        )  # an unfinished one is finished first
        assert len(list(generation)) == 1 and generation.stopped == DOCUMENT_END


def test_sampled_stops_come_at_their_rate(tokenizer):
    model = with_stop_bias(small_model("sllm", tokenizer, max_tokens=4), float(np.log(0.25 / 0.75)))
    counts = [
        len(list(generate(model, tokenizer, "", 40, temperature=1.0, seed=seed))) for seed in range(150)
    ]
    assert np.mean(counts) == pytest.approx(4, abs=1)  # geometric, p = 1/4
    assert len(list(generate(model, tokenizer, "", 40))) == 40  # greedily, 0.25 is no stop


def test_exhausted_positions_stop_with_a_reason(model, tokenizer):
    room = model.max_sentences
    generation = generate(model, tokenizer, "", room + 5)
    assert len(list(generation)) == room + 1  # the last one is decoded from the last position
    assert generation.stopped == POSITIONS_EXHAUSTED
    generation = generate(model, tokenizer, "It is. " * room, 2)  # a prompt that just fits
    assert len(list(generation)) == 1 and generation.stopped == POSITIONS_EXHAUSTED


def test_a_prompt_of_too_many_sentences_is_refused(model, tokenizer):
    room = model.max_sentences
    with pytest.raises(UserError, match=rf"{room + 3} complete sentences.* for {room}: shorten"):
        generate(model, tokenizer, "It is. " * (room + 3), 2)


def test_the_models_own_limit_holds_where_the_settings_name_a_larger_one(tokenizer):
    model = small_model("sllm", tokenizer, seed=4, max_tokens=12)
    with torch.no_grad():
        model.stop_head.bias.fill_(-100)
    expected = [s.tokens for s in generate(model, tokenizer, "name " * 40, 2)]
    assert model.config.vae.max_sentence_tokens == 12
    model.config.sentence_settings = {**model.config.sentence_settings, "max_tokens": 500}
    assert [s.tokens for s in generate(model, tokenizer, "name " * 40, 2)] == expected


# --- characters of several bytes ---


def test_characters_split_over_sentences_are_streamed_whole(tokenizer):
    """The model writes the bytes of Chinese characters, two per sentence: no character fits into one."""
    model = with_stop_bias(small_model("sllm", tokenizer, max_tokens=4), -100.0)
    text = "然后他走了好"
    tokens = [int(t) for t in tokenizer.encode(text)]
    assert len(tokens) == len(text.encode()), (
        "the test wants a tokenizer that spells these characters in bytes"
    )
    script = [
        symbol for at in range(0, len(tokens), 2) for symbol in (*tokens[at : at + 2], tokenizer.eos_id)
    ]

    def scripted(decoder, rows, symbols):
        logits = torch.zeros(1, model.config.vae.vocab_size)
        logits[0, script.pop(0)] = 1
        return logits

    model.sentence_step = scripted
    pieces = texts(generate(model, tokenizer, "", len(tokens) // 2))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert [len(piece.encode()) for piece in pieces[:3]] == [0, 3, 3]


def test_unfinished_character_at_the_very_end_is_shown(tokenizer, model):
    tokens = tokenizer.encode("好")
    allowed = torch.full((model.config.vae.vocab_size,), -1e9)
    allowed[int(tokens[0])] = 0  # a lead byte for ever: never valid UTF-8
    before = model.vae.head.bias.detach().clone()
    try:
        with torch.no_grad():
            model.vae.head.bias.copy_(allowed)
        (sentence,) = generate(model, tokenizer, "", 1)
    finally:
        with torch.no_grad():
            model.vae.head.bias.copy_(before)
    assert sentence.text == "\ufffd" * len(sentence.tokens)


# --- other folders ---


def test_a_sentence_vae_is_refused_in_a_clear_line(tokenizer, tmp_path):
    folder = save(small_model("vae", tokenizer), tmp_path / "vae", tokenizer)
    with pytest.raises(UserError, match="cannot continue"):
        generate_prompt(folder, "The", generate_command.settings(1))


def test_a_token_model_writes_the_same_text_alone_and_beside_others(tokenizer, tmp_path):
    folder = save(small_model("lm", tokenizer), tmp_path / "lm", tokenizer)
    how = generate_command.settings(3, max_tokens=40, seed=5)
    alone = generate_prompt(folder, "The list is", how)
    together = generate_prompt(folder, "The list is", replace(how, samples=3))
    assert together["samples"][0]["tokens"] == alone["samples"][0]["tokens"]
    assert alone["sentences"] and "".join(alone["sentences"]) == alone["text"][len("The list is") :]


def test_a_prompt_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="UTF-8"):
        generate_prompt(tmp_path, "bad \udce9", generate_command.settings(1))
