"""The choice of the next symbols: what a row may choose, the repetition penalty, a guide's say, sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.protocol import Guide, SentenceModel
from pipeline.generation.replay import Replay, bucket, static_shapes
from pipeline.generation.results import Limits
from pipeline.generation.row import Draws, Row
from pipeline.generation.sampling import (
    Plan,
    Sampling,
    choose,
    choose_by,
    controls,
    penalise,
    penalise_by,
    reads_freely,
)
from pipeline.generation.upload import upload


def ends_by_rule(config: Any) -> bool:
    """Whether no symbol ends a sentence of a model with this config: a rule does, or the document's end."""
    return getattr(config, "ends", None) in ("rule", "document")


class Choice:
    """Chooses for the texts in `rows`, the writer's own list.

    bias_V: float32 [V], added to all logits: -inf at symbols that are in no text."""

    def __init__(
        self,
        model: SentenceModel,
        tokenizer: Tokenizer,
        limits: Limits,
        rows: list[Row | None],
        guide: Guide | None,
    ) -> None:
        config = model.config
        self._rows, self._guide, self._exactly = rows, guide, limits.sentence_tokens
        self._end, self._by_rule = config.eos_token_id, ends_by_rule(config)
        # Control symbols have no bytes; embedding rows above the tokenizer's entries are untrained.
        forbidden_V = np.ones(config.vocab_size, dtype=bool)
        forbidden_V[: tokenizer.vocab_size] = tokenizer.byte_lengths == 0
        forbidden_V[[config.bos_token_id, config.pad_token_id]] = True
        forbidden_V[self._end] = False
        self.bias_V = upload(np.where(forbidden_V, np.float32(-np.inf), np.float32(0)), model.device)
        endless_V = self.bias_V.clone()
        endless_V[self._end] = -torch.inf
        self._bias_2V = torch.stack([self.bias_V, endless_V])
        self._seen_RV: torch.Tensor | None = None  # made for the first row with a repetition penalty
        self._unseen: list[tuple[int, int]] = []  # rows and tokens noted since the last choice
        self._plan = Plan()  # grows with the rows' settings, so that few graphs are captured
        self._replay = Replay(self._run_static, model.device) if static_shapes(model.device) else None

    def forget(self, at: int) -> None:
        """A new text starts in a row: the repetition penalty knows none of its tokens."""
        if self._seen_RV is None:
            size = len(self._rows), self.bias_V.shape[0]
            self._seen_RV = torch.zeros(size, dtype=torch.bool, device=self.bias_V.device)
        self._unseen = [pair for pair in self._unseen if pair[0] != at]
        self._seen_RV[at] = False

    def note(self, at: int, tokens: list[int]) -> None:
        """The repetition penalty lowers these tokens in a row's later choices; after `forget`."""
        self._unseen += [(at, token) for token in tokens]

    def _see(self) -> torch.Tensor:
        """bool [R, V]: tokens of the rows' texts, and those noted since the last choice."""
        assert self._seen_RV is not None
        if self._unseen:
            rows, tokens = upload(np.asarray(self._unseen).T, self.bias_V.device)
            self._seen_RV[rows, tokens] = True
            self._unseen = []
        return self._seen_RV

    def _seen(self, at_n: np.ndarray) -> torch.Tensor:
        """The same of some rows, [n, V]; no row without a penalty reads it."""
        seen_RV = self._see()
        whole = len(at_n) == len(self._rows)
        return seen_RV if whole else seen_RV[upload(at_n, self.bias_V.device)]

    def choose(
        self,
        at_n: np.ndarray,
        logits_nV: torch.Tensor,
        bias_V: torch.Tensor | None = None,
        draws: Draws | None = None,
    ) -> tuple[list[int], list[float]]:
        """One symbol per row, and its log-probability without temperature, all rows in one go and with one
        wait for the device. `bias_V`: added to the logits; `draws`: in place of the rows' own."""
        rows: list[Row] = [self._rows[at] for at in at_n.tolist()]  # type: ignore[misc]
        exactly, device = self._exactly, logits_nV.device
        settings = [row.sampling for row in rows]
        if all(one is settings[0] for one in settings):
            settings = settings[:1]
        # An empty sentence does not exist in training.
        endless = [exactly is not None or not row.tokens for row in rows]
        ends = [
            row.closing or exactly is not None and len(row.tokens) == exactly and not self._by_rule
            for row in rows
        ]
        drawn = [0.0 if row.closing or row.sampling.greedy else (draws or row.draws).double() for row in rows]
        if self._replay is not None and self._guide is None and bias_V is None:
            return self._choose_static(at_n, logits_nV, [drawn, endless, ends], settings)
        allowed_nV = logits_nV
        if any(one.repetition_penalty != 1 for one in settings):
            allowed_nV = penalise(allowed_nV, self._seen(at_n), settings)
        if bias_V is not None:
            allowed_nV = allowed_nV + bias_V
        given_3n = None
        if any(drawn) or any(ends) or any(endless) != all(endless):
            given_3n = upload(np.asarray([drawn, endless, ends], dtype=np.float64), device)
        if given_3n is None or all(endless) or not any(endless):
            allowed_nV = allowed_nV + self._bias_2V[int(endless[0])]
        else:
            allowed_nV = allowed_nV + self._bias_2V[given_3n[1].long()]
        if self._guide is not None:
            pairs = zip(rows, allowed_nV, strict=True)
            adjusted = [x if row.closing else self._guide.adjust(row.request.number, x) for row, x in pairs]
            allowed_nV = torch.stack(adjusted)
        symbol_n = choose(allowed_nV, None if given_3n is None else given_3n[0], settings)
        if given_3n is not None and any(ends):
            symbol_n = symbol_n.masked_fill(given_3n[2] > 0, self._end)
        chosen_n = logits_nV.log_softmax(-1).gather(1, symbol_n.unsqueeze(1)).squeeze(1)
        if reads_freely(device):
            return symbol_n.tolist(), chosen_n.tolist()
        # Symbols below 2^24 are exact in float32.
        found = torch.cat((symbol_n, chosen_n)).tolist()
        return [int(symbol) for symbol in found[: len(rows)]], found[len(rows) :]

    def _choose_static(
        self, at_n: np.ndarray, logits_nV: torch.Tensor, given: list[list], settings: list[Sampling]
    ) -> tuple[list[int], list[float]]:
        """`choose` for a device that replays graphs; there all of this is one launch."""
        assert self._replay is not None
        count, size = bucket(len(at_n), len(self._rows)), logits_nV.shape[1]
        self._plan = self._plan.with_room(Plan.of(settings, size), size)
        if self._plan.penalty:
            self._see()
        values = [[*at_n], *given, *controls(settings, size).values()]
        inputs = np.zeros((len(values), count))
        # A row that is none may choose as the first one does.
        inputs[:] = [[one[0]] for one in values]
        for row, one in zip(inputs, values, strict=True):
            row[: len(at_n)] = one
        padded_nV = F.pad(logits_nV, (0, 0, 0, count - len(at_n))) if count > len(at_n) else logits_nV
        found = self._replay(inputs, padded_nV, version=self._plan).tolist()
        return [int(symbol) for symbol in found[: len(at_n)]], found[count : count + len(at_n)]

    def _run_static(self, inputs: torch.Tensor, logits_nV: torch.Tensor) -> torch.Tensor:
        """Symbols, then their log-probabilities, [2 n]; symbols below 2^24 are exact in float32."""
        at, uniform, endless, ends, *of_rows = inputs
        columns = dict(zip(controls([], 1), (one[:, None] for one in of_rows), strict=True))
        allowed_nV = logits_nV
        if self._plan.penalty:
            assert self._seen_RV is not None
            allowed_nV = penalise_by(allowed_nV, self._seen_RV[at.long()], columns["penalty"])
        allowed_nV = allowed_nV + self._bias_2V[endless.long()]
        symbol_n = choose_by(allowed_nV, uniform, columns, self._plan).masked_fill(ends > 0, self._end)
        chosen_n = logits_nV.log_softmax(-1).gather(1, symbol_n[:, None])[:, 0]
        return torch.cat((symbol_n, chosen_n))
