"""Continue texts sentence by sentence with an SLLM: `generate` for one, `generate_many` for many.

A sentence costs one step of the backbone and one cached step of the decoder per symbol:

    prompt → sentences, cut and tokenized as in training → encoder → backbone state
    repeat: stop head → decoder, symbol by symbol, to the sentence end or limit → re-encode → backbone

A prompt that ends inside a sentence is continued there: its tail is forced as the decoder's prefix. The loop
is in `writer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.prefixes import PrefixCache
from pipeline.generation.protocol import SentenceModel
from pipeline.generation.results import Continuation, Limits, Piece, Request, Sentence
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter


class Generation(Iterator[Sentence]):
    """A text being generated: an iterator of its `Sentence`s, or by `pieces` of its tokens' `Piece`s.

    At the end `stopped` is the reason, in words, and `result` the whole `Continuation`.
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
        # Refuses a prompt that does not fit now instead of at the first sentence.
        self._first = next(self._events, None)
        if self._first is not None and isinstance(self._first[1], UserError):
            raise self._first[1]

    @property
    def stopped(self) -> str | None:
        return None if self.result is None else self.result.stopped

    def _next(self) -> Piece | Sentence | None:
        first, self._first = self._first or next(self._events, None), None
        event = None if first is None else first[1]
        if isinstance(event, Continuation):
            self.result, event = event, None
        assert not isinstance(event, UserError)  # of the first event only, raised by the constructor
        return event

    def __next__(self) -> Sentence:
        while (event := self._next()) is not None:
            if isinstance(event, Sentence):
                return event
        raise StopIteration

    def pieces(self) -> Iterator[Piece]:
        """The text token by token; whole characters only."""
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
    """Continue `prompt` by up to `max_sentences` sentences (arXiv 2408.00655, §3.3: next-sentence
    prediction).

    Greedy at temperature 0: the likeliest symbol, and the document ends if the stop head gives more than 0.5.
    Otherwise both are sampled; the same `seed` gives the same text. The document may also end right after a
    complete prompt. `Sampling` and `Limits` describe the settings.

    Returns: an iterator of `Sentence`; see `Generation`.
    Raises: UserError for invalid settings, and for a prompt with more sentences than the backbone has
    positions.
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
    prefixes: PrefixCache | None = None,
) -> Iterator[list[Continuation] | UserError]:
    """Continue many prompts, `batch_size` texts at a time; yields each prompt's texts, in the prompts' order.

    Args:
        samples: texts per prompt. Text j of prompt i has the seed `seed + i · samples + j`, and equals
            `generate` with that seed.
        best_of: return only the likeliest text of each prompt, by the model's log-probability of tokens,
            sentence ends and stop decisions.
        prefixes: sentences of prompts that this model has read, also for later calls; by default of this
            call.
    Yields: a list of texts, or a prompt's UserError.
    """
    settings = sampling or Sampling(), limits or Limits(), batch_size
    writer = BatchWriter(
        model, tokenizer, *settings, prefixes=PrefixCache() if prefixes is None else prefixes
    )
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
            outcomes = [done.pop(ready * samples + j) for j in range(samples)]
            ready += 1
            texts = [text for text in outcomes if isinstance(text, Continuation)]
            if refused := [error for error in outcomes if isinstance(error, UserError)]:
                yield refused[0]
            elif best_of:
                yield [max(texts, key=lambda text: text.log_probability)]
            else:
                yield texts
