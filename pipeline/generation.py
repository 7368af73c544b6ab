"""Continue a text sentence by sentence with an SLLM: `sllm generate`, and `generate` for Python.

Comes in: an SLLM, its tokenizer and a prompt (any text, also none). Goes out: an iterator of `Sentence`,
each with its text as soon as it is there. One sentence costs one step of the backbone and one cached step
of the decoder per symbol:

    prompt → sentences, cut and tokenized as in training → encoder → backbone state
    repeat: stop head → decoder, symbol by symbol, until the sentence end or the sentence limit → re-encode
    → backbone

A prompt that ends inside a sentence is continued from there: its tail is forced as the decoder's prefix.
Called by `pipeline/cli.py` and the demo.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.hygiene import detect_language
from data_prep.sentences import SentenceSettings, cut_document
from data_prep.tokenizer import LossyTokenization, Tokenizer
from pipeline.model_io import load_model, load_model_tokenizer, model_kind
from pipeline.sllm import SLLM

DOCUMENT_END = "document end"
SENTENCE_LIMIT = "sentence limit"
POSITIONS_EXHAUSTED = "no positions left in the backbone"


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is chosen from logits: greedy at temperature 0, else temperature, then top-k,
    then top-p.

    Special symbols are never chosen: `forbidden_V` (bool [V]) masks them.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or a positive number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}: must be at least 1")

    def choose(self, logits_V: torch.Tensor, forbidden_V: torch.Tensor, rng: torch.Generator) -> int:
        """The next symbol. `logits_V` float [V] on the CPU; `rng` is drawn from once per sampled symbol."""
        logits_V = logits_V.double().masked_fill(forbidden_V, -torch.inf)
        if self.temperature == 0:
            return int(logits_V.argmax())
        scaled_V = (logits_V - logits_V.max()) / self.temperature
        scaled_V, symbol_V = scaled_V.sort(descending=True, stable=True)
        if self.top_k is not None:
            scaled_V[self.top_k :] = -torch.inf
        probability_V = scaled_V.softmax(0)
        if self.top_p is not None:
            # A symbol stays when the likelier ones before it have not reached the mass yet: at least one
            # always stays.
            probability_V[probability_V.cumsum(0) - probability_V >= self.top_p] = 0
        return int(symbol_V[torch.multinomial(probability_V, 1, generator=rng)])


@dataclass(frozen=True)
class Sentence:
    """One generated sentence.

    `text` continues the prompt and the sentences before it: the prompt + all texts is the document. A
    character whose bytes are not complete at the end of a sentence appears with the sentence that completes
    it.
    """

    text: str
    tokens: tuple[int, ...]  # new tokens, without the sentence end
    forced: int  # tokens of the prompt's unfinished tail that this sentence began with
    ended: bool  # True: the model chose the sentence end; False: cut at the sentence limit, as in training


class Generation(Iterator[Sentence]):
    """The iterator `generate` returns. When it is exhausted, `stopped` says why, in words."""

    def __init__(
        self,
        model: SLLM,
        tokenizer: Tokenizer,
        prompt: str,
        max_sentences: int,
        sampling: Sampling,
    ) -> None:
        self.model = model
        self.stopped: str | None = None
        self._max_sentences = max_sentences
        self._sampling = sampling
        self._rng = torch.Generator().manual_seed(sampling.seed or 0)
        self._tokenizer = tokenizer
        self._text = codecs.getincrementaldecoder("utf-8")("replace")  # holds back unfinished characters
        settings, vae = model.config.sentence_settings, model.config.vae
        self._max_tokens = min(settings["max_tokens"], vae.max_sentence_tokens)
        settings = {**settings, "max_tokens": self._max_tokens}
        self._prompt, self._forced = split_prompt(prompt, tokenizer, settings)
        if len(self._prompt) > model.max_sentences:
            raise UserError(
                f"the prompt has {len(self._prompt)} complete sentences, but the model's backbone has "
                f"positions for {model.max_sentences}: shorten the prompt, for example to its last sentences"
            )
        self._end = model.config.eos_token_id
        # Control symbols add no bytes to a text; embedding rows above the tokenizer's entries have never
        # been trained.
        forbidden_V = np.ones(vae.vocab_size, dtype=bool)
        forbidden_V[: tokenizer.vocab_size] = tokenizer.byte_lengths == 0
        forbidden_V[[model.config.bos_token_id, model.config.pad_token_id, self._end]] = True
        self._not_first_V = torch.from_numpy(
            forbidden_V.copy()
        )  # an empty sentence does not exist in training
        forbidden_V[self._end] = False
        self._not_later_V = torch.from_numpy(forbidden_V)
        self._steps = self._run()

    def __next__(self) -> Sentence:
        with torch.inference_mode():
            return next(self._steps)

    def _run(self) -> Iterator[Sentence]:
        state = self.model.begin()
        for number, tokens in enumerate(self._prompt, 1):
            # Only after its last sentence, and not before an unfinished one, may the prompt's document be
            # over.
            decide = number == len(self._prompt) and not self._forced
            self.stopped = self._append(state, tokens, decide)
            if self.stopped:
                return
        forced = self._forced
        for number in range(1, self._max_sentences + 1):
            tokens, ended = self._decode(self.model.decode_begin(state), forced)
            if number == self._max_sentences:
                self.stopped = SENTENCE_LIMIT
            else:
                self.stopped = self._append(state, tokens, decide=True)
            new = tokens[len(forced) :]
            text = self._text.decode(self._tokenizer.decode_bytes(new), final=self.stopped is not None)
            yield Sentence(text, tuple(new), len(forced), ended)
            if self.stopped:
                return
            forced = []

    def _append(self, state, tokens: list[int], decide: bool) -> str | None:
        """Advance the backbone by one sentence; the reason to stop there, if there is one."""
        if state.cache.lengths[0] > self.model.max_sentences:
            return POSITIONS_EXHAUSTED
        self.model.append(state, tokens)
        if decide and self._document_ends(self.model.stop_probability(state)):
            return DOCUMENT_END
        return None

    def _document_ends(self, probability: float) -> bool:
        if self._sampling.temperature == 0:
            return probability > 0.5
        return float(torch.rand((), generator=self._rng)) < probability

    def _decode(self, decoder, forced: list[int]) -> tuple[list[int], bool]:
        """One sentence's tokens, the forced ones first, and whether the model ended it (else: the limit
        did).
        """
        tokens = list(forced)
        for token in forced:
            self.model.decode_step(decoder, token)
        while len(tokens) < self._max_tokens:
            forbidden_V = self._not_later_V if tokens else self._not_first_V
            symbol = self._sampling.choose(decoder.logits.float().cpu(), forbidden_V, self._rng)
            if symbol == self._end:
                return tokens, True
            tokens.append(symbol)
            if len(tokens) < self._max_tokens:
                self.model.decode_step(decoder, symbol)
        return tokens, False


def split_prompt(prompt: str, tokenizer: Tokenizer, settings: dict) -> tuple[list[list[int]], list[int]]:
    """Cut a prompt as training cuts a document: (complete sentences, tokens of the unfinished one at its
    end).

    `settings`: segmenter, language and max_tokens of the model. White space at the prompt's end belongs to
    the sentence that will follow. A last sentence that has reached the limit is complete: training would
    have cut it there.
    """
    if not prompt:
        return [], []
    cut = SentenceSettings(**settings)
    segmenter = cut.segmenter_for(detect_language(prompt))
    try:
        tokens_T, lengths_S = cut_document(prompt, tokenizer, segmenter, cut)
    except LossyTokenization:
        raise UserError(
            "the model's tokenizer cannot give this prompt back: change its unusual characters"
        ) from None
    *sentences, tail = (part.tolist() for part in np.split(tokens_T, np.cumsum(lengths_S)[:-1]))
    if segmenter.is_complete(prompt):
        space = len(prompt.encode()) - len(prompt.rstrip().encode())
        spaces_from_end = np.cumsum(tokenizer.byte_lengths[tail[::-1]])
        begun = len(tail) - int(np.searchsorted(spaces_from_end, space, side="right"))
        sentences, tail = [*sentences, tail[:begun]], tail[begun:]
    if len(tail) >= cut.max_tokens:
        sentences, tail = [*sentences, tail], []
    return [sentence for sentence in sentences if sentence], tail


def generate(
    model: SLLM,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_sentences: int = 10,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
) -> Generation:
    """Continue `prompt` by up to `max_sentences` sentences (arXiv 2408.00655, section 3.3: next-sentence
    prediction).

    Greedy at temperature 0: the likeliest symbol, and the document ends where the stop head gives more than
    0.5. Otherwise both are sampled; the same `seed` gives the same text. The stop head is asked after a
    complete prompt too, so that nothing may follow it. Returns an iterator of `Sentence` whose `stopped`
    tells in the end why it stopped.

    Raises: UserError for sampling settings that make no sense, and for a prompt with more sentences than the
    backbone has positions.
    """
    return Generation(model, tokenizer, prompt, max_sentences, Sampling(temperature, top_p, top_k, seed))


def generate_command(
    folder: str | Path,
    prompt: str,
    max_sentences: int,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> dict:
    """`sllm generate`: load a folder, continue the prompt, hand every piece of text to `on_text` (prompt
    first).

    Returns: prompt, text (prompt + continuation), sentences (their new texts), tokens (new ones), stopped,
    seconds (without loading), temperature, top_p, top_k, seed, model.
    """
    if any(0xD800 <= ord(character) <= 0xDFFF for character in prompt):
        raise UserError("the prompt is not valid UTF-8 text: give it in UTF-8")
    if temperature is None:
        temperature = 0.0 if top_p is None and top_k is None else 1.0
    if temperature and seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    sampling = Sampling(temperature, top_p, top_k, seed)  # refuse bad settings before loading a large model
    model = load_model(folder)
    if (kind := model_kind(model)) != "sllm":
        what = {"vae": "a SentenceVAE rebuilds sentences and", "lm": "a token-level model"}[kind]
        raise UserError(f"model folder {folder}: {what} cannot continue a text here; give an exported SLLM")
    tokenizer = load_model_tokenizer(folder)
    started = time.perf_counter()
    generation = Generation(model, tokenizer, prompt, max_sentences, sampling)
    if on_text:
        on_text(prompt)
    sentences = []
    for sentence in generation:
        sentences.append(sentence)
        if on_text:
            on_text(sentence.text)
    return {
        "prompt": prompt,
        "text": prompt + "".join(sentence.text for sentence in sentences),
        "sentences": [sentence.text for sentence in sentences],
        "tokens": sum(len(sentence.tokens) for sentence in sentences),
        "stopped": generation.stopped,
        "seconds": round(time.perf_counter() - started, 4),
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "model": str(folder),
    }
