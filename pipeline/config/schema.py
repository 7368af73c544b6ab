"""Recipes: what one training run is, every key with its type, default and meaning.

Imports neither torch nor transformers, so that a wrong recipe is refused within a second.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError

from data_prep.common.errors import UserError, counted
from data_prep.common.remote import is_url
from pipeline.config.keys import (
    SECTION,
    Above1,
    AtLeast1,
    Below1,
    Count,
    Decay,
    Dict,
    Flag,
    List,
    Number,
    Positive,
    Section,
    Share,
    Text,
    Whole,
    expected,
    explain,
    keys_of,
    read_number,
    unknown_key,
)
from pipeline.config.library import find_recipe
from pipeline.config.loading import parse_overrides, read_yaml, set_override
from pipeline.config.model_recipe import (
    BACKBONES,
    AnchorsRecipe,
    LoraRecipe,
    TokensRecipe,
    VaeRecipe,
    given_anchors,
    given_backbone,
    given_lora,
    given_tokens,
    given_vae,
)


class DataRecipe(Section):
    """The shards to read. One step is `bins_per_step` bins of at most `bin_tokens` tokens."""

    shards: List[Text] = Field([], description="shard folders to train on, made with one tokenizer")
    weights: List[Positive] | None = Field(None, description="share of each set in the bins; null: one pool")
    validation: Text | None = Field(None, description="shard folder to validate on; null: no validation")
    window_tokens: Count = Field(1024, description="longest window; longer documents are cut into windows")
    bin_tokens: Count = Field(8192, description="tokens of a bin at most")
    bins_per_step: Count = Field(1, description="bins of one step, over all ranks")
    # Resolved recipes from before this key stay the same.
    sentence_ends: Flag = Field(
        False,
        exclude_if=operator.not_,
        description="the token model reads and predicts an end symbol after every sentence (lm)",
    )

    def problems(self) -> Iterator[str]:
        if self.window_tokens > self.bin_tokens:
            yield (
                f"data.window_tokens ({self.window_tokens}) is larger than data.bin_tokens "
                f"({self.bin_tokens}): a window must fit into a bin"
            )
        if self.weights is not None and len(self.weights) != len(self.shards):
            yield (
                f"data.weights has {counted(len(self.weights), 'number')} for "
                f"{counted(len(self.shards), 'shard set')}: give one for each of data.shards"
            )


class ModelRecipe(Section):
    """Dicts of the keys that are given; the model's config has the defaults of the others."""

    # Resolved recipes from before these keys stay the same.
    layout: Literal["vae", "stack", "anchors"] = Field(
        "vae",
        exclude_if="vae".__eq__,
        description="stack: token layers of model.tokens run across sentence borders (sllm); anchors: a "
        "token model sees a window and an anchor of each earlier sentence (lm)",
    )
    memory: Whole = Field(
        0,
        exclude_if=operator.not_,
        description="backbone outputs that the upper token layers attend to (stack)",
    )
    add_vector: Flag = Field(
        True,
        exclude_if=operator.truth,
        description="add the backbone's output to the next sentence's rows (stack)",
    )
    ends: Literal["predicted", "rule"] = Field(
        "predicted",
        exclude_if="predicted".__eq__,
        description="rule: the segmenter ends sentences, without symbols or bits (stack, anchors)",
    )
    vae: Annotated[Dict[Any], AfterValidator(given_vae)] = {}
    tokens: Annotated[Dict[Any], AfterValidator(given_tokens)] = Field({}, exclude_if=operator.not_)
    anchors: Annotated[Dict[Any], AfterValidator(given_anchors)] = Field({}, exclude_if=operator.not_)
    backbone: Annotated[Dict[Any], AfterValidator(given_backbone)] = {}
    lora: Annotated[Dict[Any], AfterValidator(given_lora)] = Field({}, exclude_if=operator.not_)

    @property
    def needed(self) -> tuple[str, ...]:
        """The parts of an SLLM."""
        return ("tokens" if self.layout == "stack" else "vae"), "backbone"

    def problems(self) -> Iterator[str]:
        if self.layout == "stack" and self.vae:
            yield "model.layout stack has no SentenceVAE: leave model.vae out, sizes are in model.tokens"
        by_rule = self.ends == "rule"
        others = self.tokens, self.memory, not self.add_vector, by_rule and self.layout != "anchors"
        if self.layout != "stack" and any(others):
            yield "model.tokens, memory, add_vector and ends are for model.layout stack"
        if self.layout == "anchors" and not by_rule:
            yield "model.layout anchors needs model.ends rule: an anchor may not depend on later text"
        if self.layout != "anchors" and self.anchors:
            yield "model.anchors is for model.layout anchors"
        for name, part in (("vae", self.vae), ("backbone", self.backbone)):
            sizes = sorted(set(part) - {"path"})
            if part.get("path") and sizes:
                yield f"model.{name} has a path and sizes ({', '.join(sizes)}): give one or the other"


class LossRecipe(Section):
    """What is trained on. Plain cross-entropy is always reported, too."""

    kind: Literal["cross_entropy", "focal"] = Field("cross_entropy", description="focal is the paper's")
    # Below 1 its gradient has a pole where the target is certain.
    focal_gamma: AtLeast1 = Field(2.0, description="gamma of the focal loss")
    label_smoothing: Below1 = Field(0.0, description="share of the target spread over the vocabulary")
    z_loss: Number = Field(0.0, description="weight of (log of the partition sum)²")
    embedding_weight: Number = Field(0.0, description="weight of 1 − cos(prediction, next vector) (sllm)")

    def head_settings(self) -> dict[str, float]:
        """Arguments of the vocabulary head: focal_gamma (0 for cross-entropy), label_smoothing, z_loss."""
        return {
            "focal_gamma": self.focal_gamma if self.kind == "focal" else 0.0,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }


def _optimizer_part(values: dict[str, Any]) -> dict[str, Any]:
    scale = read_number(values.get("lr_scale"))
    if values == {"freeze": True}:
        return values
    if set(values) != {"lr_scale"} or type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(f"must be {{lr_scale: NUMBER above 0}} or {{freeze: true}}, not {values!r}")
    return {"lr_scale": float(scale)}


Part = Annotated[dict[str, Any], AfterValidator(_optimizer_part)]
PARTS = (
    "by the name of a module (`vae.encoder`, `backbone.decoder.layers.0-5`), `{lr_scale: NUMBER}` (times lr) "
    "or `{freeze: true}`; of two names that fit, the longer one counts. Adapters of `model.lora` are `lora`, "
    "or `lora.` and a module, and no part of the module itself"
)


class OptimizerRecipe(Section):
    """AdamW, or Muon for the hidden matrices. Weight decay touches matrices only: no biases, no norms, no
    embeddings."""

    # Resolved recipes from before these keys stay the same.
    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        exclude_if="adamw".__eq__,
        description="muon: hidden matrices by Muon, all else by AdamW; both at the same rate",
    )
    momentum: Below1 = Field(
        0.95, exclude_if=(0.95).__eq__, description="decay of the average of gradients (muon)"
    )
    lr: Number = Field(1.0e-4, description="peak learning rate")
    betas: Annotated[list[Below1], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="decay of the averages of gradients and of squares"
    )
    eps: Positive = Field(1.0e-8, description="added to the denominator")
    weight_decay: Number = Field(0.01, description="decoupled weight decay")
    clip: Number = Field(1.0, description="largest gradient norm; 0: no clipping")
    parts: Dict[Part] = Field({}, description=PARTS)


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


class CheckpointsRecipe(Section):
    """How checkpoints are written; when, and how many stay, is in `training`."""

    background: Flag = Field(True, description="copy the state and write while training continues")
    upload: Text | None = Field(
        None, description="URL (s3://bucket/run) of a copy of the run, from which fresh machines resume"
    )

    def problems(self) -> Iterator[str]:
        if self.upload and not (is_url(self.upload) and self.upload.partition("://")[2].strip("/")):
            yield f"checkpoints.upload must be a URL such as s3://bucket/run, not {self.upload!r}"


class HealthRecipe(Section):
    """When a step is skipped, and when a diverging or hung run ends."""

    max_skips: Count = Field(5, description="skipped steps in a row that end the run")
    loss_spike: Above1 | None = Field(None, description="skip losses above so many times the recent median")
    norm_spike: Above1 | None = Field(None, description="the same for the gradient norm")
    # Timers take no more.
    hang_seconds: Annotated[Positive, Field(le=1e7)] | None = Field(
        1200.0, description="time without progress that ends the run"
    )


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
    output_dir: Text = Field(description="the run's folder")
    seed: Whole = Field(1, description="decides first weights, the order of bins and all noise")
    init_from: Text | None = Field(None, description="run or model folder that gives a new run its weights")
    data: DataRecipe = SECTION
    model: ModelRecipe = SECTION
    loss: LossRecipe = SECTION
    optimizer: OptimizerRecipe = SECTION
    schedule: ScheduleRecipe = SECTION
    training: TrainingRecipe = SECTION
    # Resolved recipes from before this section stay the same.
    checkpoints: CheckpointsRecipe = Field(
        CheckpointsRecipe.model_validate({}), exclude_if=CheckpointsRecipe.model_validate({}).__eq__
    )
    health: HealthRecipe = SECTION
    log: LogRecipe = SECTION

    def problems(self) -> Iterator[str]:
        if not self.data.shards:
            yield "data.shards is empty: name the shard folders, for example --data.shards shards/train"
        for layout, objective in (("stack", "sllm"), ("anchors", "lm")):
            if self.model.layout == layout and self.objective != objective:
                yield f"model.layout {layout} is for objective {objective}, not {self.objective}"
        if self.model.layout == "anchors" and self.data.sentence_ends:
            yield "data.sentence_ends is for a token model without model.layout anchors"
        needed = {"vae": ("vae",), "sllm": self.model.needed, "lm": ("backbone",)}
        for name in needed[self.objective]:
            if not getattr(self.model, name):
                yield f"objective {self.objective} needs model.{name} (sizes, or a path)"
        if self.loss.embedding_weight and (self.objective, self.model.layout) != ("sllm", "vae"):
            what = "model.layout stack" if self.objective == "sllm" else self.objective
            yield f"loss.embedding_weight is for objective sllm, not {what}"
        if self.data.sentence_ends and self.objective != "lm":
            yield f"data.sentence_ends is for objective lm: {self.objective} has sentence ends always"
        if self.model.lora and not self.model.backbone.get("path"):
            yield "model.lora needs model.backbone.path: a pretrained model, whose layers get the adapters"
        if self.objective == "vae" and self.model.vae.get("path"):
            yield "objective vae trains a SentenceVAE from sizes: model.vae.path is for objective sllm"

    @property
    def counted_as(self) -> str:
        """The objective with the same targets: ends by rule leave those of a token model."""
        return "lm" if self.model.ends == "rule" else self.objective

    @property
    def reading_part(self) -> dict[str, Any]:
        """The part of the model that reads tokens: its vocabulary, its longest sentence."""
        if self.objective == "lm":
            return self.model.backbone
        return self.model.tokens if self.model.layout == "stack" else self.model.vae

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the layout of the YAML file."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """The resolved recipe, as kept in the run directory."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


# The models that define the keys below each prefix.
SECTIONS: dict[str, list[type[Section]]] = {
    "": [Recipe],
    "data.": [DataRecipe],
    "model.": [ModelRecipe],
    "model.vae.": [VaeRecipe],
    "model.tokens.": [TokensRecipe],
    "model.anchors.": [AnchorsRecipe],
    "model.lora.": [LoraRecipe],
    "model.backbone.": [*BACKBONES.values()],
    "loss.": [LossRecipe],
    "optimizer.": [OptimizerRecipe],
    "schedule.": [ScheduleRecipe],
    "training.": [TrainingRecipe],
    "checkpoints.": [CheckpointsRecipe],
    "health.": [HealthRecipe],
    "log.": [LogRecipe],
}
# Every key that a file or an override may name, with its type, default and meaning.
KEYS = {
    key: field
    for prefix, kinds in SECTIONS.items()
    for kind in kinds
    for key, field in keys_of(kind, prefix).items()
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `["--training.max_steps", "10", …]` and check everything.

    Raises: UserError for a file that is missing or unreadable, or with all problems of its keys and values.
    """
    values = read_yaml(find_recipe(path))
    problems = []
    for key, texts in parse_overrides(overrides or []):
        # Which keys a backbone has, its family decides.
        if key in KEYS or key.rpartition(".")[0] == "model.backbone":
            set_override(values, key, texts, key in KEYS and expected(KEYS[key]).endswith("text"))
        else:
            problems.append(unknown_key(key, KEYS))
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += explain(error, KEYS)
    if problems:
        problems.sort(key=lambda text: not text.startswith("unknown recipe key"))
        prefix = "" if problems[0].startswith("unknown recipe key") else "recipe: "
        raise UserError(prefix + "; ".join(problems))
    return recipe
