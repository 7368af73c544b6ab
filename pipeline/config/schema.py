"""Recipes: what one training run is, from YAML and `--key value` overrides, checked before torch loads.

In: a recipe file (`pipeline/recipes/*.yaml`, which may start from another one with `base: other.yaml`) and
the command line's overrides. Out: a `Recipe`, every value of the right type, every key known. Called by
`train.py` before torch is imported, so this module imports nothing but PyYAML: a wrong key is refused within
a second. How text becomes typed values is `recipe_reading.py`'s.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError
from pipeline.config.library import find_recipe
from pipeline.config.loading import build, coerce, parse_overrides, parse_value, read_yaml, unknown_key

OBJECTIVES = ("vae", "sllm", "lm")

# Keys of `model.vae`: `path`, or those of SentenceVAEConfig. What is left out comes from the shards'
# tokenizer and settings (vocabulary size, longest sentence) or is the usual value. `init_embeddings_from`,
# the folder of a token model, acts once, when the model is made, and is kept in no config.
VAE_KEYS = (
    "path",
    "init_embeddings_from",
    "hidden_size",
    "embedding_size",
    "layers",
    "encoder_layers",
    "heads",
    "ffn_size",
    "vocab_size",
    "max_sentence_tokens",
    "layout",
    "positions",
    "fusion",
    "vectors",
    "condition",
    "condition_range",
    "prefix_slots",
    "context_sentences",
    "dropout",
    "latent_noise",
    "variational",
    "kl_weight",
    "free_bits",
    "initializer_range",
    "tie_word_embeddings",
)

# Keys of `model.backbone` by its `model_type`: the families whose packing, causality and cache are under
# test, and those of their Hugging Face config's keys that a model is made from.
OPT_KEYS = (
    "path",
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "ffn_dim",
    "max_position_embeddings",
    "word_embed_proj_dim",
    "do_layer_norm_before",
    "dropout",
    "attention_dropout",
    "activation_function",
    "layerdrop",
    "init_std",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "tie_word_embeddings",
)
QWEN2_KEYS = (
    "path",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
)
BACKBONE_KEYS = {
    "opt": OPT_KEYS,
    "llama": (*QWEN2_KEYS, "head_dim", "attention_bias", "mlp_bias"),
    "qwen2": (*QWEN2_KEYS, "use_sliding_window"),
    "qwen3": (*QWEN2_KEYS, "use_sliding_window", "head_dim", "attention_bias"),
}


@dataclass
class DataRecipe:
    """Which shards are read; one step is `bins_per_step` bins of at most `bin_tokens` tokens.

    weights: each shard set's share of the bins, in any unit; without them the sets are one pool.
    """

    shards: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    validation: str | None = None
    window_tokens: int = 1024
    bin_tokens: int = 8192
    bins_per_step: int = 1

    def __post_init__(self) -> None:
        for name in ("window_tokens", "bin_tokens", "bins_per_step"):
            _require_positive(f"data.{name}", getattr(self, name))
        if self.window_tokens > self.bin_tokens:
            raise UserError(
                f"recipe: data.window_tokens ({self.window_tokens}) is larger than data.bin_tokens "
                f"({self.bin_tokens}): a window must fit into a bin"
            )
        if self.weights is not None:
            if len(self.weights) != len(self.shards):
                raise UserError(
                    f"recipe: data.weights has {len(self.weights)} numbers for {len(self.shards)} shard "
                    "sets: give one for each of data.shards"
                )
            if not all(0 < weight < math.inf for weight in self.weights):
                raise UserError(f"recipe: data.weights must be positive numbers, not {self.weights}")


@dataclass
class ModelRecipe:
    """`vae`: sizes of a SentenceVAE; `backbone`: a Hugging Face config's keys; either may be a `path`."""

    vae: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_known("model.vae.", self.vae, VAE_KEYS)
        family = str(self.backbone.get("model_type", "opt"))
        if family not in BACKBONE_KEYS:
            near = difflib.get_close_matches(family, BACKBONE_KEYS, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(
                f"recipe: model.backbone.model_type must be one of {', '.join(BACKBONE_KEYS)}, "
                f"not {family!r}{hint}"
            )
        _require_known("model.backbone.", self.backbone, BACKBONE_KEYS[family])
        for name, part in (("vae", self.vae), ("backbone", self.backbone)):
            sizes = sorted(set(part) - {"path"})
            if part.get("path") and sizes:
                raise UserError(
                    f"recipe: model.{name} has a path and sizes ({', '.join(sizes)}): give one or the other"
                )


@dataclass
class LossRecipe:
    """`cross_entropy`, or `focal` with the paper's gamma (section 4: focal loss, gamma 2); either with label
    smoothing and z-loss (pipeline/head.py), and for an SLLM with a weight on how far each predicted vector is
    from the next sentence's embedding (`sllm.py`). Plain cross-entropy is reported whatever is trained on."""

    kind: str = "cross_entropy"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    embedding_weight: float = 0.0

    def __post_init__(self) -> None:
        _require_one_of("loss.kind", self.kind, ("cross_entropy", "focal"))
        if not self.focal_gamma >= 1:  # below 1 its gradient has a pole where the target is certain
            raise UserError(f"recipe: loss.focal_gamma must be at least 1, not {self.focal_gamma}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"recipe: loss.label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        for key in ("z_loss", "embedding_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"recipe: loss.{key} must not be negative, not {getattr(self, key)}")

    def head_settings(self) -> dict[str, float]:
        """What the vocabulary head takes: focal_gamma (0 for cross-entropy), label_smoothing, z_loss."""
        return {
            "focal_gamma": self.focal_gamma if self.kind == "focal" else 0.0,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }


@dataclass
class OptimizerRecipe:
    """AdamW; weight decay touches matrices only (no biases, no norms, no embeddings).

    parts: by the name of a module in the model (`vae.encoder`, `backbone.decoder.layers.0-5`), either
    `lr_scale` (times `lr`) or `freeze: true`. Of two names that fit, the longer one counts.
    """

    lr: float = 1.0e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"recipe: optimizer.betas must be two numbers in [0, 1), not {self.betas}")
        if self.lr < 0:
            raise UserError(f"recipe: optimizer.lr must not be negative, not {self.lr}")
        for name, settings in self.parts.items():
            where = f"recipe: optimizer.parts.{name}"
            if settings == {"freeze": True}:
                continue
            if not isinstance(settings, dict) or set(settings) != {"lr_scale"}:
                raise UserError(f"{where} must be {{lr_scale: NUMBER}} or {{freeze: true}}, not {settings!r}")
            scale = settings["lr_scale"] = coerce(float, settings["lr_scale"], f"{where[8:]}.lr_scale")
            if not 0 < scale < math.inf:
                raise UserError(f"{where}.lr_scale must be above 0, not {scale}: freeze: true trains nothing")


@dataclass
class ScheduleRecipe:
    """Learning rate: up over `warmup` (a fraction of the run), then down to `final` times the peak.

    `cosine` and `linear` fall all the way, `wsd` (warm-up, stable, decay) stays at the peak and falls in a
    line over the last `decay` of the run, `constant` stays.
    """

    kind: str = "cosine"
    warmup: float = 0.02
    final: float = 0.1
    decay: float = 0.2

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

    def __post_init__(self) -> None:
        _require_one_of("schedule.kind", self.kind, ("cosine", "linear", "wsd", "constant"))
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"recipe: schedule.{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.kind == "wsd" and not 0 < self.decay <= 1 - self.warmup:
            raise UserError(
                f"recipe: schedule.decay must be above 0 and leave room for warmup ({self.warmup}), "
                f"not {self.decay}"
            )


@dataclass
class TrainingRecipe:
    """How long a run is (`max_tokens` or `max_steps`, whichever comes first) and what happens on the way.

    `eval_every`, `save_every` and `eval_bins` count steps, steps and bins; `keep` is the number of last
    checkpoints kept. `compile`: transformer layers go through torch.compile (a minute or more at the start;
    `engine.layers_to_compile`). `activation_checkpointing`: every transformer layer is computed a second time
    in the backward pass, so that little of it is kept in memory. `ema`: decay of a running average of the
    weights, kept beside them for `sllm export --weights ema`.
    """

    max_tokens: int | None = None
    max_steps: int | None = None
    eval_every: int = 200
    eval_bins: int = 32
    save_every: int = 200
    keep: int = 2
    compile: bool = False
    activation_checkpointing: bool = False
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"recipe: training.ema must be null or lie in (0, 1), not {self.ema}")
        if self.max_tokens is None and self.max_steps is None:
            raise UserError(
                "recipe: set training.max_tokens or training.max_steps, or the run would never end"
            )
        for name in ("max_tokens", "max_steps", "eval_every", "eval_bins", "save_every", "keep"):
            if getattr(self, name) is not None:
                _require_positive(f"training.{name}", getattr(self, name))

    def progress(self, step: int, tokens: int) -> float:
        """Share of the run that is done after `step` steps and `tokens` real tokens, in [0, 1]."""
        shares = [0.0]
        if self.max_tokens is not None:
            shares.append(tokens / self.max_tokens)
        if self.max_steps is not None:
            shares.append(step / self.max_steps)
        return min(1.0, max(shares))


@dataclass
class HealthRecipe:
    """When a step is skipped, and when the run ends because it is not well (`health.py`).

    max_skips: skipped steps in a row that end the run. loss_spike, norm_spike: skip a step whose loss or
    gradient norm is above so many times the median of the last accepted ones; null skips for values that are
    not finite only. hang_seconds: a run in which nothing is finished for so long ends; null: never.
    """

    max_skips: int = 5
    loss_spike: float | None = None
    norm_spike: float | None = None
    hang_seconds: float | None = 1200.0

    def __post_init__(self) -> None:
        _require_positive("health.max_skips", self.max_skips)
        for name in ("loss_spike", "norm_spike"):
            factor = getattr(self, name)
            if factor is not None and not 1 < factor < math.inf:
                raise UserError(f"recipe: health.{name} must be null or a number above 1, not {factor}")
        if self.hang_seconds is not None and not 0 < self.hang_seconds < math.inf:
            raise UserError(
                f"recipe: health.hang_seconds must be null or a positive number, not {self.hang_seconds}"
            )


@dataclass
class LogRecipe:
    """Where figures go beside metrics.jsonl; without a terminal, a line every `console_every` steps.

    `profile`: steps of which `profile_ranks` write a trace, "10-12" or "10" (`profiling.py`).
    """

    tensorboard: bool = True
    wandb: bool = False
    console_every: int = 10
    profile: str | None = None
    profile_ranks: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        _require_positive("log.console_every", self.console_every)
        if self.profile is not None and not 1 <= self.profile_steps()[0] <= self.profile_steps()[1]:
            raise UserError(f"recipe: log.profile must be steps such as 10-12, not {self.profile!r}")

    def profile_steps(self) -> tuple[int, int]:
        """First and last step of `profile`; (0, 0) when it is no such thing."""
        first, dash, last = (self.profile or "").partition("-")
        last = last if dash else first
        return (int(first), int(last)) if first.isdecimal() and last.isdecimal() else (0, 0)


@dataclass
class Recipe:
    """One training run. The key names are those of the YAML file and of the command line's overrides."""

    objective: str
    output_dir: str
    seed: int = 1
    init_from: str | None = None
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    health: HealthRecipe = field(default_factory=HealthRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)

    def __post_init__(self) -> None:
        _require_one_of("objective", self.objective, OBJECTIVES)
        if not self.data.shards:
            raise UserError(
                "recipe: data.shards is empty: name the shard folders, for example --data.shards shards/train"
            )
        needs = {"vae": ("vae",), "sllm": ("vae", "backbone"), "lm": ("backbone",)}[self.objective]
        for name in needs:
            if not getattr(self.model, name):
                raise UserError(f"recipe: objective {self.objective} needs model.{name} (sizes, or a path)")
        if self.loss.embedding_weight and self.objective != "sllm":
            raise UserError(f"recipe: loss.embedding_weight is for objective sllm, not {self.objective}")
        if self.objective == "vae" and self.model.vae.get("path"):
            raise UserError(
                "recipe: objective vae trains a SentenceVAE from sizes: model.vae.path is for objective sllm"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the layout of the YAML file."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The resolved recipe, as kept in the run directory."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `["--training.max_steps", "10", …]` and check everything.

    Raises UserError for a missing or unreadable file, an unknown key (with the nearest known one) or a wrong
    value.
    """
    values = read_yaml(find_recipe(path))
    for key, texts in parse_overrides(overrides or []):
        _set_override(values, key, texts)
    return build(Recipe, values, known_keys())


def _set_override(values: dict[str, Any], key: str, texts: list[str]) -> None:
    """Put one command line value where it belongs; types are settled later by `build`."""
    parts = key.split(".")
    is_model_part = len(parts) == 3 and parts[0] == "model" and parts[1] in ("vae", "backbone")
    if not is_model_part and key not in known_keys():
        raise unknown_key(key, known_keys())
    parsed = [parse_value(text) for text in texts]
    node = values
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    if is_model_part and (parts[2] == "path" or node.get("path")):
        node.clear()
    node[parts[-1]] = parsed[0] if len(parsed) == 1 else parsed


def known_keys() -> list[str]:
    """Every dotted key an override may name, model parts included."""
    keys = []
    for name, kind in typing.get_type_hints(Recipe).items():
        if name == "model":
            keys += [f"model.vae.{key}" for key in VAE_KEYS]
            keys += [f"model.backbone.{key}" for key in dict.fromkeys(sum(BACKBONE_KEYS.values(), ()))]
        elif dataclasses.is_dataclass(kind):
            keys += [f"{name}.{part.name}" for part in dataclasses.fields(kind)]
        else:
            keys.append(name)
    return keys


def _require_known(where: str, values: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise unknown_key(f"{where}{key}", [where + name for name in known])


def _require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"recipe: {key} must be one of {', '.join(allowed)}, not {value!r}")


def _require_positive(key: str, value: int) -> None:
    if value < 1:
        raise UserError(f"recipe: {key} must be at least 1, not {value}")
