"""Prompts that end inside a token: what is chosen is what a document with that text has, exactly as often as
the model says.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import tokenizer_folders
from helpers.model_folders import SETTINGS, small_model
from helpers.prompt_ends import NaiveEnd, may_follow, word_has_started

from data_prep.text.tokenizer import load_tokenizer
from pipeline.generation.api import generate, generate_many
from pipeline.generation.prompt import split_prompt
from pipeline.generation.prompt_end import CHECKED, find_prompt_end
from pipeline.generation.results import Limits
from pipeline.generation.sampling import Sampling

TEXT = "".join(f"{line}\n" for line in tokenizer_folders.LINES)
KINDS = {
    "sentencepiece": tokenizer_folders.sentence_piece,
    "byte-level": tokenizer_folders.byte_level,
    "llama": lambda folder: tokenizer_folders.llama_like(folder, 4000),
    "qwen": tokenizer_folders.qwen_like,
}
LIVELY = {"segmenter": "clause", "language": "auto", "max_tokens": 24}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(KINDS[request.param](tmp_path_factory.mktemp("tokenizer")))


def random_ends(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, the rest of its document), cut between any two characters."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        start = rng.randrange(len(TEXT) - 300)
        at = rng.randrange(1, 200)
        found.append((TEXT[start : start + at], TEXT[start + at : start + 300]))
    return found


def test_the_document_itself_is_always_among_the_choices(tokenizer):
    settings, taken = {**SETTINGS, "language": "auto"}, 0
    for prompt, rest in random_ends(300):
        sentences, tail = split_prompt(prompt, tokenizer, settings)
        end = find_prompt_end(sentences, tail, tokenizer, settings["max_tokens"])
        if not tail:
            continue
        complete = [token for sentence in sentences for token in sentence]
        document = tokenizer.encode(prompt + rest).tolist()
        if document[: len(complete)] != complete:
            continue  # "complete" was a guess about what follows
        at = len(complete)
        assert document[at : at + len(end.certain)] == end.certain
        at, branch = at + len(end.certain), end.root
        while document[at] in branch.children:
            branch, at = branch.children[document[at]], at + 1
        assert branch.longer is None or document[at] in branch.longer, (prompt[-20:], rest[:10])
        taken += bool(end.root.children)
    assert taken > 50


def test_what_is_written_is_what_a_document_has(tokenizer):
    """Random weights, which choose anything: greedy and sampled, batched, at 100 ends each."""
    model = small_model("sllm", tokenizer, seed=3, max_tokens=24)
    prompts = [prompt for prompt, _ in random_ends(100, seed=1)]
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        many = generate_many(model, tokenizer, prompts, sampling, Limits(2, max_tokens=6), 16)
        inside = 0
        for prompt, (text,) in zip(prompts, many, strict=True):
            assert isinstance(text.text, str)
            if not text.sentences:
                continue
            sentences, tail = split_prompt(
                prompt, tokenizer, {**SETTINGS, "language": "auto", "max_tokens": 24}
            )
            complete = [token for sentence in sentences for token in sentence]
            new = [token for sentence in text.sentences for token in sentence.tokens]
            document = tokenizer.encode(prompt).tolist()
            # The prompt's tokens as chosen: those of the text, whole up to the first new one.
            first = len(complete) + text.sentences[0].forced
            if tail:
                start = tokenizer.encode(prompt + text.text).tolist()[:first]
                inside += start != document
            else:
                start = complete
            for count in range(1, len(new) + 1):
                tokens = [*start, *new[:count]]
                written = tokenizer.decode_bytes(tokens).decode(errors="ignore")
                assert written.startswith(prompt) and may_follow(prompt, tokenizer, tokens)
                if word_has_started(prompt, tokenizer, tokens):
                    break
        assert inside > 10


@pytest.mark.parametrize("prompt", ["The second par", "It w", "第二天早", "The sea. It ", "numbers, "])
def test_choices_come_as_often_as_the_model_says(prompt, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folders.byte_level(tmp_path, 400))
    assert tokenizer.vocab_size < CHECKED
    model = small_model("sllm", tokenizer, seed=3, max_tokens=24)
    with torch.no_grad():
        model.vae.head.bias += 3 * torch.randn(len(model.vae.head.bias), generator=torch.manual_seed(1))
    naive = NaiveEnd(prompt, tokenizer, {**SETTINGS, "language": "auto", "max_tokens": 24}, tokenizer.eos_id)

    @torch.no_grad()
    def logits_after(tokens: list[int]) -> torch.Tensor:
        state = model.new_state(1)
        model.read(state, np.zeros(1, dtype=np.int64), [naive.sentences])
        decoder = model.decode_begin(state)
        for token in tokens:
            model.decode_step(decoder, token)
        return decoder.logits

    found = naive.log_probabilities(logits_after)
    total = torch.tensor(list(found.values()), dtype=torch.float64).logsumexp(0).item()
    expected = {choice: np.exp(value - total) for choice, value in found.items()}
    drawn: Counter = Counter()
    many = generate_many(
        model, tokenizer, [prompt], Sampling(temperature=1.0), Limits(1, max_tokens=1), 64, samples=2000
    )
    for text in next(many):
        (sentence,) = text.sentences
        last = (sentence.tokens or (tokenizer.eos_id,))[0]
        (inside,) = (p for p, lasts in naive.paths.items() if len(p) == sentence.forced and last in lasts)
        drawn[(*inside, last)] += 1
    assert set(drawn) <= set(expected)
    likely = [choice for choice, p in expected.items() if p * 2000 >= 5]
    assert len(likely) >= 4
    deviations = [(drawn[c] - 2000 * expected[c]) / np.sqrt(2000 * expected[c]) for c in likely]
    assert sum(x * x for x in deviations) < len(likely) + 5 * np.sqrt(2 * len(likely))
    # Nothing but the prompt decides how often a token inside of it is chosen.
    shares = Counter()
    for choice, count in drawn.items():
        shares[choice[:-1]] += count / 2000
    for path, share in shares.items():
        mass = sum(p for choice, p in expected.items() if choice[:-1] == path)
        assert share == pytest.approx(mass, abs=4.5 * np.sqrt(mass * max(0, 1 - mass) / 2000) + 1e-3)


def test_a_complete_prompt_is_not_continued_inside_its_last_token(tokenizer):
    """After "It ends." the next sentence begins with a token that does not join the full stop."""
    model = small_model("sllm", tokenizer, seed=5, max_tokens=24)
    with torch.no_grad():
        model.stop_head.weight.zero_()
        model.stop_head.bias.fill_(-100)
    prompt = "The sea. It ends here."
    for seed in range(40):
        run = generate(model, tokenizer, prompt, 1, temperature=1.0, seed=seed, max_tokens=1)
        list(run)
        tokens = [*tokenizer.encode(prompt).tolist(), *run.result.sentences[0].tokens]
        assert may_follow(prompt, tokenizer, tokens)


def test_the_prompt_is_kept_and_streamed_text_is_whole(tokenizer):
    model = small_model("sllm", tokenizer, seed=3, max_tokens=24)
    for prompt, _ in random_ends(20, seed=2):
        run = generate(model, tokenizer, prompt, 2, temperature=1.0, seed=1, max_tokens=8)
        pieces = list(run.pieces())
        assert "".join(piece.text for piece in pieces) == run.result.text and "\ufffd" not in prompt
        tokens = [piece.token for piece in pieces if piece.token is not None]
        assert tokens == [token for sentence in run.result.sentences for token in sentence.tokens]
