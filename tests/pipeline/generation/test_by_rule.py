"""Ends by rule in generation: sentences end where reading the text again ends them, alone and in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.model_folders import STACK, small_model

from data_prep.text.running_ends import RunningEnds
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import load_tokenizer
from pipeline.data.batch import build_batch
from pipeline.data.windows import Span
from pipeline.generation.api import generate, generate_many
from pipeline.generation.results import DOCUMENT_END, SENTENCE_LIMIT, TOKEN_LIMIT, Limits, Request
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter

PROMPTS = ["", "The list is set by hand, and its value is", "One is set.", "It ends. ", "他走了。然后", "a"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = small_model("sllm", tokenizer, seed=5, max_tokens=12, stack={**STACK, "ends": "rule"})
    with torch.no_grad():
        model.head.bias[tokenizer.eos_id] += 1
    return model.eval()


@torch.no_grad()
def test_texts_are_cut_scored_and_batched_as_they_are_read(model, tokenizer):
    limits, settings = {"max_sentences": 5, "max_tokens": 40}, {"temperature": 1.0}
    rule, stopped = RunningEnds(tokenizer, SentenceSettings(**model.config.sentence_settings)), set()
    many = generate_many(model, tokenizer, PROMPTS * 3, Sampling(**settings), Limits(**limits), batch_size=4)
    for number, (batched,) in enumerate(many):
        run = generate(model, tokenizer, PROMPTS[number % 6], seed=number, **limits, **settings)
        assert [s.text for s in run] == [s.text for s in batched.sentences]
        alone = run.result
        assert alone.stopped == batched.stopped
        assert alone.log_probability == pytest.approx(batched.log_probability, abs=1e-3)
        stopped.add(alone.stopped)
        prompt_T = tokenizer.encode(alone.prompt).astype(np.int64)
        new = [token for sentence in alone.sentences for token in sentence.tokens]
        if not new:
            continue
        tokens_T = np.concatenate([prompt_T, new]).astype(np.int64)
        lengths = rule.cut(tokens_T)
        ends = np.cumsum(lengths)
        written = len(prompt_T) + np.cumsum([len(sentence.tokens) for sentence in alone.sentences])
        assert {*written.tolist()} == {end for end in ends.tolist() if end > len(prompt_T)}
        sums = model(build_batch([Span(tokens_T, lengths, alone.stopped == DOCUMENT_END)]))
        nats = float(sums.target_nll_N[len(prompt_T) :].sum())
        assert alone.log_probability == pytest.approx(-nats, abs=2e-3)
    assert stopped >= {DOCUMENT_END, SENTENCE_LIMIT} or stopped >= {DOCUMENT_END, TOKEN_LIMIT}


def test_sentences_of_a_given_length(model, tokenizer):
    writer = BatchWriter(model, tokenizer, Sampling(), Limits(3, sentence_tokens=4), 2)
    done = [e for _, e in writer.run([Request(n, [[5, 6, 7, 8], [9, 10, 11, 12]]) for n in range(2)])]
    texts = [one for one in done if hasattr(one, "sentences")]
    assert [[len(s.tokens) for s in text.sentences] for text in texts] == [[4, 4, 4]] * 2
