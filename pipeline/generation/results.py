"""Inputs and outputs of generation: limits, requests, sentences, finished texts."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from data_prep.common.errors import UserError
from pipeline.generation.sampling import Sampling

DOCUMENT_END = "document end"
SENTENCE_LIMIT = "sentence limit"
TOKEN_LIMIT = "token limit"
STOP_STRING = "stop string"
STOPPED_BY_CALLER = "stopped by the caller"
POSITIONS_EXHAUSTED = "no positions left in the backbone"


@dataclass(frozen=True)
class Limits:
    """Limits of a text, whatever the model predicts.

    max_tokens: new tokens. stop: strings; the first one found in the new text ends it and is cut off.
    sentence_tokens: for speed measurements: every sentence gets exactly this many tokens and no document
        ends; everything is still computed.
    """

    max_sentences: int = 10
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sentence_tokens: int | None = None

    @property
    def most_sentences(self) -> int:
        """Sentences that can follow: each has at least one token."""
        return min(self.max_sentences, self.max_tokens or self.max_sentences)

    def __post_init__(self) -> None:
        for name in ("max_sentences", "max_tokens", "sentence_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        if not all(self.stop):
            raise UserError("a stop string must not be empty")


@dataclass(frozen=True)
class Request:
    """A text to generate. Its events carry `number`; `prompt`: text, or complete sentences (token ids).

    sampling, limits: its own, in place of the writer's.
    """

    number: int
    prompt: str | list[list[int]]
    seed: int = 0
    sampling: Sampling | None = None
    limits: Limits | None = None


@dataclass(frozen=True)
class Piece:
    """The text of one token: whole characters only, without what may become a stop string. `token` is None
    for text that was held back until the end. log_probability: of the token, nats, without temperature."""

    text: str
    token: int | None
    log_probability: float = 0.0


@dataclass(frozen=True)
class Sentence:
    """One generated sentence.

    The prompt and all texts together are the document. A character that is incomplete at a sentence's end is
    part of the sentence that completes it; the same holds for a possible stop string.
    """

    text: str
    tokens: tuple[int, ...]  # new tokens, without the sentence end
    forced: int  # tokens of the prompt's unfinished tail that this sentence began with
    ended: bool  # True: the model chose the sentence end; False: cut by a limit or a stop string
    log_probability: float  # nats, without temperature: new tokens and the sentence end
    stop_probability: float | None  # that the document ends here; None if it was not computed


@dataclass(frozen=True)
class Continuation:
    """A finished text: `prompt + text`. `prompt_stop_probability`: that nothing follows a complete prompt."""

    prompt: str | list[list[int]]
    text: str
    sentences: tuple[Sentence, ...]
    stopped: str
    seed: int
    prompt_stop_probability: float | None
    log_probability: float  # nats: new tokens, sentence ends, and every stop decision


class TextStream:
    """Bytes in, whole characters out, up to the first stop string."""

    def __init__(self, stop: tuple[str, ...]):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, data: bytes, final: bool = False) -> str:
        """The text that is final after `data`; with `final`, the rest too."""
        self._held += self._decoder.decode(data, final)
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0 if final else self._partial_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _partial_stop(self) -> int:
        """Characters at the end that may be the start of a stop string."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0


Event = tuple[int, Piece | Sentence | Continuation | UserError]
