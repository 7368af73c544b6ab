"""The token-level baseline: a Hugging Face causal LM on the same tokens, windows and bins as the SLLM.

Each window is (bos, t1 … tn) with targets (t1 … tn, end of document if the document ends there), conditioned
on itself only. With `sentence_ends` (in the model's config) an end symbol follows every sentence; a second
one in a row is the document's end. The wrapper adds packing and the chunked loss; the plain Hugging Face
model is saved, and `AutoModelForCausalLM.from_pretrained` loads it.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.data.batch import Batch
from pipeline.models.backbone import run_packed
from pipeline.models.losses import LossSums
from pipeline.models.vocabulary_head import VocabularyHead


class TokenLM(nn.Module):
    """`model` is a Hugging Face `…ForCausalLM` with `attn_implementation=HF_ATTENTION`; its `lm_head` is
    replaced by a `VocabularyHead` that shares its weight."""

    def __init__(
        self,
        model: PreTrainedModel,
        focal_gamma: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__()
        self.focal_gamma, self.label_smoothing, self.z_loss = focal_gamma, label_smoothing, z_loss
        old = model.get_output_embeddings()
        head = VocabularyHead(old.in_features, old.out_features, bias=old.bias is not None)
        head.weight, head.bias = old.weight, old.bias
        model.set_output_embeddings(head)
        self.model = model

    @property
    def config(self):
        return self.model.config

    @property
    def device(self):
        return self.model.device

    @property
    def sentence_ends(self) -> bool:
        """Whether the model reads and predicts an end symbol after every sentence."""
        return bool(getattr(self.config, "sentence_ends", False))

    def as_read(self, batch: Batch) -> Batch:
        """The batch with the symbols that the model reads as tokens."""
        return batch.with_sentence_ends(self.config.eos_token_id) if self.sentence_ends else batch

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states of the rows with a target [N, d], their targets [N], and which of them are
        ends [N]."""
        batch = self.as_read(batch)
        inputs, rows, targets = batch.token_model_symbols(self.config.bos_token_id, self.config.eos_token_id)
        layout = batch.token_model_layout
        hidden = run_packed(self.model.base_model, layout, input_ids=inputs)
        is_end = layout.is_last_row.index_select(0, rows)
        if self.sentence_ends:
            is_end |= targets == self.config.eos_token_id
        return hidden.index_select(0, rows), targets, is_end

    def forward(self, batch: Batch, want_correct: bool = False) -> LossSums:
        """Next-token loss over N = T + E targets (E ends)."""
        hidden, targets, is_end = self.hidden(batch)
        head = self.model.get_output_embeddings()
        objective, nll, correct = head(
            hidden, targets, self.focal_gamma, want_correct, self.label_smoothing, self.z_loss
        )
        return LossSums.collect(batch.scored, objective, nll, is_end, correct)
