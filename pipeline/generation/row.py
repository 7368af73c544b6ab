"""One text while it is generated: what the loop of `writer.py` knows of a row of the caches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pipeline.generation.prompt_end import Branch, PromptEnd
from pipeline.generation.results import Limits, Request, Sentence, TextStream
from pipeline.generation.sampling import Sampling


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
    text: str = ""
    sentence_log_probability: float = 0.0
    # At the prompt's end:
    branches: list[Branch] = field(default_factory=list)  # whose logits are still to be computed
    fed: list[int] = field(default_factory=list)  # tokens in the cache behind the certain ones

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(self.request.seed)
        # So that a text does not depend on how many tokens of its prompt were taken back. torch's generator
        # for CPUs reads the low 32 bits of a seed only.
        self.end_rng = torch.Generator().manual_seed(self.request.seed ^ 0x9E3779B9)

    def begin(self, bos: int, forced: list[int]) -> None:
        self.tokens, self.forced, self.pending, self.feed = list(forced), len(forced), list(forced), bos
        self.started, self.closing, self.ended = True, False, False
        self.text, self.sentence_log_probability = "", 0.0
