"""Sums per document and per group, and the figures made of them (docs/evaluation.md).

There is one row of sums (nats in float64, and counts) per document and per group of sentences (by
length, by position in the document). Every figure is a ratio of such sums, divided once. Rows of several
ranks are merged by document number and added in that order, so the split over ranks changes nothing but the
rounding inside the model (other packing: relative 1e-6).

Intervals are a bootstrap over whole documents, because sentences of one document are not independent: drawn
with replacement, `RESAMPLES` times from a fixed seed; the 2.5 and 97.5 % quantiles of the ratio of sums. They
cover the choice of the text, not training seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.data.batch import Batch
from pipeline.data.windows import Span, document_spans
from pipeline.evaluation.controls import SHUFFLES, replacements
from pipeline.evaluation.ngram import NgramModel
from pipeline.evaluation.reconstruction import edit_distances, rebuild
from pipeline.models.losses import bits_per_byte, perplexity
from pipeline.models.sentence_vae import SentenceVAE

RESAMPLES, SEED, LEVEL = 1000, 0, 0.95

# Columns of a row: nats of tokens, ends, stop decisions; nats of all without sentence vectors; counts; tokens
# before each token in its window, summed; nats of the n-gram model; then, for each of `SHUFFLES`, nats lost,
# and bytes of the sentences with other vectors.
TOKEN, END, STOP, WITHOUT, BYTES, TOKENS, SENTENCES, WINDOWS, SEEN, NGRAM, LOST = range(11)
NATS = slice(TOKEN, STOP + 1)
GIVEN = LOST + len(SHUFFLES)
COLUMNS = GIVEN + len(SHUFFLES)


@dataclass(frozen=True)
class Window:
    """A window of a document: content, the document's number, and the number of sentences before it.

    donor: a window of another document (`controls`). context: leading sentences that are not scored.
    """

    span: Span
    document: int = 0
    first_sentence: int = 0
    source: str = ""
    language: str = ""
    donor: Span | None = None
    context: int = 0


def document_windows(
    tokens_T: np.ndarray,
    lengths_S: np.ndarray,
    window_tokens: int,
    document: int,
    source: str,
    language: str,
    donors: Sequence[Span | None] = (None,),
) -> Iterable[Window]:
    """A whole document's windows, in order. donors: the windows of another document."""
    first = 0
    for number, span in enumerate(document_spans(tokens_T, lengths_S, window_tokens)):
        yield Window(span, document, first, source, language, donors[number % len(donors)])
        first += len(span.sentence_lengths)


def bucket(number: int) -> str:
    """Group of a length or a position, from 1: "1", "2", "3-4", "5-8", … (powers of two)."""
    end = 1 << (number - 1).bit_length()
    return str(number) if end <= 2 else f"{end // 2 + 1}-{end}"


def interval(numerator_D: np.ndarray, denominator_D: np.ndarray) -> list[float] | None:
    """[low, high] of Σ numerator / Σ denominator by document bootstrap; None for fewer than two documents."""
    count = len(numerator_D)
    if count < 2 or not denominator_D.any():
        return None
    rng = np.random.default_rng(SEED)
    ratios = np.empty(RESAMPLES)
    for n in range(RESAMPLES):
        drawn = rng.integers(0, count, count)
        ratios[n] = numerator_D[drawn].sum() / max(denominator_D[drawn].sum(), 1)
    return np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def _per_byte(nats: float, text_bytes: float) -> float | None:
    return bits_per_byte(float(nats), float(text_bytes)) if text_bytes else None


def _ngram_nats(ngram: NgramModel, span: Span) -> np.ndarray:
    """float64 [S]: an n-gram model's nats of every sentence, a document's end in its last one."""
    nats_N = -np.log(ngram.probabilities(span))
    lengths_S = span.sentence_lengths.astype(np.int64)
    return np.add.reduceat(nats_N, np.cumsum(lengths_S) - lengths_S)


@dataclass
class Scores:
    """Sums over documents: `add` batches, `merge` other ranks, then `figures`."""

    kind: str  # sllm | vae | lm
    controls: bool = True  # also score with other sentence vectors (sllm)
    rows: dict[int, np.ndarray] = field(default_factory=dict)  # document → float64 [COLUMNS]
    labels: dict[int, tuple[str, str]] = field(default_factory=dict)  # document → sub-corpus, language
    by_length: dict[str, np.ndarray] = field(default_factory=dict)  # group → float64 [COLUMNS]
    by_position: dict[str, np.ndarray] = field(default_factory=dict)
    sentences_of_length: Counter[int] = field(default_factory=Counter)  # vae
    exact_of_length: Counter[int] = field(default_factory=Counter)
    edits_of_length: Counter[int] = field(default_factory=Counter)

    @torch.inference_mode()
    def add(
        self,
        model: torch.nn.Module,
        batch: Batch,
        windows: Sequence[Window],
        byte_lengths: np.ndarray,
        ngram: NgramModel | None = None,
    ) -> tuple[float, int]:
        """Score one batch, made of `windows`; returns its nats and bytes. `byte_lengths`: int [V], the
        tokenizer's UTF-8 bytes per token."""
        losses = model(batch, want_correct=True) if self.kind == "vae" else model(batch)
        lengths_S = np.diff(batch.cu_sentences)
        symbols_S = lengths_S + 1  # targets of each sentence: its tokens and its end
        # Without stop decisions a document has an end, a sentence if the model sees its end.
        if self.kind != "vae" and losses.stop_nll_S is None:
            symbols_S = lengths_S + getattr(model, "sentence_ends", False)
            symbols_S[batch.cu_documents[1:] - 1] += batch.document_end_D
        sentence_N = np.repeat(np.arange(batch.sentences), symbols_S)

        def per_sentence(nll_N: torch.Tensor, counted_N: np.ndarray | None = None) -> np.ndarray:
            nll = nll_N.double().cpu().numpy()
            if counted_N is not None:
                nll = np.where(counted_N, nll, 0.0)
            return np.bincount(sentence_N, nll, batch.sentences)

        is_end_N = losses.is_end_N.cpu().numpy()
        sums = np.zeros((batch.sentences, COLUMNS))
        sums[:, TOKEN] = per_sentence(losses.target_nll_N, ~is_end_N)
        sums[:, END] = per_sentence(losses.target_nll_N, is_end_N)
        if losses.stop_nll_S is not None:
            sums[:, STOP] = losses.stop_nll_S.double().cpu().numpy()
        token_bytes = byte_lengths[batch.tokens_T.cpu().numpy()]
        sums[:, BYTES] = np.add.reduceat(token_bytes, batch.cu_sentences[:-1])
        sums[:, TOKENS], sums[:, SENTENCES] = lengths_S, 1
        cuts, first_S = batch.cu_sentences, np.arange(batch.sentences) - batch.place_S
        sums[:, SEEN] = lengths_S * (cuts[:-1] - cuts[first_S]) + lengths_S * (lengths_S - 1) // 2
        if batch.before_D is not None:
            sums[:, SEEN] += lengths_S * np.repeat(batch.before_D >= 0, np.diff(batch.cu_documents))
        sums[batch.cu_documents[1:] - 1, WINDOWS] = 1
        if self.kind == "sllm" and self.controls:
            own = sums[:, TOKEN] + sums[:, END]
            given = replacements(model, batch, [window.donor for window in windows])
            for column, (vectors, there_S) in enumerate(given, start=-1):
                nats = per_sentence(model(batch, vectors_Sd=vectors).target_nll_N) if there_S.any() else own
                if column < 0:
                    # Stop decisions do not involve the decoder, so they are the same without vectors.
                    sums[:, WITHOUT] = nats + sums[:, STOP]
                else:
                    sums[:, LOST + column] = np.where(there_S, nats - own, 0)
                    sums[:, GIVEN + column] = np.where(there_S, sums[:, BYTES], 0)
        if ngram is not None:
            sums[:, NGRAM] = np.concatenate([_ngram_nats(ngram, window.span) for window in windows])
        unscored = batch.place_S < np.repeat([w.context for w in windows], np.diff(batch.cu_documents))
        sums[unscored] = 0
        self._file(sums, batch, windows, lengths_S)
        if self.kind == "vae":
            self._count_exact(model, batch, losses.target_correct_N, lengths_S)
        return float(sums[:, NATS].sum()), int(sums[:, BYTES].sum())

    def _file(self, sums: np.ndarray, batch: Batch, windows: Sequence[Window], lengths_S: np.ndarray) -> None:
        for window, first, end in zip(windows, batch.cu_documents, batch.cu_documents[1:], strict=False):
            row = self.rows.setdefault(window.document, np.zeros(COLUMNS))
            row += sums[first:end].sum(0)
            self.labels[window.document] = (window.source, window.language)
        # A new group starts after every power of two.
        places = [w.first_sentence + 1 + np.arange(len(w.span.sentence_lengths)) for w in windows]
        for groups, number_S in ((self.by_length, lengths_S), (self.by_position, np.concatenate(places))):
            group_S = np.ceil(np.log2(number_S)).astype(int)
            for group in np.unique(group_S):
                row = groups.setdefault(bucket(1 << int(group)), np.zeros(COLUMNS))
                row += sums[group_S == group].sum(0)

    def _count_exact(
        self, model: torch.nn.Module, batch: Batch, correct_N: torch.Tensor, lengths_S: np.ndarray
    ) -> None:
        # Greedy decoding returns a sentence exactly if the arg max is right at every symbol, its end
        # included: up to the first error the decoder gets the same input as in teacher forcing. Only
        # sentences with an error must be decoded.
        assert isinstance(model, SentenceVAE)
        wrong_S = torch.zeros(batch.sentences, dtype=torch.int64, device=batch.device)
        wrong_S.index_add_(0, batch.decoder_layout.segment_of_row, (~correct_N).long())
        exact_S = (wrong_S == 0).cpu().numpy()
        self.sentences_of_length.update(lengths_S.tolist())
        self.exact_of_length.update(lengths_S[exact_S].tolist())
        wrong = np.flatnonzero(~exact_S)
        if len(wrong):
            sentences = np.split(batch.tokens_T.cpu().numpy(), batch.cu_sentences[1:-1])
            edits = edit_distances([sentences[s] for s in wrong], rebuild(model, batch, wrong))
            for length, count in zip(lengths_S[wrong].tolist(), edits.tolist(), strict=True):
                self.edits_of_length[length] += count

    def merge(self, other: Scores) -> None:
        """Add another rank's documents; none of them may be here already."""
        self.rows |= other.rows
        self.labels |= other.labels
        for ours, theirs in (
            (self.by_length, other.by_length),
            (self.by_position, other.by_position),
        ):
            for name, row in theirs.items():
                ours[name] = ours.get(name, 0.0) + row
        self.sentences_of_length += other.sentences_of_length
        self.exact_of_length += other.exact_of_length
        self.edits_of_length += other.edits_of_length

    def by_document(self) -> dict[str, list[float]]:
        """Nats and bytes of every document, by its number: for differences of two models on the same ones."""
        rows = [self.rows[number] for number in sorted(self.rows)]
        return {
            "nats": [round(float(row[NATS].sum()), 4) for row in rows],
            "bytes": [int(row[BYTES]) for row in rows],
        }

    def figures(self) -> dict:
        """All figures of the sums so far. Needs at least one scored token."""
        numbers = sorted(self.rows)
        rows_D = np.stack([self.rows[number] for number in numbers])
        total = rows_D.sum(0)
        nats = float(total[NATS].sum())
        figures = {
            "measures": "reconstruction" if self.kind == "vae" else "prediction",
            **self._of(total),
            "nll_nats": nats,
            "token_nll_nats": float(total[TOKEN]),
            "end_nll_nats": float(total[END]),
            "stop_nll_nats": float(total[STOP]),
            "documents": len(rows_D),
            "windows": int(total[WINDOWS]),
            **self._intervals(rows_D),
            "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "of": "documents"},
        }
        if self.kind == "vae":
            figures |= self._rebuilt(nats, total)
        for name, column in (("by_source", 0), ("by_language", 1)):
            labels = np.array([self.labels[number][column] for number in numbers])
            figures[name] = {}
            for label in np.unique(labels):
                mine = rows_D[labels == label]
                group = {**self._of(mine.sum(0)), "documents": len(mine), **self._intervals(mine)}
                figures[name][str(label)] = group
        for name, groups in (
            ("by_sentence_length", self.by_length),
            ("by_sentence_position", self.by_position),
        ):
            ordered = sorted(groups, key=lambda group: int(group.split("-")[0]))
            figures[name] = {group: self._of(groups[group]) for group in ordered}
        return figures

    def _of(self, row: np.ndarray) -> dict:
        """Figures of one row of sums; None if a group has no bytes."""
        nats = float(row[NATS].sum())
        counts = {"bytes": int(row[BYTES]), "tokens": int(row[TOKENS]), "sentences": int(row[SENTENCES])}
        figures = {name: _per_byte(*pair) for name, pair in self._ratios(row).items()}
        return {**figures, "ppl": perplexity(nats, row[TOKENS]), **counts}

    def _ratios(self, rows: np.ndarray) -> dict[str, tuple[Any, Any]]:
        """Figures in bits per byte as (nats, bytes), of one row or of many [D, COLUMNS]."""
        nats, size = rows[..., NATS].sum(-1), rows[..., BYTES]
        found = {"bits_per_byte": (nats, size)}
        if rows[..., NGRAM].any():
            found["ngram_bits_per_byte"] = rows[..., NGRAM], size
        if self.kind == "sllm" and self.controls:
            without = rows[..., WITHOUT]
            found |= {"bits_per_byte_without_vectors": (without, size), "vector_gain": (without - nats, size)}
            for n, name in enumerate(SHUFFLES):
                found[f"{name}_gain"] = rows[..., LOST + n], rows[..., GIVEN + n]
        return found

    def _intervals(self, rows_D: np.ndarray) -> dict:
        bits = bits_per_byte(1.0, 1.0)
        return {
            f"{name}_interval": interval(nats_D * bits, bytes_D)
            for name, (nats_D, bytes_D) in self._ratios(rows_D).items()
            if name != "bits_per_byte_without_vectors"
        }

    def _rebuilt(self, nats: float, total: np.ndarray) -> dict:
        by_length = {
            str(length): {
                "sentences": count,
                "exact_match": self.exact_of_length[length] / count,
                "edit_distance": self.edits_of_length[length] / (count * length),
            }
            for length, count in sorted(self.sentences_of_length.items())
        }
        return {
            "cross_entropy": nats / float(total[TOKENS] + total[SENTENCES]),
            "exact_match": self.exact_of_length.total() / int(total[SENTENCES]),
            "edit_distance": self.edits_of_length.total() / int(total[TOKENS]),
            "exact_match_by_length": by_length,
        }
