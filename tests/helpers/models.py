"""Small models and random documents shared by the model tests."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.data.batch import Batch, build_batch
from pipeline.data.windows import Span
from pipeline.models.attention import HF_ATTENTION, PATHS
from pipeline.models.sentence_vae import SentenceVAE, SentenceVAEConfig
from pipeline.models.sllm import SLLM, SLLMConfig
from pipeline.models.stack import StackConfig, StackLM
from pipeline.models.token_lm import TokenLM

VOCABULARY = 97
Model = TypeVar("Model", bound=torch.nn.Module)
FORWARD_PATHS = (*PATHS, "flex")  # attention paths of a CPU without gradients
IDS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32}


def random_spans(seed: int, documents: int = 4, most_sentences: int = 7, most_tokens: int = 12) -> list[Span]:
    rng = np.random.default_rng(seed)
    spans = []
    for number in range(documents):
        lengths = rng.integers(1, most_tokens + 1, rng.integers(1, most_sentences + 1))
        spans.append(Span(rng.integers(4, VOCABULARY, lengths.sum()), lengths, number % 2 == 0))
    return spans


def random_batch(seed: int, **kwargs) -> Batch:
    return build_batch(random_spans(seed, **kwargs))


def opt_config(**kwargs) -> OPTConfig:
    settings = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 128,
        "dropout": 0.0,
        **SIZES,
        **IDS,
    }
    return OPTConfig(**{**settings, **kwargs})


def post_norm_opt_config(**kwargs) -> OPTConfig:
    """OPT-350M's shape: post-norm layers, narrower embedding with projections, no final norm."""
    return opt_config(do_layer_norm_before=False, word_embed_proj_dim=16, **kwargs)


def _wake(model: Model) -> Model:
    """Add noise to all weights, biases and norms, so that every path has a visible effect."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model.eval()


def small_vae(seed: int = 0, **kwargs) -> SentenceVAE:
    torch.manual_seed(seed)
    settings = {"layers": 2, "heads": 4, "max_sentence_tokens": 16, **SIZES, **IDS, **kwargs}
    return _wake(SentenceVAE(SentenceVAEConfig(**settings)))


def small_sllm(seed: int = 0, backbone: PreTrainedConfig | None = None, **kwargs) -> SLLM:
    torch.manual_seed(seed)
    vae = SentenceVAEConfig(**{"layers": 2, "heads": 4, "max_sentence_tokens": 16, **SIZES, **IDS, **kwargs})
    return _wake(SLLM(SLLMConfig(vae, backbone or opt_config(), **IDS)))


def small_stack(seed: int = 0, backbone: PreTrainedConfig | None = None, **kwargs) -> StackLM:
    torch.manual_seed(seed)
    sizes = {"lower_layers": 1, "upper_layers": 2, "heads": 4, "max_sentence_tokens": 16}
    sizes |= {"attention_window": 9, "memory": 3, **SIZES, **IDS, **kwargs}
    return _wake(StackLM(StackConfig(backbone or opt_config(), **sizes)))


def small_lm(seed: int = 0, config: OPTConfig | None = None) -> TokenLM:
    torch.manual_seed(seed)
    return _wake(
        TokenLM(OPTForCausalLM._from_config(config or opt_config(), attn_implementation=HF_ATTENTION))
    )


def cached_scores(model: SLLM | StackLM, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """One document scored by cached generation: nll of every symbol float32 [T+S], stop probabilities [S]."""
    nll, stops, at, state = [], [], 0, model.begin()
    for length in span.sentence_lengths:
        sentence = span.tokens[at : at + length].tolist()
        at += length
        decoder = model.decode_begin(state)
        for symbol in [*sentence, IDS["eos_token_id"]]:
            nll.append(-decoder.logits.log_softmax(-1)[symbol])
            if symbol != IDS["eos_token_id"]:
                model.decode_step(decoder, symbol)
        model.append(state, sentence)
        stops.append(model.stop_probability(state))
    return torch.stack(nll), torch.tensor(stops)


def plain_nll(model: PreTrainedModel, spans: list[Span]) -> torch.Tensor:
    """float32 [N]: the token model's targets, scored window by window by the plain Hugging Face model."""
    nll = []
    for span in spans:
        ids = torch.tensor([[IDS["bos_token_id"], *span.tokens.tolist()]])
        targets = span.tokens.tolist() + ([IDS["eos_token_id"]] if span.document_end else [])
        with torch.no_grad():
            logits = model(ids).logits[0, : len(targets)]
        nll.append(F.cross_entropy(logits, torch.tensor(targets), reduction="none"))
    return torch.cat(nll)
