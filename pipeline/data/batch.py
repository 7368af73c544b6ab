"""The one batch type: real tokens only, no padding.

Shape suffixes: T tokens, S sentences, D document windows. Index arithmetic happens here, on the host, once
per batch; the models only gather.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.segments import Band, SegmentLayout
from pipeline.data.upload import Made, Upload, kept, to_device
from pipeline.data.windows import Span


@dataclass(frozen=True)
class ContextSpans(Made):
    """Attention across sentences: a sentence's rows also see a span of sentences before it.

    layout: one segment per sentence: the rows that it sees, then its own. source: int64 [wide rows], the
    packed row in each place. own: int64 [R], the place of every packed row in its own sentence's segment.
    needed: pairs of a row and what it may see.
    """

    layout: SegmentLayout
    source: Tensor
    own: Tensor
    needed: int


@dataclass(frozen=True)
class DecoderRows:
    """The sentence decoder's packed input: for every sentence `slots` places for the vector, BOS, tokens.

    layout: one segment per sentence, R rows. symbols_R: int64; BOS in slots, where it is unused.
    positions_R: int64, within the sentence, or within the window if sentences see earlier ones.
    slot_rows: int64 [S · slots] or None. own_rows: int64 [T+S], BOS and tokens, or None without slots.
    spans: None if a sentence sees itself only.
    """

    layout: SegmentLayout
    symbols_R: Tensor
    positions_R: Tensor
    slot_rows: Tensor | None = None
    own_rows: Tensor | None = None
    spans: ContextSpans | None = None


@dataclass(frozen=True)
class StackRows(Made):
    """The packed input of layout `stack`: a border before every sentence and one at each window's end.

    A border reads that the sentence before it has ended; a window's first one starts the document. With ends
    by rule the first one alone is a row of its own: a sentence's last token is its border, which counts from
    the next row on.

    layout: one segment per window, R = T+S+D rows; by rule T+D. token_rows_T: int64, the rows of tokens.
    target_rows_N: int64 [T+S], all but each window's last one; by rule [T+D], all. border_rows_B: int64
    [S+D], the rows of borders, in the order of the backbone's rows. border_of_row_R: int64, host, the number
    of the border whose output each row reads. first_border_R: int64, host, of the row's window.
    """

    layout: SegmentLayout
    token_rows_T: Tensor
    target_rows_N: Tensor
    border_rows_B: Tensor
    border_of_row_R: np.ndarray
    first_border_R: np.ndarray

    @cached_property
    def border_of_row(self) -> Tensor:
        """`border_of_row_R` on the device."""
        return to_device(self.border_of_row_R, self.layout.device)

    @kept
    def memory(self, last: int) -> Band:
        """What a row sees of the backbone's outputs: the last ones of its window, up to its border's."""
        first_R = np.maximum(self.border_of_row_R - last + 1, self.first_border_R)
        return Band(first_R, self.border_of_row_R, self.layout.device)

    def memories(self, last: int) -> list[Band]:
        """The same, by window: a row's bits then do not depend on the other windows."""
        first_R = np.maximum(self.border_of_row_R - last + 1, self.first_border_R)
        cuts = self.layout.starts[1:-1]
        parts = zip(np.split(first_R, cuts), np.split(self.border_of_row_R, cuts), strict=True)
        return [Band(*part, self.layout.device) for part in parts]


def stack_rows(
    lengths_S: np.ndarray,
    counts_D: np.ndarray,
    device: torch.device,
    by_rule: bool = False,
    steady: bool = False,
) -> StackRows:
    """Rows of D windows of `counts_D[d]` sentences, 0 or more, with `lengths_S[s]` tokens each; host.
    steady: of the layout."""
    first_D = np.cumsum(counts_D + 1) - (counts_D + 1)
    sizes_B = np.ones(len(lengths_S) + len(counts_D), dtype=np.int64)  # a border and the tokens behind it
    sizes_B[np.arange(len(lengths_S)) + np.repeat(np.arange(len(counts_D)), counts_D)] += lengths_S
    if by_rule:
        return _rows_by_rule(sizes_B, first_D, device, steady)
    borders_B = np.cumsum(sizes_B) - sizes_B
    layout = SegmentLayout(np.add.reduceat(sizes_B, first_D), device, steady)
    tokens_T, targets_N = (np.delete(np.arange(layout.rows), x) for x in (borders_B, layout.starts[1:] - 1))
    token_rows_T, target_rows_N, border_rows_B = (
        to_device(x, device) for x in (tokens_T, targets_N, borders_B)
    )
    border_of_row_R = np.repeat(np.arange(len(sizes_B)), sizes_B)
    first_border_R = np.repeat(first_D, layout.lengths)
    return StackRows(layout, token_rows_T, target_rows_N, border_rows_B, border_of_row_R, first_border_R)


def _rows_by_rule(sizes_B: np.ndarray, first_D: np.ndarray, device: torch.device, steady: bool) -> StackRows:
    is_first_B = np.zeros(len(sizes_B), dtype=bool)
    is_first_B[first_D] = True
    rows_B = sizes_B - ~is_first_B  # rows that read the border's output: BOS and tokens
    starts_B = np.cumsum(rows_B) - rows_B
    layout = SegmentLayout(np.add.reduceat(rows_B, first_D), device, steady)
    tokens_T = np.delete(np.arange(layout.rows), starts_B[first_D])
    borders_B = np.where(is_first_B, starts_B, starts_B - 1)
    token_rows_T, target_rows_N, border_rows_B = (
        to_device(x, device) for x in (tokens_T, np.arange(layout.rows), borders_B)
    )
    border_of_row_R = np.repeat(np.arange(len(sizes_B)), rows_B)
    first_border_R = np.repeat(first_D, layout.lengths)
    return StackRows(layout, token_rows_T, target_rows_N, border_rows_B, border_of_row_R, first_border_R)


def context_spans(
    lengths_S: np.ndarray, first_S: np.ndarray, device: torch.device, steady: bool = False
) -> ContextSpans:
    """Spans in which the `lengths_S[s]` rows of sentence s see sentences `first_S[s]` to s; int64 [S],
    host. steady: of the layout."""
    starts = np.concatenate([[0], np.cumsum(lengths_S)])
    before_S = starts[:-1] - starts[first_S]
    layout = SegmentLayout(before_S + lengths_S, device, steady)
    wide = np.repeat(starts[first_S] - layout.starts[:-1], layout.lengths) + np.arange(layout.rows)
    own = np.arange(starts[-1]) + np.repeat(layout.starts[:-1] + before_S - starts[:-1], lengths_S)
    needed = int((lengths_S * before_S + lengths_S * (lengths_S + 1) // 2).sum())
    return ContextSpans(layout, to_device(wide, device), to_device(own, device), needed)


@dataclass
class Batch(Made):
    """Packed document windows.

    tokens_T: int64 [T], all windows' tokens, back to back, on the compute device.
    cu_sentences: int64 [S+1], host: sentence s owns tokens_T[cu_sentences[s]:cu_sentences[s+1]].
    cu_documents: int64 [D+1], host, in sentences: window d owns sentences [cu_documents[d],
        cu_documents[d+1]).
    document_end_D: bool [D], host: the window ends its document (stop label 1; an end symbol for the token
        model).
    scored: False for the empty batch, run by a rank without work so that ZeRO-3's collectives match.
    before_D: int64 [D], host: a token that token models read in the start symbol's place, -1 for none.
    """

    tokens_T: Tensor
    cu_sentences: np.ndarray
    cu_documents: np.ndarray
    document_end_D: np.ndarray
    scored: bool = True
    before_D: np.ndarray | None = None
    upload: Upload | None = field(default=None, repr=False)  # what its tensors wait for
    host_tokens_T: np.ndarray | None = field(default=None, repr=False)  # of a batch on another device

    @property
    def tokens(self) -> int:
        return int(self.cu_sentences[-1])

    @property
    def sentences(self) -> int:
        return len(self.cu_sentences) - 1

    @property
    def documents(self) -> int:
        return len(self.cu_documents) - 1

    @property
    def device(self) -> torch.device:
        return self.tokens_T.device

    def digest(self) -> int:
        """CRC-32 over tokens, sentences, windows and ends of a batch on the CPU."""
        crc = 0
        for array in (self.tokens_T.numpy(), self.cu_sentences, self.cu_documents, self.document_end_D):
            crc = zlib.crc32(array.data, crc)
        return crc

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (host arrays stay on the host)."""
        if self.upload is not None:
            self.upload.start()
            return self
        return self._moved(self.tokens_T.to(device, non_blocking=True))

    def placed(self, upload: Upload) -> Batch:
        """The same batch on the device of an upload, which has not started."""
        return self._moved(upload.place(self.tokens_T), upload=upload)

    def _moved(self, tokens_T: Tensor, **changed: Any) -> Batch:
        return dataclasses.replace(self, tokens_T=tokens_T, host_tokens_T=self._tokens, **changed)

    @property
    def _tokens(self) -> np.ndarray:
        return self.tokens_T.numpy() if self.host_tokens_T is None else self.host_tokens_T

    def _index(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)

    # Layouts: what attends to what.

    @cached_property
    def sentence_layout(self) -> SegmentLayout:
        """Tokens by sentence: T rows (sentence encoder)."""
        return SegmentLayout(np.diff(self.cu_sentences), self.device)

    @cached_property
    def decoder_layout(self) -> SegmentLayout:
        """BOS + tokens by sentence: T+S rows (sentence decoder)."""
        layout = SegmentLayout(np.diff(self.cu_sentences) + 1, self.device)
        # Computed here, because decoder layers read it and torch.compile must not trace it.
        _ = layout.segment_of_row
        return layout

    @cached_property
    def backbone_layout(self) -> SegmentLayout:
        """Start position + sentences by window: S+D rows (backbone)."""
        return SegmentLayout(np.diff(self.cu_documents) + 1, self.device)

    @cached_property
    def apart_layout(self) -> SegmentLayout:
        """The same rows, where no sentence sees the start position, and the first sentence is at place 0."""
        counts_D = np.diff(self.cu_documents)
        return SegmentLayout(np.stack([np.ones_like(counts_D), counts_D], 1).reshape(-1), self.device)

    @cached_property
    def token_model_layout(self) -> SegmentLayout:
        """BOS + tokens by window: T+D rows (token-level model)."""
        return SegmentLayout(np.diff(self.cu_sentences[self.cu_documents]) + 1, self.device)

    # Sentence decoder: symbols in, symbols to predict.

    def decoder_symbols(self, bos: int, end: int) -> tuple[Tensor, Tensor]:
        """Inputs (bos, t1 … tn) and targets (t1 … tn, end) of every sentence: two int64 [T+S]."""
        return self._shifted(self.decoder_layout, bos, end)

    def decoder_rows(self, inputs_N: Tensor, bos: int, slots: int = 0, context: int = 0) -> DecoderRows:
        """The sentence decoder's input from `decoder_symbols`' inputs: `slots` places for the vector before
        BOS, and `context` earlier sentences for each."""
        layout, spans = self.slotted_layout(slots), self.context_spans(slots, context)
        positions_R = layout.position_of_row if spans is None else self._positions_in_window(slots)
        if not slots:
            return DecoderRows(layout, inputs_N, positions_R, spans=spans)
        slot_rows, own_rows = self._slot_rows(slots)
        symbols_R = torch.full((layout.rows,), bos, dtype=torch.long, device=self.device)
        symbols_R.index_copy_(0, own_rows, inputs_N)
        return DecoderRows(layout, symbols_R, positions_R, slot_rows, own_rows, spans)

    @kept
    def _positions_in_window(self, slots: int) -> Tensor:
        layout = self.slotted_layout(slots)
        window_S = layout.starts[self.cu_documents[self._window_of_sentence]]
        return self._index(np.arange(layout.rows) - np.repeat(window_S, layout.lengths))

    @kept
    def _slot_rows(self, slots: int) -> tuple[Tensor, Tensor]:
        """The decoder's rows for the vectors, and all others."""
        layout = self.slotted_layout(slots)
        is_slot_R = np.arange(layout.rows) - np.repeat(layout.starts[:-1], layout.lengths) < slots
        return self._index(np.flatnonzero(is_slot_R)), self._index(np.flatnonzero(~is_slot_R))

    @kept
    def slotted_layout(self, slots: int) -> SegmentLayout:
        """Rows of the sentence decoder: `slots` places, BOS and tokens by sentence."""
        if not slots:
            return self.decoder_layout
        layout = SegmentLayout(slots + self.decoder_layout.lengths, self.device)
        _ = layout.segment_of_row  # as for decoder_layout
        return layout

    @kept
    def context_spans(self, slots: int, context: int) -> ContextSpans | None:
        """Spans of the `context` sentences before each one; None for 0."""
        if not context:
            return None
        window_start_S = self.cu_documents[self._window_of_sentence]
        first_S = np.maximum(window_start_S, np.arange(self.sentences) - context)
        return context_spans(self.slotted_layout(slots).lengths, first_S, self.device)

    def _shifted(self, layout: SegmentLayout, bos: int, end: int) -> tuple[Tensor, Tensor]:
        rows_T = layout.rows_with_next
        inputs = torch.full((layout.rows,), bos, dtype=torch.long, device=self.device)
        targets = torch.full((layout.rows,), end, dtype=torch.long, device=self.device)
        return inputs.index_copy_(0, rows_T + 1, self.tokens_T), targets.index_copy_(0, rows_T, self.tokens_T)

    # One stack.

    @kept
    def stack_rows(self, by_rule: bool = False) -> StackRows:
        """Borders and tokens by window (layout `stack`)."""
        lengths_S, counts_D = np.diff(self.cu_sentences), np.diff(self.cu_documents)
        rows = stack_rows(lengths_S, counts_D, self.device, by_rule)
        # As for decoder_layout: torch.compile must not trace them.
        _ = rows.layout.segment_of_row, rows.layout.position_of_row
        return rows

    # Backbone: row s + d + 1 holds sentence s of window d; row s + d, just before it, predicts it.

    @cached_property
    def _window_of_sentence(self) -> np.ndarray:
        return np.repeat(np.arange(self.documents), np.diff(self.cu_documents))

    @cached_property
    def backbone_source(self) -> Tensor:
        """int64 [S+D]: gathers rows from cat(start vector [1], sentence embeddings [S])."""
        source = np.zeros(self.sentences + self.documents, dtype=np.int64)
        source[np.arange(self.sentences) + self._window_of_sentence + 1] = np.arange(self.sentences) + 1
        return self._index(source)

    @cached_property
    def predicting_row_S(self) -> Tensor:
        """int64 [S]: the backbone row that conditions the decoding of each sentence."""
        return self._index(np.arange(self.sentences) + self._window_of_sentence)

    @cached_property
    def place_S(self) -> np.ndarray:
        """int64 [S], host: the number of sentences before each one in its window."""
        return np.arange(self.sentences) - self.cu_documents[self._window_of_sentence]

    @cached_property
    def stop_label_S(self) -> Tensor:
        """float32 [S]: 1 after a document's last sentence, else 0 (also at the end of an inner window)."""
        labels = np.zeros(self.sentences, dtype=np.float32)
        labels[self.cu_documents[1:] - 1] = self.document_end_D
        return self._index(labels)

    # Token-level model.

    @kept
    def with_sentence_ends(self, end: int) -> Batch:
        """The same batch with an end symbol as the last token of every sentence."""
        tokens = np.insert(self._tokens, self.cu_sentences[1:], end)
        return dataclasses.replace(
            self,
            tokens_T=self._index(tokens),
            cu_sentences=self.cu_sentences + np.arange(self.sentences + 1),
            host_tokens_T=tokens,
        )

    def first_symbols_D(self, bos: int) -> np.ndarray:
        """int64 [D], host: what a token model reads first in each window."""
        before_D = np.full(self.documents, -1) if self.before_D is None else self.before_D
        return np.where(before_D < 0, bos, before_D)

    def token_model_symbols(self, bos: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (bos, t1 … tn) [T+D], rows with a target [T+E], their targets [T+E]; E = windows that end
        their document."""
        inputs, targets = self._shifted(self.token_model_layout, bos, end)
        if self.before_D is not None:
            inputs[self._index(self.token_model_layout.starts[:-1])] = self._index(self.first_symbols_D(bos))
        return inputs, self._token_model_rows, targets.index_select(0, self._token_model_rows)

    @cached_property
    def _token_model_rows(self) -> Tensor:
        layout = self.token_model_layout
        keep = np.ones(layout.rows, dtype=bool)
        keep[layout.starts[1:][~self.document_end_D] - 1] = False
        return self._index(np.flatnonzero(keep))


def build_batch(spans: Sequence[Span]) -> Batch:
    """Pack spans into a batch (CPU tensors)."""
    lengths = np.concatenate([s.sentence_lengths for s in spans]).astype(np.int64)
    counts = [len(s.sentence_lengths) for s in spans]
    tokens = np.concatenate([s.tokens for s in spans]).astype(np.int64)
    before = np.asarray([-1 if s.before is None else s.before for s in spans])
    return Batch(
        torch.from_numpy(tokens),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.asarray([s.document_end for s in spans], dtype=bool),
        before_D=before if (before >= 0).any() else None,
    )


def empty_batch() -> Batch:
    """One unscored token, for a rank without a bin."""
    one = np.ones(1, dtype=np.int64)
    batch = build_batch([Span(np.zeros(1, dtype=np.int64), one, True)])
    batch.scored = False
    return batch
