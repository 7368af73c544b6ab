"""One text while it is generated: what the loop of `writer.py` knows of a row of the caches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.generation.prompt_end import Branch, PromptEnd
from pipeline.generation.results import Limits, Request, Sentence, TextStream
from pipeline.generation.sampling import Sampling


class Draws:
    """Uniform numbers in [0, 1): those of torch's generator for CPUs with this seed, of which it reads the
    low 32 bits. A call of torch's takes 2 µs for each row."""

    def __init__(self, seed: int):
        self._seed, self._left = seed & 0xFFFFFFFF, list[int]()
        self._source: np.random.RandomState | None = None

    def _bits(self) -> int:
        """32 bits of MT19937."""
        if not self._left:
            self._source = self._source or np.random.RandomState(self._seed)
            self._left = self._source.randint(0, 1 << 32, 64, dtype=np.uint32)[::-1].tolist()
        return self._left.pop()

    def double(self) -> float:
        """As `torch.rand` in float64."""
        high = self._bits()
        return ((high << 32 | self._bits()) & ((1 << 53) - 1)) * 2.0**-53

    def single(self) -> float:
        """As `torch.rand` in float32."""
        return (self._bits() & ((1 << 24) - 1)) * 2.0**-24


@dataclass
class Row:
    """The state of one text."""

    request: Request
    sampling: Sampling
    limits: Limits
    stream: TextStream
    unfinished: bool  # the prompt ends inside a sentence
    tail: list[int]  # the tokens of that sentence that are certain
    end: PromptEnd | None  # while new tokens may change those of the prompt's end
    sentences: list[Sentence] = field(default_factory=list)
    new_tokens: int = 0
    log_probability: float = 0.0
    prompt_stop_probability: float | None = None
    # Of the sentence being generated (`started`: there is one):
    started: bool = False
    tokens: list[int] = field(default_factory=list)
    forced: int = 0
    feed: int = 0  # the symbol to feed next
    pending: list[int] = field(default_factory=list)  # forced tokens not yet fed
    closing: bool = False  # at the token limit: only the end's probability is missing
    ended: bool = False
    carried: tuple[int, float, bytes] | None = None  # by rule: the next sentence's first symbol
    text: str = ""
    sentence_log_probability: float = 0.0
    # At the prompt's end:
    branches: list[Branch] = field(default_factory=list)  # whose logits are still to be computed
    fed: list[int] = field(default_factory=list)  # tokens in the cache behind the certain ones

    def __post_init__(self) -> None:
        self.draws = Draws(self.request.seed)
        # So that a text does not depend on how many tokens of its prompt were taken back.
        self.end_draws = Draws(self.request.seed ^ 0x9E3779B9)

    def begin(self, bos: int, forced: list[int]) -> None:
        self.tokens, self.forced, self.pending, self.feed = list(forced), len(forced), list(forced), bos
        self.started, self.closing, self.ended = True, False, False
        self.text, self.sentence_log_probability = "", 0.0

    def carry(self, symbol: int, log_probability: float, data: bytes) -> None:
        """Keep a symbol for the next sentence: by rule it is what ends this one."""
        self.sentence_log_probability -= log_probability
        self.carried = symbol, log_probability, data

    @property
    def counts(self) -> bool:
        """Whether its sentence is a new one: by rule the prompt's last one may end as it is."""
        return self.carried is None or len(self.tokens) > self.forced
