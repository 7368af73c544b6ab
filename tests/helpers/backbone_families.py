"""Small configs of every backbone family.

The tests' SentenceVAE is 32 wide; the `wide` and `narrow` backbones are not, so the SLLM needs adapters.
Llama and Qwen have fewer key/value heads than query heads; Qwen3's heads are wider than hidden_size / heads.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from helpers.models import IDS, VOCABULARY, _wake, opt_config, post_norm_opt_config, small_sllm
from pipeline.models.attention import HF_ATTENTION
from pipeline.models.sllm import SLLM
from pipeline.models.token_lm import TokenLM


def rotary_config(family: str, **kwargs) -> PreTrainedConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **({"head_dim": 12} if family == "qwen3" else {}),
        **IDS,
    }
    return AutoConfig.for_model(family, **{**settings, **kwargs})


CONFIGS = {
    "opt": lambda: opt_config(),
    "opt-post-norm": lambda: post_norm_opt_config(),
    "opt-wide": lambda: opt_config(hidden_size=48),
    "llama": lambda: rotary_config("llama"),
    "llama-wide": lambda: rotary_config("llama", hidden_size=48, attention_bias=True),
    "qwen2": lambda: rotary_config("qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2-wide": lambda: rotary_config("qwen2", hidden_size=48),
    "qwen3": lambda: rotary_config("qwen3"),
    # Attention windows in all layers, and in the second one only.
    "mistral": lambda: rotary_config("mistral", sliding_window=4),
    "qwen3_window": lambda: rotary_config(
        "qwen3", use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "qwen3-narrow": lambda: rotary_config("qwen3", hidden_size=24),
}
ROTARY = [name for name in CONFIGS if not name.startswith("opt")]


def family_sllm(name: str, **kwargs) -> SLLM:
    return small_sllm(backbone=CONFIGS[name](), **kwargs)


def family_lm(name: str, **kwargs) -> TokenLM:
    """`kwargs`: of a rotary family's config."""
    torch.manual_seed(0)
    config = rotary_config(name, **kwargs) if kwargs else CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=HF_ATTENTION)
    return _wake(TokenLM(model))


MAKERS = {"sllm": family_sllm, "lm": family_lm}
