"""Continue texts sentence by sentence with an SLLM: `generate` for one, `generate_many` for many.

Comes in: an SLLM, its tokenizer and prompts (any text, also none). Goes out: the new text as soon as it is
there, token by token or sentence by sentence, and in the end all that is known of it. One sentence costs one
step of the backbone and one cached step of the decoder per symbol:

    prompt → sentences, cut and tokenized as in training → encoder → backbone state
    repeat: stop head → decoder, symbol by symbol, until the sentence end or the sentence limit → re-encode
    → backbone

A prompt that ends inside a sentence is continued from there: its tail is forced as the decoder's prefix.
The loop itself, for one text or many, is `generation_batch.py`. Called by `generate_command.py`, by
`SLLM.generate` and by users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.protocol import SentenceModel
from pipeline.generation.results import Continuation, Limits, Piece, Request, Sentence
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter


class Generation(Iterator[Sentence]):
    """One text being written: an iterator of its `Sentence`s, or (`pieces`) of its tokens' `Piece`s.

    When it is exhausted, `stopped` says why, in words, and `result` is the whole `Continuation`.
    """

    def __init__(
        self,
        model: SentenceModel,
        tokenizer: Tokenizer,
        prompt: str,
        sampling: Sampling,
        limits: Limits,
        seed: int | None = None,
    ) -> None:
        self.result: Continuation | None = None
        self._events = BatchWriter(model, tokenizer, sampling, limits).run([Request(0, prompt, seed or 0)])
        # A prompt that does not fit is refused here, not when the first sentence is asked for.
        self._first = next(self._events, None)
        if self._first is not None and isinstance(self._first[1], UserError):
            raise self._first[1]

    @property
    def stopped(self) -> str | None:
        return self.result and self.result.stopped

    def _next(self) -> Piece | Sentence | None:
        event, self._first = self._first or next(self._events, None), None
        if event is not None and isinstance(event[1], Continuation):
            self.result, event = event[1], None
        return event and event[1]

    def __next__(self) -> Sentence:
        while (event := self._next()) is not None:
            if isinstance(event, Sentence):
                return event
        raise StopIteration

    def pieces(self) -> Iterator[Piece]:
        """The text token by token, instead of sentence by sentence: whole characters only."""
        while (event := self._next()) is not None:
            if isinstance(event, Piece):
                yield event


def generate(
    model: SentenceModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_sentences: int = 10,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    max_tokens: int | None = None,
    stop: Iterable[str] = (),
) -> Generation:
    """Continue `prompt` by up to `max_sentences` sentences (arXiv 2408.00655, section 3.3: next-sentence
    prediction).

    Greedy at temperature 0: the likeliest symbol, and the document ends where the stop head gives more than
    0.5. Otherwise both are sampled; the same `seed` gives the same text. The stop head is asked after a
    complete prompt too, so that nothing may follow it. Returns an iterator of `Sentence`; `pieces()` of it
    gives token after token instead; its `result` and `stopped` tell in the end what came out and why it
    stopped. `Sampling` and `Limits` say what the settings mean.

    Raises: UserError for sampling settings that make no sense, and for a prompt with more sentences than the
    backbone has positions.
    """
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
    return Generation(
        model, tokenizer, prompt, sampling, Limits(max_sentences, max_tokens, tuple(stop)), seed
    )


def generate_many(
    model: SentenceModel,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    batch_size: int = 8,
    samples: int = 1,
    best_of: bool = False,
    seed: int = 0,
) -> Iterator[list[Continuation] | UserError]:
    """Continue many prompts, `batch_size` texts at a time; yields each prompt's texts, in the prompts' order.

    Args:
        samples: texts of each prompt. The one with number j of the prompt with number i has the seed
            `seed + i · samples + j`, and is what `generate` gives with that seed.
        best_of: of each prompt's texts only the likeliest, by the model's own log-probability of all that was
            written: tokens, sentence ends and decisions to go on or stop.
    Yields: a list of texts, or the UserError that says what is wrong with that prompt.
    """
    writer = BatchWriter(model, tokenizer, sampling or Sampling(), limits or Limits(), batch_size)
    requests = (
        Request(i * samples + j, prompt, seed + i * samples + j)
        for i, prompt in enumerate(prompts)
        for j in range(samples)
    )
    done: dict[int, Continuation | UserError] = {}
    ready = 0  # prompts handed out
    for number, event in writer.run(requests):
        if not isinstance(event, Continuation | UserError):
            continue
        done[number] = event
        while all(ready * samples + j in done for j in range(samples)):
            texts = [done.pop(ready * samples + j) for j in range(samples)]
            ready += 1
            refused = next((text for text in texts if isinstance(text, UserError)), None)
            if refused is not None:
                yield refused
            elif best_of:
                yield [max(texts, key=lambda text: text.log_probability)]
            else:
                yield texts
