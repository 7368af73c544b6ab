"""The model card: README.md of an exported model folder, in Hugging Face's format.

It is made from the run directory and the exported checkpoint alone, so the same run gives the same card. What
the run does not know (a license, a model id of the Hub) is left out. The text is in `model_card.md.jinja`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from data_prep.common.errors import UserError
from pipeline.checkpoints.store import Meta
from pipeline.data.plan import Position
from pipeline.training.provenance import PROVENANCE
from pipeline.training.run_log import EVALUATIONS, read_records

ORIGIN = "training.json"  # where a folder's weights come from; its presence says that we wrote the folder
RESULTS = "results"  # of a run: outputs of `sllm evaluate --json` that the user wants on the card
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_EVALUATION_COLUMNS = ["step", "bits_per_byte", "ppl", "tokens", "bytes"]
_RESULT_COLUMNS = (
    "bits_per_byte",
    "ppl",
    "vector_gain",
    "cross_entropy",
    "exact_match",
    "tokens",
    "bytes",
    "documents",
    "window_tokens",
)
_VAE_SIZES = ("vocab_size", "hidden_size", "layers", "heads", "ffn_size", "max_sentence_tokens")
_BACKBONE_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def model_card(run_dir: str | Path, checkpoint: str, meta: Meta, parameters: int, folder_name: str) -> str:
    """The card's text.

    Args:
        run_dir: the run directory.
        checkpoint: name of the exported checkpoint.
        meta: that checkpoint's `meta.json`.
        parameters: of the exported model, shared ones counted once.
        folder_name: of the export, for the example.
    Raises: UserError for a file in `results/` that is no result of these weights.
    """
    run_dir = Path(run_dir)
    known = _read_json(run_dir / PROVENANCE) or {}
    settings = meta.model_config.get("sentence_settings") or {}
    measured = [row for row in read_records(run_dir / EVALUATIONS) if row["step"] <= meta.step]
    evaluations = []
    if measured:
        best = min(measured, key=lambda row: (_finite(row["bits_per_byte"]), row["step"]))
        evaluations = [
            [name, *_cells(row, _EVALUATION_COLUMNS)]
            for name, row in (("best", best), ("last", measured[-1]))
        ]
    given = _given_results(run_dir, checkpoint, meta)
    columns = [name for name in _RESULT_COLUMNS if any(row.get(name) is not None for row in given.values())]
    card = ModelCard.from_template(
        _card_data(meta, known, settings),
        template_path=str(_TEMPLATE),
        name=run_dir.resolve().name,
        objective=meta.objective,
        folder=folder_name,
        step=meta.step,
        recipe=meta.recipe,
        recipe_yaml=yaml.safe_dump(meta.recipe, sort_keys=False, allow_unicode=True),
        evaluation_columns=_EVALUATION_COLUMNS,
        evaluations=evaluations,
        result_columns=columns,
        results=[[name, row["data"], *_cells(row, columns)] for name, row in given.items()],
        fingerprints=[(name, row["data_fingerprint"]) for name, row in given.items()],
        model=_model(meta, parameters),
        training=_training(run_dir, checkpoint, meta, known),
        data=list(_data(meta, known)),
        window_tokens=_number(meta.model_config["window_tokens"]),
        sentences=settings if meta.objective != "lm" and "max_tokens" in settings else None,
        number=_number,
    )
    return f"{card}\n"


def _card_data(meta: Meta, known: dict[str, Any], settings: dict[str, Any]) -> ModelCardData:
    languages = {part["settings"]["language"] for part in known.get("shards", [])}
    languages.add(settings.get("language"))
    path = meta.recipe["model"]["backbone"].get("path")
    tags = {"vae": ["sentence-vae"], "sllm": ["sllm", _backbone(meta).get("model_type")], "lm": []}
    return ModelCardData(
        language=sorted(languages) if languages <= {"en", "zh"} else None,
        library_name="transformers" if meta.objective == "lm" else "sentence-llm",
        pipeline_tag=None if meta.objective == "vae" else "text-generation",
        # A relative `owner/name` is an id of the Hub; of any other folder, no id is known.
        base_model=path if path and len(Path(path).parts) == 2 and path[0] not in "./" else None,
        tags=["sentence-llm", *tags[meta.objective]],
    )


def _backbone(meta: Meta) -> dict[str, Any]:
    return meta.model_config["backbone"] if meta.objective == "sllm" else meta.model_config


def _given_results(run_dir: Path, checkpoint: str, meta: Meta) -> dict[str, dict[str, Any]]:
    """The files of `results/` by name. The `training.json` of the folder that each one measured must name the
    exported checkpoint."""
    found = {}
    for path in sorted((run_dir / RESULTS).glob("*.json")):
        result = _read_json(path)
        if not isinstance(result, dict) or not {"model", "kind", "data", "data_fingerprint"} <= set(result):
            raise UserError(
                f"{path} is no output of `sllm evaluate --json`: remove it from {run_dir / RESULTS}"
            )
        origin = _read_json(Path(result["model"]) / ORIGIN) or {}
        same = origin.get("checkpoint") == checkpoint and origin.get("tokens") == meta.tokens
        if result["kind"] != meta.objective or not same or origin.get("recipe") != meta.recipe:
            raise UserError(
                f"{path} measured {result['model']}, which does not hold {checkpoint} of this run: "
                f"remove it, or measure that export again and export once more"
            )
        found[path.stem] = result
    return found


def _model(meta: Meta, parameters: int) -> dict[str, str]:
    rows = {"parameters": _number(parameters)}
    sizes = {"vae": meta.model_config, "sllm": meta.model_config.get("vae") or {}, "lm": {}}[meta.objective]
    rows |= {f"SentenceVAE {name}": _number(sizes[name]) for name in _VAE_SIZES if name in sizes}
    if meta.objective != "vae":
        backbone = _backbone(meta)
        rows["backbone model_type"] = backbone["model_type"]
        rows |= {f"backbone {name}": _number(backbone[name]) for name in _BACKBONE_SIZES if name in backbone}
    for name in ("vae", "backbone"):
        if path := meta.recipe["model"][name].get("path"):
            rows[f"{name} began from"] = f"`{path}`"
    return rows


def _training(run_dir: Path, checkpoint: str, meta: Meta, known: dict[str, Any]) -> dict[str, str]:
    strategy = _read_json(run_dir / "ds_config.json") or {}
    half = next((name for name in ("bf16", "fp16") if strategy.get(name, {}).get("enabled")), "fp32")
    rows = {
        "checkpoint": checkpoint,
        "steps": _number(meta.step),
        "tokens": _number(meta.tokens),
        "epochs begun": _number(Position.from_json(meta.position).epochs_begun),
        "ranks": _number(meta.world),
        "ZeRO stage": _number(meta.zero_stage),
        "precision": half,
    }
    rows |= {name: str(known[name]) for name in ("device", "python") if name in known}
    return rows | dict(sorted(known.get("packages", {}).items()))


def _data(meta: Meta, known: dict[str, Any]) -> list[str]:
    lines = []
    for role, name in (("shards", "training"), ("validation", "validation")):
        for part in known.get(role, []):
            counts = ", ".join(f"{_number(count)} {of}" for of, count in part["totals"].items())
            settings = ", ".join(f"{key} {value}" for key, value in part["settings"].items())
            lines.append(
                f"{name}: `{part['folder']}`: {counts}; {settings}; fingerprint `{part['fingerprint']}`"
            )
    if lines:
        return lines
    # A run that started before provenance was recorded.
    lines = [f"training: fingerprint `{one}`" for one in meta.shards]
    return lines + ([f"validation: fingerprint `{meta.validation}`"] if meta.validation else [])


def _read_json(path: Path) -> Any:
    """A JSON file's value, None when there is no such file. UserError when it does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None


def _finite(value: float | None) -> float:
    return float("inf") if value is None else value


def _number(value: Any) -> str:
    """Whole numbers with separators, others to five digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _cells(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    return ["" if row.get(name) is None else _number(row[name]) for name in columns]
