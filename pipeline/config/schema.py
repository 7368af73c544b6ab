"""Recipes: what one training run is, every key with its type, default and meaning.

Imports neither torch nor transformers, so that a wrong recipe is refused within a second.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from data_prep.common.errors import UserError
from pipeline.config.keys import explain, keys_of, unknown_key
from pipeline.config.library import find_recipe
from pipeline.config.loading import parse_overrides, read_yaml, set_override

PATH = "local folder of a trained model, instead of all other keys"


def _number(value: Any) -> Any:
    """Text as a number where it is one: YAML reads `1e-4` as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _whole(value: Any) -> Any:
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _mapping(value: Any) -> Any:
    return {} if value is None else value


Item = TypeVar("Item")
List = Annotated[list[Item], BeforeValidator(_list)]
# Strict after reading text, so that true and false are no numbers.
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0)]
Count = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=1)]
Number = Annotated[float, BeforeValidator(_number), Field(strict=True, ge=0)]
Ratio = Annotated[float, BeforeValidator(_number), Field(strict=True, gt=1)]
Positive = Annotated[float, BeforeValidator(_number), Field(strict=True, gt=0)]
Share = Annotated[float, BeforeValidator(_number), Field(strict=True, ge=0, le=1)]
Below1 = Annotated[float, BeforeValidator(_number), Field(strict=True, ge=0, lt=1)]
Decay = Annotated[float, BeforeValidator(_number), Field(strict=True, gt=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
# Every section of a recipe may be left out; its cross-checks run all the same.
SECTION: Any = Field(default_factory=dict, validate_default=True)


class Section(BaseModel):
    """A group of keys. Unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    def problems(self) -> Iterator[str]:
        """What does not fit together, when each value by itself is right."""
        return iter(())

    @model_validator(mode="after")
    def _fits_together(self) -> Section:
        if found := "; ".join(self.problems()):
            raise ValueError(found)
        return self


class DataRecipe(Section):
    """The shards to read. One step is `bins_per_step` bins of at most `bin_tokens` tokens."""

    shards: List[str] = Field([], description="shard folders to train on")
    weights: List[Positive] | None = Field(None, description="share of each set in the bins; null: one pool")
    validation: str | None = Field(None, description="shard folder to validate on; null: no validation")
    window_tokens: Count = Field(1024, description="longest window; longer documents are cut into windows")
    bin_tokens: Count = Field(8192, description="tokens of a bin at most")
    bins_per_step: Count = Field(1, description="bins of one step, over all ranks")

    def problems(self) -> Iterator[str]:
        if self.window_tokens > self.bin_tokens:
            yield (
                f"data.window_tokens ({self.window_tokens}) is larger than data.bin_tokens "
                f"({self.bin_tokens}): a window must fit into a bin"
            )
        if self.weights is not None and len(self.weights) != len(self.shards):
            yield (
                f"data.weights has {len(self.weights)} numbers for {len(self.shards)} shard sets: "
                "give one for each of data.shards"
            )


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
    positions: Literal["learned", "rotary"] = Field("learned", description="positions of layout lean")
    fusion: Literal["sum", "mean", "attention", "last"] = Field(
        "sum", description="how a sentence's token states become its vector"
    )
    vectors: Count = Field(1, description="vectors of a sentence; above 1 needs fusion attention")
    condition: Literal["cross_attention", "prefix", "none"] = Field(
        "cross_attention", description="how a vector enters the decoder; none: it does not, as a control"
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


class BackboneRecipe(Section):
    """The backbone of an SLLM, or a token model: keys of a Hugging Face config, or a local folder.

    Only families whose packing, causality and cache are under test. A key that is left out, or null, has the
    default of the family's Hugging Face config.
    """

    path: str | None = Field(None, description=PATH)
    model_type: str = Field("opt", description="family: opt, llama, qwen2 or qwen3")
    vocab_size: Count | None = Field(None, description="entries of the vocabulary (token model)")
    hidden_size: Count | None = Field(None, description="width of the layers")
    num_hidden_layers: Count | None = Field(None, description="layers")
    num_attention_heads: Count | None = Field(None, description="attention heads")
    max_position_embeddings: Count | None = Field(None, description="longest input, in positions")
    attention_dropout: Share | None = Field(None, description="dropout of attention weights")
    tie_word_embeddings: Flag | None = Field(None, description="embedding and head share one matrix")


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


class RotaryRecipe(BackboneRecipe):
    intermediate_size: Count | None = Field(None, description="width of the feed-forward (Llama, Qwen)")
    num_key_value_heads: Count | None = Field(None, description="heads of keys and values (Llama, Qwen)")
    hidden_act: str | None = Field(None, description="activation of the feed-forward (Llama, Qwen)")
    initializer_range: Number | None = Field(None, description="standard deviation of new weights")
    rms_norm_eps: Number | None = Field(None, description="epsilon of the norms (Llama, Qwen)")
    rope_parameters: dict[str, Any] | None = Field(None, description="rotary positions (Llama, Qwen)")


class LlamaRecipe(RotaryRecipe):
    head_dim: Count | None = Field(None, description="width of a head (Llama, Qwen3)")
    attention_bias: Flag | None = Field(None, description="attention has biases (Llama, Qwen3)")
    mlp_bias: Flag | None = Field(None, description="the feed-forward has biases (Llama)")


class Qwen2Recipe(RotaryRecipe):
    use_sliding_window: Flag | None = Field(None, description="must be false (Qwen)")


class Qwen3Recipe(Qwen2Recipe):
    head_dim: Count | None = Field(None, description="width of a head (Llama, Qwen3)")
    attention_bias: Flag | None = Field(None, description="attention has biases (Llama, Qwen3)")


BACKBONES: dict[str, type[BackboneRecipe]] = {
    "opt": OptRecipe,
    "llama": LlamaRecipe,
    "qwen2": Qwen2Recipe,
    "qwen3": Qwen3Recipe,
}


def _given(kind: type[Section], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys that are given, in their order, with values as `kind` types them; null stays null."""
    known = kind.model_fields
    try:
        checked = kind.model_validate({k: v for k, v in values.items() if v is not None or k not in known})
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, keys_of(kind, where=where), where))) from None
    return {key: None if value is None else getattr(checked, key) for key, value in values.items()}


def _given_vae(values: dict[str, Any]) -> dict[str, Any]:
    return _given(VaeRecipe, values, "model.vae.")


def checked_vae(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of `model.vae` with values of the right types. Raises: UserError with all problems."""
    try:
        return _given_vae(values)
    except ValueError as error:
        raise UserError(str(error)) from None


def _given_backbone(values: dict[str, Any]) -> dict[str, Any]:
    family = str(values.get("model_type", "opt"))
    if family not in BACKBONES:
        near = difflib.get_close_matches(family, BACKBONES, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        known = ", ".join(BACKBONES)
        raise ValueError(f"model.backbone.model_type must be one of {known}, not {family!r}{hint}")
    return _given(BACKBONES[family], values, "model.backbone.")


class ModelRecipe(Section):
    """Dicts of the keys that are given; the model's config has the defaults of the others."""

    vae: Annotated[dict[str, Any], BeforeValidator(_mapping), AfterValidator(_given_vae)] = {}
    backbone: Annotated[dict[str, Any], BeforeValidator(_mapping), AfterValidator(_given_backbone)] = {}

    def problems(self) -> Iterator[str]:
        for name, part in (("vae", self.vae), ("backbone", self.backbone)):
            sizes = sorted(set(part) - {"path"})
            if part.get("path") and sizes:
                yield f"model.{name} has a path and sizes ({', '.join(sizes)}): give one or the other"


class LossRecipe(Section):
    """What is trained on. Plain cross-entropy is always reported, too."""

    kind: Literal["cross_entropy", "focal"] = Field("cross_entropy", description="focal is the paper's")
    # Below 1 its gradient has a pole where the target is certain.
    focal_gamma: Annotated[Number, Field(ge=1)] = Field(2.0, description="gamma of the focal loss")
    label_smoothing: Below1 = Field(0.0, description="share of the target spread over the vocabulary")
    z_loss: Number = Field(0.0, description="weight of the squared log-partition of the logits")
    embedding_weight: Number = Field(0.0, description="weight of the loss on predicted vectors (sllm)")

    def head_settings(self) -> dict[str, float]:
        """Arguments of the vocabulary head: focal_gamma (0 for cross-entropy), label_smoothing, z_loss."""
        return {
            "focal_gamma": self.focal_gamma if self.kind == "focal" else 0.0,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }


def _optimizer_part(values: dict[str, Any]) -> dict[str, Any]:
    scale = _number(values.get("lr_scale"))
    if values == {"freeze": True}:
        return values
    if set(values) != {"lr_scale"} or type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(f"must be {{lr_scale: NUMBER above 0}} or {{freeze: true}}, not {values!r}")
    return {"lr_scale": float(scale)}


Part = Annotated[dict[str, Any], AfterValidator(_optimizer_part)]
PARTS = (
    "by the name of a module (`vae.encoder`, `backbone.decoder.layers.0-5`), `{lr_scale: NUMBER}` (times lr) "
    "or `{freeze: true}`; of two names that fit, the longer one counts"
)


class OptimizerRecipe(Section):
    """AdamW. Weight decay touches matrices only: no biases, no norms, no embeddings."""

    lr: Number = Field(1.0e-4, description="peak learning rate")
    betas: Annotated[list[Below1], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="decay of the averages of gradients and of squares"
    )
    eps: Number = Field(1.0e-8, description="added to the denominator")
    weight_decay: Number = Field(0.01, description="decoupled weight decay")
    clip: Number = Field(1.0, description="largest gradient norm; 0: no clipping")
    parts: Annotated[dict[str, Part], BeforeValidator(_mapping)] = Field({}, description=PARTS)


class ScheduleRecipe(Section):
    """Learning rate: up over `warmup`, then down to `final`."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="wsd (warm-up, stable, decay) stays at the peak and then falls in a line"
    )
    warmup: Share = Field(0.02, description="share of the run in which the rate rises")
    final: Share = Field(0.1, description="last rate, as a share of the peak")
    decay: Number = Field(0.2, description="share of the run in which the rate falls (wsd)")

    def problems(self) -> Iterator[str]:
        if self.kind == "wsd" and not 0 < self.decay <= 1 - self.warmup:
            yield (
                f"schedule.decay must be above 0 and leave room for warmup ({self.warmup}), not {self.decay}"
            )

    def factor(self, progress: float) -> float:
        """Learning rate as a share of the peak; `progress` in [0, 1] is the run's share done AFTER the step.

        Above zero from the first step on, never rising after the warm-up, exactly `final` at the end.
        """
        if progress < self.warmup:
            return progress / self.warmup
        if self.kind == "constant" or self.warmup == 1:
            return 1.0
        if self.kind == "wsd":
            return 1 - (1 - self.final) * max(0.0, 1 - (1 - progress) / self.decay)
        way = (progress - self.warmup) / (1 - self.warmup)
        if self.kind == "linear":
            return 1 - (1 - self.final) * way
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * way))


class TrainingRecipe(Section):
    """How long a run is, `max_tokens` or `max_steps`, whichever comes first, and what happens on the way."""

    max_tokens: Count | None = Field(None, description="real tokens to train on")
    max_steps: Count | None = Field(None, description="steps to train for")
    eval_every: Count = Field(200, description="steps between validations")
    eval_bins: Count = Field(32, description="bins of a validation")
    save_every: Count = Field(200, description="steps between checkpoints")
    keep: Count = Field(2, description="last checkpoints to keep")
    compile: Flag = Field(False, description="transformer layers go through torch.compile")
    activation_checkpointing: Flag = Field(False, description="recompute layers in the backward pass")
    ema: Decay | None = Field(None, description="decay of an average of the weights; null: none is kept")

    def problems(self) -> Iterator[str]:
        if self.max_tokens is None and self.max_steps is None:
            yield "set training.max_tokens or training.max_steps, or the run would never end"

    def progress(self, step: int, tokens: int) -> float:
        """Share of the run that is done after `step` steps and `tokens` real tokens, in [0, 1]."""
        shares = [0.0]
        if self.max_tokens is not None:
            shares.append(tokens / self.max_tokens)
        if self.max_steps is not None:
            shares.append(step / self.max_steps)
        return min(1.0, max(shares))


class HealthRecipe(Section):
    """When a step is skipped, and when a diverging or hung run ends."""

    max_skips: Count = Field(5, description="skipped steps in a row that end the run")
    loss_spike: Ratio | None = Field(None, description="skip losses above so many times the recent median")
    norm_spike: Ratio | None = Field(None, description="the same for the gradient norm")
    hang_seconds: Positive | None = Field(1200.0, description="time without progress that ends the run")


class LogRecipe(Section):
    """Where metrics go, beside metrics.jsonl."""

    tensorboard: Flag = Field(True, description="write TensorBoard files")
    wandb: Flag = Field(False, description="log to Weights & Biases")
    console_every: Count = Field(10, description="steps between lines, without a terminal")
    profile: str | None = Field(None, description="steps to trace, such as 10-12 or 10; null: none")
    profile_ranks: List[Whole] = Field([0], description="ranks to trace")

    def problems(self) -> Iterator[str]:
        if self.profile is not None and not 1 <= self.profile_steps()[0] <= self.profile_steps()[1]:
            yield f"log.profile must be steps such as 10-12, not {self.profile!r}"

    def profile_steps(self) -> tuple[int, int]:
        """First and last step of `profile`; (0, 0) when it is no such thing."""
        first, dash, last = (self.profile or "").partition("-")
        last = last if dash else first
        return (int(first), int(last)) if first.isdecimal() and last.isdecimal() else (0, 0)


class Recipe(Section):
    """One training run. The key names are those of the YAML file and of the command line's overrides."""

    objective: Literal["vae", "sllm", "lm"] = Field(description="SentenceVAE, SLLM or token-level model")
    output_dir: str = Field(description="the run's folder")
    seed: Whole = Field(1, description="decides first weights, the order of bins and all noise")
    init_from: str | None = Field(None, description="model folder whose weights a new run starts from")
    data: DataRecipe = SECTION
    model: ModelRecipe = SECTION
    loss: LossRecipe = SECTION
    optimizer: OptimizerRecipe = SECTION
    schedule: ScheduleRecipe = SECTION
    training: TrainingRecipe = SECTION
    health: HealthRecipe = SECTION
    log: LogRecipe = SECTION

    def problems(self) -> Iterator[str]:
        if not self.data.shards:
            yield "data.shards is empty: name the shard folders, for example --data.shards shards/train"
        for name in {"vae": ("vae",), "sllm": ("vae", "backbone"), "lm": ("backbone",)}[self.objective]:
            if not getattr(self.model, name):
                yield f"objective {self.objective} needs model.{name} (sizes, or a path)"
        if self.loss.embedding_weight and self.objective != "sllm":
            yield f"loss.embedding_weight is for objective sllm, not {self.objective}"
        if self.objective == "vae" and self.model.vae.get("path"):
            yield "objective vae trains a SentenceVAE from sizes: model.vae.path is for objective sllm"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the layout of the YAML file."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """The resolved recipe, as kept in the run directory."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


# Every key that a file or an override may name, with its type, default and meaning.
KEYS = keys_of(Recipe, {"model.vae": [VaeRecipe], "model.backbone": BACKBONES.values()})


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `["--training.max_steps", "10", …]` and check everything.

    Raises: UserError for a file that is missing or unreadable, or with all problems of its keys and values.
    """
    values = read_yaml(find_recipe(path))
    problems = []
    for key, texts in parse_overrides(overrides or []):
        # Which keys a backbone has, its family decides.
        if key in KEYS or key.rpartition(".")[0] == "model.backbone":
            set_override(values, key, texts)
        else:
            problems.append(unknown_key(key, KEYS))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += explain(error, KEYS)
    if problems:
        problems.sort(key=lambda text: not text.startswith("unknown recipe key"))
        prefix = "" if problems[0].startswith("unknown recipe key") else "recipe: "
        raise UserError(prefix + "; ".join(problems))
    return recipe
