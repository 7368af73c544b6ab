"""Any Hugging Face causal language model, scored by its own forward: the published baselines of `sllm
evaluate`.

Comes in: the folder of a model that this project did not train. Goes out: a module whose `forward(batch)`
gives the same `LossSums` as `TokenLM`, one window at a time and from the model's own logits. Slower than
packing, but true for every architecture (sliding windows, capped or scaled logits, state-space models),
because nothing inside is replaced.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from data_prep.text.tokenizer import Tokenizer
from pipeline.data.batch import Batch
from pipeline.models.folders import load_pretrained
from pipeline.models.losses import LossSums

ROWS_AT_ONCE = 256  # of logits in float32 at once


class PlainLM(nn.Module):
    """`model`: a Hugging Face `…ForCausalLM`.

    A window is (bos, t1 … tn), and the end symbol where its document ends.
    """

    def __init__(self, model: nn.Module, bos: int, end: int):
        super().__init__()
        self.model, self.bos, self.end = model, bos, end

    @property
    def config(self):
        return self.model.config

    @property
    def device(self):
        return self.model.device

    def forward(self, batch: Batch) -> LossSums:
        """Next-token loss over N = T + E targets, window by window (E document ends)."""
        starts = batch.cu_sentences[batch.cu_documents]
        nlls, ends = [], []
        for d, document_end in enumerate(batch.document_end_D):
            tokens = batch.tokens_T[int(starts[d]) : int(starts[d + 1])]
            end = tokens.new_full((int(document_end),), self.end)
            symbols = torch.cat([tokens.new_full((1,), self.bos), tokens, end])
            nlls.append(self._nll(symbols))
            ends.append(torch.arange(1, len(symbols), device=symbols.device) > len(tokens))
        nll_N = torch.cat(nlls)
        return LossSums.collect(batch.scored, nll_N.sum(), nll_N, torch.cat(ends))

    def _nll(self, symbols: Tensor) -> Tensor:
        """int64 [n+1] → float32 [n]: nats of every symbol after the first."""
        logits = self.model(input_ids=symbols[None, :-1], use_cache=False).logits[0]
        rows = zip(logits.split(ROWS_AT_ONCE), symbols[1:].split(ROWS_AT_ONCE), strict=True)
        return torch.cat([F.cross_entropy(x.float(), target, reduction="none") for x, target in rows])


def load_plain_lm(folder: str | Path, tokenizer: Tokenizer) -> PlainLM:
    """The model of a local folder in fp32, eval mode. Raises: UserError when it cannot be loaded."""
    model = load_pretrained(AutoModelForCausalLM, folder)
    own = model.config
    # A list of end symbols (chat models), or none: the tokenizer's own is the one that ends a plain text.
    bos, end = (
        value if isinstance(value, int) else fallback
        for value, fallback in (
            (getattr(own, "bos_token_id", None), tokenizer.bos_id),
            (getattr(own, "eos_token_id", None), tokenizer.eos_id),
        )
    )
    return PlainLM(model, bos, end)
