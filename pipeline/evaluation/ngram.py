"""`sllm ngram`: a Kneser–Ney n-gram model, the lower bar for a trained token-level baseline.

It reads windows as the token-level model does (BOS, t1 … tn, and the document's end if it is in the window)
and scores the same targets as `sllm evaluate`, so the figures compare. Interpolated modified Kneser–Ney with
three discounts per order (Chen and Goodman 1999, §3.1 and §4); the last step is interpolated with the uniform
distribution over the vocabulary and the end symbol. Counts are sorted arrays: 20 M tokens at order 5 take
4.5 GB and a minute.

Every n-gram of order k has a number: the index of (number of its first k - 1 tokens, last token) in a sorted
array. n-grams do not cross a window's start, which BOS marks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.common.environment import header
from data_prep.common.errors import UserError, counted
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import Tokenizer
from pipeline.data.plan import BinPlan
from pipeline.data.windows import Span, document_spans
from pipeline.models.losses import bits_per_byte, perplexity

# Of the small recipes: `train_tokens` are the first ones that such a run sees.
BIN_TOKENS, SEED = 2048, 1
LONGEST = 20  # order; each one takes as much memory again


@dataclass
class _Order:
    """The n-grams of one order. keys: int64 [G], sorted, (context number · symbols + last token);
    discounted: float64 [G], max(count - discount, 0) over the context's total; spare: float64 by context
    number, the weight that the next lower order gets."""

    keys: np.ndarray
    discounted: np.ndarray
    spare: np.ndarray


class NgramModel:
    """Trained by its constructor on the windows `spans`. It predicts V + 1 symbols: the `vocabulary` tokens
    and the end of a document."""

    def __init__(self, spans: Iterable[Span], vocabulary: int, order: int = 5):
        _require_order(order)
        self.vocabulary = vocabulary
        self._symbols = vocabulary + 2  # tokens, end (V), BOS (V + 1), which is never predicted
        symbols, ages = self._stream(spans)
        if not len(symbols):
            raise UserError("nothing to count: these shards hold no text")
        self.tokens = int((symbols < vocabulary).sum())
        self._orders: list[_Order] = []
        # grams[i]: number of the n-gram that ends at position i, -1 if it would start before its window.
        grams = np.zeros(len(symbols), dtype=np.int64)
        found = []
        for k in range(1, order + 1):
            before = np.concatenate([[-1], grams[:-1]]) if k > 1 else grams
            valid = (ages >= k - 1) & (before >= 0)
            keys, first, grams_valid, counts = np.unique(
                before[valid] * self._symbols + symbols[valid],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            grams = np.full(len(symbols), -1, dtype=np.int64)
            grams[valid] = grams_valid
            found.append((keys, np.flatnonzero(valid)[first], grams, counts))
        for k, (keys, first, grams, counts) in enumerate(found, start=1):
            if k < order:
                # The number of different symbols before it; at the start of a window its count.
                adjusted = np.bincount(grams[found[k][1]], minlength=len(keys))
                at_start = ages[first] == k - 1
                adjusted[at_start] = counts[at_start]
            else:
                adjusted = counts
            self._orders.append(self._smooth(keys, adjusted))

    def _smooth(self, keys: np.ndarray, counts: np.ndarray) -> _Order:
        last = keys % self._symbols
        counts = np.where(last == self._symbols - 1, 0, counts)  # BOS is never predicted
        contexts = keys // self._symbols
        number = int(contexts[-1]) + 1
        n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            discounts = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            discounts = [min(max(d, 0.0), float(c)) for c, d in enumerate(discounts)]
        else:  # too little text for the estimates
            discounts = [0.0, 0.5, 0.75, 1.0]
        taken = np.array(discounts)[np.minimum(counts, 3)]
        totals = np.bincount(contexts, weights=counts, minlength=number)
        spare: np.ndarray = np.bincount(contexts, weights=taken, minlength=number)
        known = totals > 0
        spare[known] /= totals[known]
        spare[~known] = 1.0
        totals[~known] = 1.0
        return _Order(keys, (counts - taken) / totals[contexts], spare)

    def _stream(self, spans: Iterable[Span]) -> tuple[np.ndarray, np.ndarray]:
        """All windows back to back, each preceded by BOS; and each symbol's index in its window."""
        symbols, ages = [], []
        for span in spans:
            end = [self.vocabulary] if span.document_end else []
            window = np.concatenate([[self.vocabulary + 1], span.tokens, end]).astype(np.int64)
            symbols.append(window)
            ages.append(np.arange(len(window)))
        if not symbols:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(symbols), np.concatenate(ages)

    def probabilities(self, span: Span) -> np.ndarray:
        """float64 [N]: of every token of the window, and of the document's end if it ends here, each given
        the symbols before it in the window."""
        symbols, ages = self._stream([span])
        p = np.full(len(symbols), 1.0 / (self.vocabulary + 1))
        # The number of each position's context of k - 1 symbols.
        before = np.zeros(len(symbols), dtype=np.int64)
        for k, order in enumerate(self._orders, start=1):
            usable = (ages >= k - 1) & (before >= 0)
            rows = np.flatnonzero(usable)
            contexts = before[rows]
            seen = contexts < len(order.spare)  # false for a context that occurs at window ends only
            rows, contexts = rows[seen], contexts[seen]
            keys = contexts * self._symbols + symbols[rows]
            place = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            hit = order.keys[place] == keys
            p[rows] = order.spare[contexts] * p[rows] + np.where(hit, order.discounted[place], 0.0)
            grams = np.full(len(symbols), -1, dtype=np.int64)
            grams[rows[hit]] = place[hit]
            before = np.concatenate([[-1], grams[:-1]])
        return p[1:]


def count_shards(
    shards: str | Path, tokenizer: Tokenizer, window_tokens: int, tokens: int | None = None, order: int = 5
) -> NgramModel:
    """The model of a shard set's windows, of all or the first `tokens` in training order.

    Raises: UserError for shards made with another tokenizer.
    """
    shard_set = ShardSet.open(shards)
    if shard_set.tokenizer().fingerprint != tokenizer.fingerprint:
        raise UserError(f"{shards}: made with another tokenizer than that of the scored text")
    return count_plan(
        BinPlan([shard_set], window_tokens, max(window_tokens, BIN_TOKENS), SEED), tokens, order
    )


def count_plan(plan: BinPlan, tokens: int | None = None, order: int = 5) -> NgramModel:
    """The model of one epoch of a run's windows, or of the first `tokens` tokens."""
    drawn = (span for one in plan.epoch() for span in plan.spans(one))
    return NgramModel(_first(drawn, tokens), plan.shard_sets[0].tokenizer().vocab_size, order)


def run(
    shards: str, validation: str, order: int, window_tokens: int, train_tokens: int | None = None
) -> dict[str, object]:
    """Count `shards` (all, or the first `train_tokens` in training order) and score `validation`; figures as
    those of `sllm evaluate`.

    Raises: UserError for shards made with different tokenizers, or without text.
    """
    _require_order(order)
    made = header(("numpy",))
    started = time.perf_counter()
    ours, theirs = ShardSet.open(shards), ShardSet.open(validation)
    tokenizer = ours.tokenizer()
    if tokenizer.fingerprint != theirs.tokenizer().fingerprint:
        raise UserError(f"{validation}: made with another tokenizer than {shards}: shard it with the same")
    model = count_shards(shards, tokenizer, window_tokens, train_tokens, order)
    token_nats = end_nats = 0.0
    text_bytes = tokens = documents = 0
    scored = (document_spans(d.tokens, d.sentence_lengths, window_tokens) for d in theirs.documents())
    for span in chain.from_iterable(scored):
        nats = -np.log(model.probabilities(span))
        token_nats += float(nats[: len(span.tokens)].sum())
        end_nats += float(nats[len(span.tokens) :].sum())
        text_bytes += int(tokenizer.byte_lengths[span.tokens].sum())
        tokens += len(span.tokens)
        documents += span.document_end
    if not tokens:
        raise UserError(f"{validation}: nothing to evaluate, it holds no text")
    return {
        **made,
        "shards": shards,
        "data": validation,
        "order": order,
        "window_tokens": window_tokens,
        "trained_tokens": model.tokens,
        "bits_per_byte": bits_per_byte(token_nats + end_nats, text_bytes),
        "ppl": perplexity(token_nats + end_nats, tokens),
        "token_nll_nats": token_nats,
        "end_nll_nats": end_nats,
        "bytes": text_bytes,
        "tokens": tokens,
        "documents": documents,
        "seconds": round(time.perf_counter() - started, 3),
    }


def format_result(result: dict) -> str:
    """The result as one line."""
    return (
        f"Kneser–Ney, order {result['order']}, counted on {counted(result['trained_tokens'], 'token')}: "
        f"{result['bits_per_byte']:.4f} bits per byte, perplexity {result['ppl']:.4g} on "
        f"{counted(result['tokens'], 'token')} of {result['data']} ({result['seconds']:.0f} s)"
    )


def _require_order(order: int) -> None:
    if not 1 <= order <= LONGEST:
        raise UserError(f"--order {order}: must be from 1 to {LONGEST}")


def _first(spans: Iterator[Span], tokens: int | None) -> Iterator[Span]:
    """Whole windows until `tokens` are reached."""
    left = math.inf if tokens is None else tokens
    for span in spans:
        if left <= 0:
            return
        left -= len(span.tokens)
        yield span
