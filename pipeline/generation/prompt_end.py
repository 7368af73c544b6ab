"""The end of a prompt: which tokens a document that starts with the prompt may have there.

A prompt often ends inside a token of such a document: after "The categ" a document has "egory" or "egories",
and the prompt's own last tokens occur in no document. So the last tokens are taken back, and the model
chooses among the tokens whose bytes start with what was taken back (token healing). The choice is exact: if a
token reaches from place i of the prompt beyond its end, the tokens before it are the encoding of the prompt
up to i, so all continuations form a small tree, and a branch weighs what the model gives to all tokens below
it.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data_prep.text.tokenizer import Tokenizer

LOOK_BACK = 32  # tokens; a text without spaces is encoded again from here
CHECKED = 500  # tokens behind a branch that are all checked before one is chosen; of more, the chosen one is
REJECTED = 32  # choices refused before every token of the vocabulary is checked

# After a word has started behind white space, nothing changes the tokens before it.
_NEXT_WORD = re.compile(r"\s\S")
_WORDS = re.compile(rb"\S\s+\S")


@dataclass
class Branch:
    """Tokens inside the prompt, from the last one that is certain.

    longer: tokens that follow and reach beyond the prompt; None if the branch ends with the prompt, so that
    any token follows. logits: float32 [V], of the symbol that follows; set by the writer.
    """

    path: list[int]
    children: dict[int, Branch] = field(default_factory=dict)
    longer: Sequence[int] | None = ()
    logits: Tensor | None = None
    banned: list[int] = field(default_factory=list)

    def below(self) -> Iterator[Branch]:
        """Every branch above this one's tokens, parents first."""
        for child in self.children.values():
            yield child
            yield from child.below()

    def bias(self, any_V: Tensor) -> Tensor:
        """float32 [V]: added to the logits, log-weights of all symbols that may follow. `any_V`: the bias
        where any token may follow."""
        if self.longer is None:
            bias_V = any_V.clone()
        else:
            bias_V = torch.full_like(any_V, -torch.inf)
            bias_V[list(self.longer)] = 0.0
            for token, child in self.children.items():
                bias_V[token] = child.mass(any_V)
        bias_V[self.banned] = -torch.inf
        return bias_V

    def mass(self, any_V: Tensor) -> float:
        """Log-probability that this branch is followed by a symbol that fits the prompt."""
        assert self.logits is not None
        fits_V = self.logits.double().log_softmax(-1) + self.bias(any_V)
        return float(fits_V.logsumexp(-1))


class PromptEnd:
    """The unfinished end of one prompt.

    certain: the tokens of the unfinished sentence that every continuation has. root: what may follow them.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: list[int], certain: list[int], tail: list[int], most: int
    ):
        """`context`: tokens that are encoded again to check a choice; they may begin before the sentence.
        `certain` and `tail`: the sentence's tokens; those of `tail` are in the context and may be taken back.
        `most`: tokens of the longest sentence."""
        self._tokenizer, self.certain = tokenizer, list(certain)
        self._before = context[: len(context) - len(tail)]
        self._text = tokenizer.decode(context)
        self._chosen: list[int] = []
        self.root = self._tree(tail, most - len(certain))
        while len(self.root.children) == 1 and self.root.longer == ():
            ((token, self.root),) = self.root.children.items()
            self.certain.append(token)
            self._before.append(token)
        for branch in (self.root, *self.root.below()):
            branch.path = branch.path[len(self.certain) - len(certain) :]

    def _tree(self, tail: list[int], most: int) -> Branch:
        root, vocabulary = Branch([]), _sorted_entries(self._tokenizer)
        whole = self._text.encode()
        data = self._tokenizer.decode_bytes(tail)
        ends = [0, *np.cumsum(self._tokenizer.byte_lengths[tail]).tolist()]
        for at in range(max(0, len(data) - vocabulary.longest), len(data) + 1):
            inside = at < len(data)
            candidates = vocabulary.longer_than(data[at:]) if inside else None
            if inside and not candidates:
                continue
            try:
                before = whole[: len(whole) - len(data) + at].decode()
                tokens = self._tokenizer.encode(before).tolist()
            except UnicodeDecodeError:  # inside a character: known only where the prompt's own tokens meet
                if at not in ends:
                    continue
                before, tokens = None, [*self._before, *tail[: ends.index(at)]]
            path = tokens[len(self._before) :]
            if tokens[: len(self._before)] != self._before or len(path) >= most:
                continue
            if candidates:
                fits = (t for t in candidates if self._follows(before, tokens, t, vocabulary.texts[t]))
                if (first := next(fits, None)) is None:
                    continue
                if len(candidates) <= CHECKED:
                    candidates = [first, *fits]
            branch = root
            for number, token in enumerate(path, 1):
                branch = branch.children.setdefault(token, Branch(path[:number]))
            branch.longer = candidates
        return root

    def _follows(self, before: str | None, tokens: list[int], token: int, text: str | None) -> bool:
        """`permits` for one token behind a text and its tokens; fast, because it is asked of many."""
        if before is None or text is None:
            return self.permits([*tokens[len(self._before) :], token])
        found = self._tokenizer.encode(before + text)
        return len(found) == len(tokens) + 1 and found[-1] == token and found[:-1].tolist() == tokens

    def permits(self, path: list[int]) -> bool:
        """Whether a document with the text so far and that of the tokens `path` has these tokens. True while
        the last character is incomplete."""
        tokens = [*self._before, *self._chosen, *path]
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text = decoder.decode(self._tokenizer.decode_bytes(tokens))
        except UnicodeDecodeError:
            return False
        if incomplete := decoder.getstate()[0]:
            return any(
                _is_text(incomplete + count * byte) for byte in (b"\x80", b"\xbf") for count in (1, 2, 3)
            )
        return self._tokenizer.encode(text).tolist() == tokens

    def choose(self, tokens: list[int]) -> bool:
        """Add chosen tokens; returns whether later ones may still change them."""
        self._chosen += tokens
        if len(self._chosen) > LOOK_BACK:
            return False
        text = self._tokenizer.decode_bytes([*self._before, *self._chosen]).decode(errors="ignore")
        spans = _sorted_entries(self._tokenizer).span_words
        return spans or _NEXT_WORD.search(text, max(0, len(self._text) - 1)) is None

    def beyond(self, path: list[int]) -> bytes:
        """The bytes that tokens from `root` add to the prompt."""
        written = self._tokenizer.decode_bytes([*self._before, *path])
        return written[len(self._text.encode()) :]


def find_prompt_end(
    sentences: list[list[int]], tail: list[int], tokenizer: Tokenizer, most: int
) -> PromptEnd | None:
    """The end of a prompt that was cut into complete sentences and the `tail` of an unfinished one. None if
    the prompt is empty or its tokens are not what its text encodes to."""
    tokens: list[int] = []
    for part in (tail, *reversed(sentences)):  # a few words are enough
        tokens = [*part, *tokens]
        if len(tokens) > 4 * LOOK_BACK:
            break
    if not tokens:
        return None
    # From the last word's start, if the text from there has the same tokens, else from further back.
    word = len(tokenizer.decode_bytes(tokens).rstrip().rpartition(b" ")[0])
    if _sorted_entries(tokenizer).span_words:
        word = 0
    ends = np.cumsum(tokenizer.byte_lengths[tokens])
    first = max(int(np.searchsorted(ends, word, side="right")), len(tokens) - LOOK_BACK)
    while True:
        context = tokens[first:]
        try:
            same = tokenizer.encode(tokenizer.decode_bytes(context).decode()).tolist() == context
        except UnicodeDecodeError:
            same = False
        if same:
            taken = min(len(tail), len(context))
            kept = len(tail) - taken
            return PromptEnd(tokenizer, context, tail[:kept], tail[kept:], most)
        if first == 0:
            return None
        first = max(0, first - LOOK_BACK // 4)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Entries:
    """The tokens of a vocabulary in the order of their bytes."""

    def __init__(self, tokenizer: Tokenizer):
        table = sorted(
            (tokenizer.decode_bytes([i]), i) for i in np.flatnonzero(tokenizer.byte_lengths).tolist()
        )
        self._bytes, self._ids = [entry for entry, _ in table], [number for _, number in table]
        self.longest = int(tokenizer.byte_lengths.max())
        self.texts: list[str | None] = [None] * tokenizer.vocab_size
        for entry, number in table:
            with suppress(UnicodeDecodeError):
                self.texts[number] = entry.decode()
        self.span_words = any(_WORDS.search(entry) for entry in self._bytes)

    def longer_than(self, start: bytes) -> list[int]:
        """Tokens that begin with `start` and have more bytes."""
        first = bisect_right(self._bytes, start)
        end = bisect_right(self._bytes, start, lo=first, key=lambda entry: entry[: len(start)])
        return self._ids[first:end]


@lru_cache(maxsize=4)
def _sorted_entries(tokenizer: Tokenizer) -> _Entries:
    return _Entries(tokenizer)
