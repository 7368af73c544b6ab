"""Any Hugging Face causal LM scored by its own forward: the published baselines of `sllm evaluate`.

One window at a time, from the model's own logits: slower than packing, but correct for every architecture
(sliding windows, capped or scaled logits, state-space models), because nothing inside is replaced.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_prep.text.tokenizer import Tokenizer
from pipeline.data.batch import Batch
from pipeline.models.folders import load_pretrained
from pipeline.models.losses import LossSums

ROWS_AT_ONCE = 256  # rows of float32 logits at once


class PlainLM(nn.Module):
    """`model`: a Hugging Face `…ForCausalLM`. It reads (bos, t1 … tn) and the end symbol at a document's end.

    `forward` gives the same `LossSums` as `TokenLM`.
    """

    def __init__(self, model: PreTrainedModel, bos: int, end: int):
        super().__init__()
        self.model, self.bos, self.end = model, bos, end

    @property
    def config(self):
        return self.model.config

    @property
    def device(self):
        return self.model.device

    def forward(self, batch: Batch, want_correct: bool = False) -> LossSums:
        """Next-token loss over N = T + E targets, window by window (E document ends)."""
        starts = batch.cu_sentences[batch.cu_documents]
        first_D = batch.first_symbols_D(self.bos).tolist()
        nlls, corrects, ends = [], [], []
        for d, document_end in enumerate(batch.document_end_D):
            tokens = batch.tokens_T[int(starts[d]) : int(starts[d + 1])]
            end = tokens.new_full((int(document_end),), self.end)
            symbols = torch.cat([tokens.new_full((1,), first_D[d]), tokens, end])
            nll, correct = self._nll(symbols)
            nlls.append(nll)
            corrects.append(correct)
            ends.append(torch.arange(1, len(symbols), device=symbols.device) > len(tokens))
        nll_N, correct_N = torch.cat(nlls), torch.cat(corrects) if want_correct else None
        return LossSums.collect(batch.scored, nll_N.sum(), nll_N, torch.cat(ends), correct_N)

    def _nll(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [n+1] → nats of every symbol after the first float32 [n], and whether it is the likeliest."""
        logits = self.model(input_ids=symbols[None, :-1], use_cache=False).logits[0]
        rows = zip(logits.split(ROWS_AT_ONCE), symbols[1:].split(ROWS_AT_ONCE), strict=True)
        parts = [(F.cross_entropy(x.float(), y, reduction="none"), x.argmax(-1) == y) for x, y in rows]
        nll, correct = zip(*parts, strict=True)
        return torch.cat(nll), torch.cat(correct)


def load_plain_lm(folder: str | Path, tokenizer: Tokenizer) -> PlainLM:
    """The model of a local folder in fp32, eval mode. Raises: UserError when it cannot be loaded."""
    model = load_pretrained(AutoModelForCausalLM, folder)
    own = model.config
    # With a list of end symbols (chat models) or none, the tokenizer's own ends a plain text.
    bos, end = (
        value if isinstance(value, int) else fallback
        for value, fallback in (
            (getattr(own, "bos_token_id", None), tokenizer.bos_id),
            (getattr(own, "eos_token_id", None), tokenizer.eos_id),
        )
    )
    return PlainLM(model, bos, end)
