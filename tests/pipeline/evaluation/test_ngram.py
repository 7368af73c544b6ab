"""The Kneser–Ney yardstick: against a model of dicts written down from the paper, and as a distribution."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from pipeline.data.windows import Span
from pipeline.evaluation.ngram import NgramModel

V = 6
END, BOS = V, V + 1


def windows(seed: int, number: int = 60) -> list[Span]:
    """Zipf-like texts in which a token depends on the one before."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(number):
        tokens = [int(rng.integers(V))]
        for _ in range(int(rng.integers(1, 30))):
            tokens.append(int((tokens[-1] * 2 + rng.zipf(1.6)) % V))
        found.append(Span(np.array(tokens, dtype=np.uint16), np.array([len(tokens)]), n % 3 != 0))
    return found


def stream(span: Span) -> list[int]:
    return [BOS, *map(int, span.tokens), *([END] if span.document_end else [])]


class Slow:
    """Chen and Goodman's formula, recursively, over dicts of tuples."""

    def __init__(self, spans: list[Span], order: int):
        raw = [Counter() for _ in range(order + 1)]
        before = [defaultdict(set) for _ in range(order + 1)]
        for span in spans:
            text = stream(span)
            for k in range(1, order + 1):
                for i in range(len(text) - k + 1):
                    gram = tuple(text[i : i + k])
                    raw[k][gram] += 1
                    if i:
                        before[k][gram].add(text[i - 1])
        self.order, self.counts, self.discounts = order, [{}], [[]]
        for k in range(1, order + 1):
            counts = {
                gram: count if k == order or gram[0] == BOS else len(before[k][gram])
                for gram, count in raw[k].items()
                if gram[-1] != BOS
            }
            n1, n2, n3, n4 = (sum(c == n for c in counts.values()) for n in (1, 2, 3, 4))
            if n1 and n2 and n3 and n4:
                y = n1 / (n1 + 2 * n2)
                raw_discounts = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
                discounts = [min(max(d, 0), c) for c, d in enumerate(raw_discounts)]
            else:
                discounts = [0, 0.5, 0.75, 1]
            self.counts.append(counts)
            self.discounts.append(discounts)

    def p(self, word: int, context: tuple[int, ...]) -> float:
        k = len(context) + 1
        lower = self.p(word, context[1:]) if context else 1 / (V + 1)
        after = {g[-1]: c for g, c in self.counts[k].items() if g[:-1] == context}
        total = sum(after.values())
        if not total:
            return lower
        taken = self.discounts[k]
        spare = sum(taken[min(c, 3)] for c in after.values()) / total
        count = after.get(word, 0)
        return (count - taken[min(count, 3)]) / total + spare * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_is_the_formula(order: int) -> None:
    train, held_out = windows(1), windows(2, 12)
    model, slow = NgramModel(train, V, order), Slow(train, order)
    for span in held_out:
        text = stream(span)
        expected = [slow.p(text[i], tuple(text[max(0, i - order + 1) : i])) for i in range(1, len(text))]
        np.testing.assert_allclose(model.probabilities(span), expected, rtol=1e-12)


def test_the_probabilities_of_all_symbols_sum_to_one() -> None:
    model = NgramModel(windows(1), V, 4)
    for begin in ([0], [3, 3], [1, 2, 4, 1], [5, 0, 5, 0, 5]):
        nexts = [
            model.probabilities(Span(np.array([*begin, token]), np.array([len(begin) + 1]), False))[-1]
            for token in range(V)
        ]
        end = model.probabilities(Span(np.array(begin), np.array([len(begin)]), True))[-1]
        assert sum(nexts) + end == pytest.approx(1.0, abs=1e-12)


def test_more_context_helps_where_there_is_some() -> None:
    train, held_out = windows(1, 2000), windows(2, 200)
    nats = [
        -sum(np.log(NgramModel(train, V, order).probabilities(span)).sum() for span in held_out)
        for order in (1, 2)
    ]
    assert nats[1] < 0.9 * nats[0]
