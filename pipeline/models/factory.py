"""Building, saving and loading any kind of model.

A model folder holds safetensors, the config and, in `FOLDER/tokenizer/`, the tokenizer. Nothing is unpickled
and no remote code runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from data_prep.common.errors import UserError, counted, first_line
from data_prep.common.files import keep_umask
from data_prep.text.hugging_face import write_hugging_face
from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from pipeline.models.anchor_lm import AnchorConfig, AnchorLM
from pipeline.models.attention import HF_ATTENTION
from pipeline.models.backbone import backbone_config, load_backbone, load_packable
from pipeline.models.folders import load_pretrained, model_config, read_config
from pipeline.models.sentence_vae import SentenceVAE, SentenceVAEConfig
from pipeline.models.sllm import SLLM, SLLMConfig
from pipeline.models.stack import StackConfig, StackLM
from pipeline.models.token_lm import TokenLM

if TYPE_CHECKING:
    from pipeline.config.schema import Recipe


def _text_keys(tokenizer: Tokenizer, sentence_settings: dict, window_tokens: int) -> dict:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "sentence_settings": sentence_settings,
        "window_tokens": window_tokens,
    }


def _text_sizes(settings: dict, text: dict, tokenizer: Tokenizer, where: str) -> dict:
    """Settings of a part that reads tokens, with the vocabulary and the longest sentence of the text."""
    settings = {"vocab_size": tokenizer.vocab_size, **{k: v for k, v in settings.items() if v is not None}}
    _require_vocabulary(settings["vocab_size"], tokenizer, where)
    settings.setdefault("max_sentence_tokens", text["sentence_settings"].get("max_tokens", 64))
    _require_sentence_room(settings["max_sentence_tokens"], text, where)
    return settings


def _require_vocabulary(size: int, tokenizer: Tokenizer, where: str) -> None:
    if size < tokenizer.vocab_size:
        entries = counted(tokenizer.vocab_size, "entry", "entries")
        raise UserError(f"{where}.vocab_size is {size}, but the shards' tokenizer has {entries}")


def _vae_config(settings: dict, text: dict, tokenizer: Tokenizer) -> SentenceVAEConfig:
    return SentenceVAEConfig(**_text_sizes(settings, text, tokenizer, "model.vae"), **text)


def _require_sentence_room(room: int, text: dict, where: str) -> None:
    longest = text["sentence_settings"].get("max_tokens", 0)
    if longest > room:
        raise UserError(
            f"the shards hold sentences of up to {counted(longest, 'token')}, but the model takes "
            f"{room} ({where}.max_sentence_tokens)"
        )


def _require_room(config: PreTrainedConfig, window_tokens: int) -> None:
    # A window of one-token sentences needs as many positions as it has tokens. Without this check one rank
    # would fail in the middle of a run while the others wait for it.
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window_tokens + 1 > positions:
        raise UserError(
            f"data.window_tokens {window_tokens} and a start position need "
            f"{counted(window_tokens + 1, 'position')}, "
            f"but the backbone has {positions}; lower data.window_tokens or raise "
            "model.backbone.max_position_embeddings"
        )


def build_model(
    objective: str,
    vae: dict,
    backbone: dict,
    tokenizer: Tokenizer,
    sentence_settings: dict,
    window_tokens: int,
    focal_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    embedding_weight: float = 0.0,
    sentence_ends: bool = False,
    stack: dict | None = None,
    anchors: dict | None = None,
) -> nn.Module:
    """A new model for one training run, fp32 on the CPU.

    Args:
        objective: `vae`, `sllm` or `lm`.
        vae: `SentenceVAEConfig` keys and `init_embeddings_from` (folder of a token model), or
            `{"path": FOLDER}` of a trained SentenceVAE (`sllm`).
        backbone: Hugging Face config keys with `model_type`, or `{"path": FOLDER}` (`sllm`, `lm`).
        tokenizer: the shards' tokenizer; gives vocabulary size and special ids.
        sentence_settings: how the shards were cut (`segmenter`, `language`, `max_tokens`); kept in the
            model's config.
        window_tokens: longest window, kept in the config; must fit the backbone's positions.
        focal_gamma, label_smoothing, z_loss: the training loss (vocabulary_head.py); all 0 is cross-entropy.
        embedding_weight: weight of the embedding loss (`SLLM.forward`; `sllm` only).
        sentence_ends: the model reads and predicts an end symbol after every sentence (`lm` only).
        stack: of layout `stack` (`sllm`): sizes of the token layers, `memory`, `add_vector`, `ends`; no
            `vae`.
        anchors: of layout `anchors` (`lm`): what a token sees.
    Raises: UserError for settings that do not fit together.
    """
    text = _text_keys(tokenizer, sentence_settings, window_tokens)
    loss = {"focal_gamma": focal_gamma, "label_smoothing": label_smoothing, "z_loss": z_loss}
    vae = dict(vae)
    embeddings = vae.pop("init_embeddings_from", None)  # used once: not part of the model's config
    model: Any
    try:
        if objective == "lm":
            text |= {"sentence_ends": True} if sentence_ends else {}
            causal = _build_causal_lm(backbone, text, tokenizer)
            if anchors is None:
                return TokenLM(causal, **loss)
            settings: dict[str, Any] = {**anchors, **loss, **text}
            model = AnchorLM(AnchorConfig(causal.config, **settings))
            model.tokens.model.load_state_dict(causal.state_dict())
            return model
        if stack is not None:
            return _build_stack({**stack, **loss}, backbone, text, tokenizer)
        if objective == "vae":
            model = SentenceVAE(_vae_config({**vae, **loss}, text, tokenizer))
        else:
            model = _build_sllm(vae, backbone, text, tokenizer, loss, embedding_weight)
        if embeddings is not None:
            if (Path(embeddings) / "tokenizer").is_dir():
                _same_tokenizer(embeddings, tokenizer)
            source = load_packable(AutoModelForCausalLM, embeddings)
            inner = model.vae if isinstance(model, SLLM) else model
            inner.init_embeddings_from(source, str(embeddings))
        return model
    except UserError:
        raise
    except Exception as error:  # wrong types and sizes fail deep in configs and layers, in many ways
        raise UserError(f"model: cannot be built from these settings ({first_line(error)})") from error


def new_model(recipe: Recipe, tokenizer: Any, sentence_settings: dict[str, Any]) -> nn.Module:
    """The recipe's model with random weights; `tokenizer` needs `vocab_size` and the special ids only."""
    model, stack = recipe.model, None
    if model.layout == "stack":
        stack = {**model.tokens, "memory": model.memory, "add_vector": model.add_vector}
        stack["ends"] = model.ends
    return build_model(
        recipe.objective,
        recipe.model.vae,
        recipe.model.backbone,
        tokenizer,
        sentence_settings,
        recipe.data.window_tokens,
        **recipe.loss.head_settings(),
        embedding_weight=recipe.loss.embedding_weight,
        sentence_ends=recipe.data.sentence_ends,
        stack=stack,
        anchors=model.anchors if model.layout == "anchors" else None,
    )


def _build_sllm(
    vae: dict, backbone: dict, text: dict, tokenizer: Tokenizer, loss: dict, embedding_weight: float
) -> SLLM:
    trained_vae = None
    if vae.get("path"):
        trained_vae = load_model(vae["path"])
        if not isinstance(trained_vae, SentenceVAE):
            model_type = model_config(trained_vae).model_type
            raise UserError(f"model.vae.path {vae['path']}: holds a {model_type}, not a sentence_vae")
        _same_tokenizer(vae["path"], tokenizer)
        vae_config = trained_vae.config
        assert isinstance(vae_config, SentenceVAEConfig)
        vae_config.update(loss)
        _require_sentence_room(vae_config.max_sentence_tokens, text, "model.vae")
    else:
        vae_config = _vae_config({**vae, **loss}, text, tokenizer)
    config, weights = _backbone(backbone, text)
    model = SLLM(SLLMConfig(vae_config, config, embedding_weight=embedding_weight, **text))
    if trained_vae is not None:
        model.vae.load_state_dict(trained_vae.state_dict())
    if weights is not None:
        # The published layout has no final norm and no projections; all its other weights must be there.
        has = model.backbone.state_dict().keys()
        model.backbone.load_state_dict({name: weight for name, weight in weights.items() if name in has})
    return model


def _build_stack(settings: dict, backbone: dict, text: dict, tokenizer: Tokenizer) -> StackLM:
    config, weights = _backbone(backbone, text)
    sizes = _text_sizes(settings, text, tokenizer, "model.tokens")
    model = StackLM(StackConfig(config, **sizes, **text))
    if weights is not None:
        model.backbone.load_state_dict(weights)
    return model


def _backbone(backbone: dict, text: dict) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """A backbone's config, and its weights if it is loaded."""
    loaded = load_backbone(backbone["path"]) if backbone.get("path") else None
    config = backbone_config(backbone) if loaded is None else loaded.config
    _require_room(config, text["window_tokens"])
    return config, None if loaded is None else loaded.state_dict()


def _build_causal_lm(backbone: dict, text: dict, tokenizer: Tokenizer) -> PreTrainedModel:
    if backbone.get("path"):
        model = load_packable(AutoModelForCausalLM, backbone["path"])
    else:
        vocab_size = backbone.get("vocab_size") or tokenizer.vocab_size
        config = backbone_config({**backbone, **text, "vocab_size": vocab_size})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=HF_ATTENTION)
    _require_vocabulary(model.config.vocab_size, tokenizer, backbone.get("path") or "model.backbone")
    # A sentence may be one token and its end.
    _require_room(model.config, text["window_tokens"] * (2 if text.get("sentence_ends") else 1))
    _set_text(model, text)
    return model


def _set_text(model: PreTrainedModel, text: dict) -> None:
    # Batches have no padding, and the family's default pad id may be a real symbol of this tokenizer: its
    # embedding would never be trained.
    model.get_input_embeddings().padding_idx = None
    for key, value in text.items():
        setattr(model.config, key, value)
        if key.endswith("_token_id"):  # saved in generation_config.json, which `generate` reads
            setattr(model.generation_config, key, value)


def set_text_keys(
    model: PreTrainedModel, tokenizer: Tokenizer, sentence_settings: dict, window_tokens: int
) -> None:
    """Make a Hugging Face causal LM one of ours: its config says how text is cut and which symbols are
    special."""
    _set_text(model, _text_keys(tokenizer, sentence_settings, window_tokens))


def _same_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    if load_tokenizer(Path(folder) / "tokenizer").fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder}: was trained with another tokenizer than the one that made the shards")


def save_model(
    model: nn.Module, folder: str | Path, tokenizer: Tokenizer, max_shard_size: str = "5GB"
) -> None:
    """Write safetensors (several files and an index above `max_shard_size`), config.json and tokenizer/; a
    `TokenLM` is saved as the Hugging Face model it wraps. `AutoTokenizer` loads the folder too."""
    inner = model.model if isinstance(model, TokenLM) else model
    assert isinstance(inner, PreTrainedModel)
    inner.save_pretrained(folder, max_shard_size=max_shard_size)
    keep_umask(Path(folder))
    tokenizer.save(Path(folder) / "tokenizer")
    write_hugging_face(tokenizer, folder)


def load_model(folder: str | Path) -> nn.Module:
    """A model folder as `SentenceVAE`, `SLLM`, `StackLM` or `TokenLM` (any Hugging Face causal LM): fp32, on
    the CPU, in eval mode.

    Raises: UserError for a folder without a loadable model, or whose weights do not match its config.
    """
    folder = Path(folder)
    for ours in (SentenceVAE, SLLM, StackLM, AnchorLM):
        if read_config(folder).get("model_type") == ours.config_class.model_type:
            return load_pretrained(ours, folder, strict=True)
    return TokenLM(load_packable(AutoModelForCausalLM, folder)).eval()
