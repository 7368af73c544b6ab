"""`sllm evaluate --context-curve`: the loss of the same sentences, given more and more tokens before them.

The targets are all sentences with the longest context before them in their document. For a context of C
tokens they are scored in blocks of at most C/4 tokens, or one sentence, each block in a window of its own
after the fewest whole sentences that have C tokens. So every target has at least C tokens before it, and at
most C/4 and two sentences more. The differences between contexts are of the same targets, by document.

With blocks of B tokens (`--context-block`, `--context-blocks`) the targets of a document are its first
blocks behind the longest context: B tokens each, or for models that read sentences the fewest whole ones with
B. Every context scores a block in one window, so a target has C tokens before it and those of its block.
Nothing else is scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_prep.common.errors import UserError, counted
from data_prep.text.running_ends import RunningEnds
from pipeline.data.windows import Span
from pipeline.evaluation.scores import BYTES, NATS, SEEN, TOKENS, Scores, Window, interval
from pipeline.models.losses import bits_per_byte
from pipeline.parallel.ranks import Ranks


def require_room(
    contexts: Sequence[int], longest_sentence: int, window_tokens: int, block: int | None = None
) -> None:
    """Raise UserError for a context that the model's windows of `window_tokens` do not hold."""
    for context in contexts:
        needed = context + longest_sentence + max(block or context // 4, longest_sentence)
        if needed > window_tokens:
            raise UserError(
                f"--context-curve {context}: needs windows of up to {counted(needed, 'token')}, "
                f"but the model's are of {window_tokens}: leave it out, or evaluate with a larger "
                "--window-tokens"
            )


def curve_windows(
    documents: Iterable[tuple[np.ndarray, np.ndarray, str, str]],
    contexts: Sequence[int],
    ranks: Ranks,
    block: int | None = None,
    blocks: int = 1,
    by_token: bool = False,
    rule: RunningEnds | None = None,
    start_symbol: bool = True,
) -> Iterator[Window]:
    """The windows of all contexts, of this rank's documents. Their `document` is the document's number ·
    contexts + the context's index.

    block: tokens of each of the `blocks` of targets of a document. by_token: these and their contexts are cut
    between any tokens. rule: cuts the documents again. start_symbol: whether a context has one before it;
    without it, a token model starts with the context's first token.
    """
    for number, (tokens_T, lengths_S, source, language) in enumerate(documents):
        if number % ranks.world != ranks.rank:
            continue
        if rule is not None:
            lengths_S = rule.cut(tokens_T)
        if block and by_token:
            lengths_S = _cut_at(len(tokens_T), contexts, block, blocks)
        ends = np.concatenate([[0], np.cumsum(lengths_S, dtype=np.int64)])
        begin = int(np.searchsorted(ends, max(contexts)))
        if block:
            for _ in range(blocks):
                end = int(np.searchsorted(ends, ends[begin] + block)) if begin < len(ends) else len(ends)
                if end == len(ends):  # too short
                    break
                for index, context in enumerate(contexts):
                    before = int(np.searchsorted(ends, ends[begin] - context, side="right")) - 1
                    tokens, lengths = tokens_T[ends[before] : ends[end]], lengths_S[before:end]
                    span, left = Span(tokens, lengths, end == len(lengths_S)), begin - before
                    if not start_symbol:
                        kept = int(lengths[0] == 1)  # the part is empty without its first token
                        lengths = np.concatenate([[lengths[0] - 1], lengths[1:]])[kept:]
                        span, left = replace(span, tokens=tokens[1:], sentence_lengths=lengths), left - kept
                        span = replace(span, before=int(tokens[0]))
                    key = number * len(contexts) + index
                    yield Window(span, key, before, source, language, context=left)
                begin = end
            continue
        for index, context in enumerate(contexts):
            first = begin
            while first < len(lengths_S):
                most = ends[first] + max(context // 4, lengths_S[first])
                end = int(np.searchsorted(ends, most, side="right")) - 1
                before = int(np.searchsorted(ends, ends[first] - context, side="right")) - 1
                tokens = tokens_T[ends[before] : ends[end]]
                span = Span(tokens, lengths_S[before:end], end == len(lengths_S))
                key = number * len(contexts) + index
                yield Window(span, key, before, source, language, context=first - before)
                first = end


def _cut_at(tokens: int, contexts: Sequence[int], block: int, blocks: int) -> np.ndarray:
    """Lengths of the parts of a document, which is cut before every block and each of its contexts."""
    starts = max(contexts) + block * np.arange(blocks + 1)
    cuts = sorted({int(start - context) for start in starts for context in (0, *contexts)})
    return np.diff([0, *(cut for cut in cuts if 0 < cut < tokens), tokens])


def longest_context(scores: Scores, contexts: Sequence[int]) -> Scores:
    """The sums of the longest context alone, by document."""
    found = Scores(scores.kind, controls=False)
    for key, row in scores.rows.items():
        document, index = divmod(key, len(contexts))
        if index == len(contexts) - 1:
            found.rows[document], found.labels[document] = row, scores.labels[key]
    return found


def curve_figures(scores: Scores, contexts: Sequence[int]) -> dict[str, Any] | None:
    """Of every context (ascending): `bits_per_byte`, `lost` (how much more than with the longest one), and
    the mean number of tokens before a target. None if no document is long enough."""
    if not scores.rows:
        return None
    keys = sorted(scores.rows)
    rows_CD = [
        np.stack([scores.rows[key] for key in keys if key % len(contexts) == c]) for c in range(len(contexts))
    ]
    nats_CD = [rows[:, NATS].sum(1) for rows in rows_CD]
    bytes_D, bit = rows_CD[0][:, BYTES], bits_per_byte(1.0, 1.0)
    best = nats_CD[-1]
    figures: dict[str, Any] = {"bytes": int(bytes_D.sum()), "tokens": int(rows_CD[0][:, TOKENS].sum())}
    figures |= {"documents": len(bytes_D), "contexts": {}}
    for context, rows_D, nats_D in zip(contexts, rows_CD, nats_CD, strict=True):
        figures["contexts"][str(context)] = {
            "mean_context": float(rows_D[:, SEEN].sum() / rows_D[:, TOKENS].sum()),
            "bits_per_byte": bits_per_byte(float(nats_D.sum()), float(bytes_D.sum())),
            "bits_per_byte_interval": interval(nats_D * bit, bytes_D),
            "lost": bits_per_byte(float((nats_D - best).sum()), float(bytes_D.sum())),
            "lost_interval": interval((nats_D - best) * bit, bytes_D),
        }
    return figures
