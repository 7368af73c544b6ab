"""Keys of `model.vae`, `model.tokens` and `model.backbone`: sizes, or the folder of a trained model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from data_prep.common.errors import UserError
from pipeline.config.keys import (
    Above1,
    Below1,
    Count,
    Flag,
    List,
    Number,
    Positive,
    Section,
    Share,
    Text,
    Whole,
    explain,
    keys_of,
)

PATH = "local folder of a trained model, instead of all other keys"


class VaeRecipe(Section):
    """The SentenceVAE: arguments of `SentenceVAEConfig`, or the folder of a trained one."""

    path: str | None = Field(None, description=PATH)
    init_embeddings_from: str | None = Field(None, description="token model that gives the first embeddings")
    hidden_size: Count = Field(768, description="width of layers and sentence vectors")
    embedding_size: Count | None = Field(None, description="width of token embeddings; null: hidden_size")
    layers: Count = Field(1, description="layers of the decoder")
    encoder_layers: Count | None = Field(None, description="layers of the encoder; null: layers")
    heads: Count = Field(12, description="attention heads")
    ffn_size: Count | None = Field(None, description="width of the feed-forward; null: 2 · hidden_size")
    vocab_size: Count | None = Field(None, description="entries of the vocabulary; null: the tokenizer's")
    max_sentence_tokens: Count | None = Field(None, description="longest sentence; null: that of the shards")
    layout: Literal["lean", "paper"] = Field(
        "lean", description="paper: the published layers (docs/sizes.md)"
    )
    published_inputs: Flag = Field(
        False, description="layout paper: a BOS before each encoded sentence, no start position (sllm import)"
    )
    positions: Literal["learned", "rotary"] = Field("learned", description="positions of layout lean")
    fusion: Literal["sum", "mean", "attention", "last"] = Field(
        "sum", description="how a sentence's token states become its vector"
    )
    vectors: Count = Field(1, description="vectors of a sentence; above 1 needs fusion attention")
    condition: Literal["cross_attention", "prefix", "constant", "none"] = Field(
        "cross_attention",
        description="how a vector enters the decoder; as controls: constant (a learned bias of as many "
        "parameters in its place) and none",
    )
    condition_range: Number = Field(0.0, description="standard deviation of cross-attention's first weights")
    prefix_slots: Count = Field(1, description="rows of the prefix (condition prefix)")
    context_sentences: Whole = Field(0, description="earlier sentences that an SLLM's decoder sees as tokens")
    dropout: Below1 = Field(0.0, description="dropout of encoder and decoder")
    latent_noise: Number = Field(0.0, description="standard deviation of noise on the vector, in training")
    variational: Flag = Field(False, description="train on samples of a distribution for each sentence")
    kl_weight: Number = Field(1.0, description="weight of the KL divergence (variational)")
    free_bits: Number = Field(0.0, description="nats of KL that a channel may have for free (variational)")
    initializer_range: Number = Field(0.02, description="standard deviation of new weights")
    tie_word_embeddings: Flag = Field(False, description="both embeddings and the head share one matrix")

    def problems(self) -> Iterator[str]:
        if self.vectors > 1 and self.fusion != "attention":
            yield f"model.vae.vectors {self.vectors} needs model.vae.fusion attention, not {self.fusion}"
        paper = (self.vectors, self.condition, self.context_sentences, self.positions)
        if self.layout == "paper" and paper != (1, "cross_attention", 0, "learned"):
            yield (
                "model.vae.layout paper has one vector, cross_attention, no context_sentences and sinusoidal "
                "positions: use lean for anything else"
            )
        if self.published_inputs and self.layout != "paper":
            yield "model.vae.published_inputs needs model.vae.layout paper"
        if self.prefix_slots != 1 and self.condition != "prefix":
            slots = f"model.vae.prefix_slots {self.prefix_slots}"
            yield f"{slots} needs model.vae.condition prefix, not {self.condition}"
        if self.condition_range and (self.condition, self.layout) != ("cross_attention", "lean"):
            yield "model.vae.condition_range is for condition cross_attention and layout lean: set it to 0"
        if self.context_sentences and self.positions != "rotary":
            yield (
                f"model.vae.context_sentences {self.context_sentences} needs model.vae.positions rotary: "
                "learned positions say nothing of the distance between sentences"
            )
        if self.variational and self.latent_noise:
            yield "model.vae.latent_noise and model.vae.variational both put noise on the embedding: set one"
        if not self.variational and (self.free_bits or self.kl_weight != 1.0):
            yield "model.vae.kl_weight and model.vae.free_bits need model.vae.variational true"


class TokensRecipe(Section):
    """The token layers of layout `stack`, below and above the backbone."""

    hidden_size: Count = Field(768, description="width of the token layers")
    lower_layers: Count = Field(1, description="token layers before the backbone")
    upper_layers: Count = Field(2, description="token layers that read the backbone's output")
    attention_window: Count = Field(64, description="rows that a token layer sees, its own included")
    heads: Count = Field(12, description="attention heads")
    ffn_size: Count | None = Field(None, description="width of the feed-forward; null: 2 · hidden_size")
    vocab_size: Count | None = Field(None, description="entries of the vocabulary; null: the tokenizer's")
    max_sentence_tokens: Count | None = Field(None, description="longest sentence; null: that of the shards")
    dropout: Below1 = Field(0.0, description="dropout of the token layers")
    initializer_range: Number = Field(0.02, description="standard deviation of new weights")
    tie_word_embeddings: Flag = Field(False, description="embedding and head share one matrix")

    def problems(self) -> Iterator[str]:
        if self.hidden_size % (2 * self.heads):
            yield (
                f"model.tokens.hidden_size {self.hidden_size} is no multiple of twice model.tokens.heads "
                f"({self.heads}): rotary positions turn pairs of channels"
            )


class AnchorsRecipe(Section):
    """Layout `anchors`: what a token sees. Without anchors and window it is the token model itself."""

    attention_window: Count | None = Field(64, description="last tokens that are seen; null: all")
    first_tokens: Whole = Field(4, description="first tokens of a window that are always seen")
    per_sentence: Whole = Field(1, description="anchors behind each sentence; 0: a window alone")
    places: Literal["sentence", "random"] = Field(
        "sentence", description="random: as a control, at places that the text does not decide"
    )
    mean_length: Above1 = Field(11.0, description="mean distance of random places, in tokens")

    def problems(self) -> Iterator[str]:
        if self.attention_window is None and self.per_sentence:
            yield "model.anchors.per_sentence needs model.anchors.attention_window: set it to 0, or a window"


class LoraRecipe(Section):
    """Low-rank adapters on the pretrained layers, trained in place of their weights (extra `lora`)."""

    rank: Count = Field(16, description="width of the adapters")
    alpha: Positive | None = Field(None, description="an adapter counts alpha / rank; null: rank")
    dropout: Below1 = Field(0.0, description="dropout of what an adapter reads")
    targets: List[Text] = Field(
        [], description="names of the linear layers (`q_proj`, `v_proj`); []: all of the backbone"
    )


class BackboneRecipe(Section):
    """The backbone of an SLLM, or a token model: keys of a Hugging Face config, or a local folder.

    Only families whose packing, causality and cache are under test. A key that is left out has the default of
    the family's Hugging Face config; null is handed on to it.
    """

    path: str | None = Field(None, description=PATH)
    model_type: str = Field("opt", description="family: opt, llama, mistral, qwen2, qwen3 or gpt_neox")
    vocab_size: Count | None = Field(None, description="entries of the vocabulary (token model)")
    hidden_size: Count | None = Field(None, description="width of the layers")
    num_hidden_layers: Count | None = Field(None, description="layers")
    num_attention_heads: Count | None = Field(None, description="attention heads")
    max_position_embeddings: Count | None = Field(None, description="longest input, in positions")
    attention_dropout: Share | None = Field(None, description="dropout of attention weights")
    tie_word_embeddings: Flag | None = Field(None, description="embedding and head share one matrix")


ATTENTION_BIAS = "attention has biases (Llama, Qwen3, GPT-NeoX)"
HEAD_DIM = "width of a head (Llama, Mistral, Qwen3)"
WINDOW = "rows back that a layer sees, its own included; left out: 4,096 (Mistral, Qwen); null: all"


class OptRecipe(BackboneRecipe):
    ffn_dim: Count | None = Field(None, description="width of the feed-forward (OPT)")
    word_embed_proj_dim: Count | None = Field(None, description="width of token embeddings (OPT)")
    do_layer_norm_before: Flag | None = Field(None, description="pre-norm; OPT-350M has post-norm (OPT)")
    dropout: Share | None = Field(None, description="dropout of the layers (OPT)")
    activation_function: str | None = Field(None, description="activation of the feed-forward (OPT)")
    layerdrop: Share | None = Field(None, description="must be 0 (OPT)")
    init_std: Number | None = Field(None, description="standard deviation of new weights (OPT)")
    enable_bias: Flag | None = Field(None, description="linear layers have biases (OPT)")
    layer_norm_elementwise_affine: Flag | None = Field(None, description="norms have weights (OPT)")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    if not all(math.isfinite(value) for value in values.values() if isinstance(value, float)):
        raise ValueError(f"must be a mapping to finite numbers, not {values!r}")
    return values


class RotaryRecipe(BackboneRecipe):
    intermediate_size: Count | None = Field(None, description="width of the feed-forward (not OPT)")
    hidden_act: str | None = Field(None, description="activation of the feed-forward (not OPT)")
    initializer_range: Number | None = Field(None, description="standard deviation of new weights")
    rope_parameters: Annotated[dict[str, Any], AfterValidator(_finite)] | None = Field(
        None, description="rotary positions (not OPT)"
    )


class GroupedRecipe(RotaryRecipe):
    num_key_value_heads: Count | None = Field(None, description="heads of keys and values (Llama, Qwen)")
    rms_norm_eps: Number | None = Field(None, description="epsilon of the norms (Llama, Qwen)")


class LlamaRecipe(GroupedRecipe):
    head_dim: Count | None = Field(None, description=HEAD_DIM)
    attention_bias: Flag | None = Field(None, description=ATTENTION_BIAS)
    mlp_bias: Flag | None = Field(None, description="the feed-forward has biases (Llama)")


class MistralRecipe(GroupedRecipe):
    head_dim: Count | None = Field(None, description=HEAD_DIM)
    sliding_window: Count | None = Field(None, description=WINDOW)


class Qwen2Recipe(GroupedRecipe):
    sliding_window: Count | None = Field(None, description=WINDOW)
    use_sliding_window: Flag | None = Field(None, description="some layers have the window (Qwen)")
    max_window_layers: Whole | None = Field(
        None, description="layers from this number on have the window; 0: all (Qwen)"
    )

    def problems(self) -> Iterator[str]:
        # Otherwise Hugging Face's config has no window, and says nothing.
        if self.sliding_window is not None and not self.use_sliding_window:
            yield "model.backbone.sliding_window needs model.backbone.use_sliding_window true"
        if self.use_sliding_window and self.max_window_layers is None:
            yield "model.backbone.use_sliding_window needs model.backbone.max_window_layers (0: all layers)"


class Qwen3Recipe(Qwen2Recipe):
    head_dim: Count | None = Field(None, description=HEAD_DIM)
    attention_bias: Flag | None = Field(None, description=ATTENTION_BIAS)


class GptNeoxRecipe(RotaryRecipe):
    layer_norm_eps: Number | None = Field(None, description="epsilon of the norms (GPT-NeoX)")
    hidden_dropout: Share | None = Field(None, description="dropout of the layers (GPT-NeoX)")
    attention_bias: Flag | None = Field(None, description=ATTENTION_BIAS)
    use_parallel_residual: Flag | None = Field(
        None, description="attention and feed-forward read the same rows (GPT-NeoX)"
    )


# Add a family here, and its config to tests/helpers/backbone_families.py, which tests it.
BACKBONES: dict[str, type[BackboneRecipe]] = {
    "opt": OptRecipe,
    "llama": LlamaRecipe,
    "mistral": MistralRecipe,
    "qwen2": Qwen2Recipe,
    "qwen3": Qwen3Recipe,
    "gpt_neox": GptNeoxRecipe,
}


def _given(kind: type[Section], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys that are given, in their order, with values as `kind` types them; null stays null."""
    known = kind.model_fields
    try:
        checked = kind.model_validate({k: v for k, v in values.items() if v is not None or k not in known})
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, keys_of(kind, where), where))) from None
    return {key: None if value is None else getattr(checked, key) for key, value in values.items()}


def given_vae(values: dict[str, Any]) -> dict[str, Any]:
    return _given(VaeRecipe, values, "model.vae.")


def given_tokens(values: dict[str, Any]) -> dict[str, Any]:
    return _given(TokensRecipe, values, "model.tokens.")


def given_anchors(values: dict[str, Any]) -> dict[str, Any]:
    return _given(AnchorsRecipe, values, "model.anchors.")


def given_lora(values: dict[str, Any]) -> dict[str, Any]:
    return _given(LoraRecipe, values, "model.lora.")


def checked_vae(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of `model.vae` with values of the right types. Raises: UserError with all problems."""
    return _checked(given_vae, values)


def checked_tokens(values: dict[str, Any]) -> dict[str, Any]:
    """The same for `model.tokens`."""
    return _checked(given_tokens, values)


def _checked(given: Callable[[dict[str, Any]], dict[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    try:
        return given(values)
    except ValueError as error:
        raise UserError(str(error)) from None


def given_backbone(values: dict[str, Any]) -> dict[str, Any]:
    family = str(values.get("model_type", "opt"))
    if family not in BACKBONES:
        near = difflib.get_close_matches(family, BACKBONES, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        known = ", ".join(BACKBONES)
        raise ValueError(f"model.backbone.model_type must be one of {known}, not {family!r}{hint}")
    return _given(BACKBONES[family], values, "model.backbone.")
