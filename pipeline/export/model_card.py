"""The model card: README.md of an exported model folder, in Hugging Face's format.

It is made from the run directory and the exported checkpoint alone, so the same run gives the same card. What
the run does not know (a license, a model id of the Hub) is left out. The text is in `model_card.md.jinja`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from data_prep.common.errors import UserError, counted
from data_prep.common.files import read_json, write_atomically
from pipeline.checkpoints.store import Meta, checkpoints_folder, read_meta
from pipeline.data.plan import Position
from pipeline.training.run_files import Run

ORIGIN = "training.json"  # where a folder's weights come from; its presence says that we wrote the folder
RESULTS = "results"  # of a run: outputs of `sllm evaluate --json` that the user wants on the card
_WEIGHTS = ("checkpoint", "tokens", "recipe", "weights", "averaged")  # keys of ORIGIN that name the weights
_EVALUATION_COLUMNS = ("step", "bits_per_byte", "ppl", "tokens", "bytes")
_RESULT_COLUMNS = (
    "bits_per_byte",
    "ppl",
    "vector_gain",
    "shuffle_gain",
    "cross_entropy",
    "exact_match",
    "tokens",
    "bytes",
    "documents",
    "window_tokens",
)


def model_card(
    run_dir: str | Path, origin: dict[str, Any], meta: Meta, parameters: int, folder_name: str
) -> str:
    """The card's text.

    Args:
        run_dir: the run directory.
        origin: what the export's `ORIGIN` says: checkpoint, weights, averaged checkpoints.
        meta: that checkpoint's `meta.json`.
        parameters: of the exported model, shared ones counted once.
        folder_name: of the export, for the example.
    Raises: UserError for a file in `results/` that is no result of these weights.
    """
    run_dir = Path(run_dir)
    run = Run(run_dir)
    provenance, deepspeed = run.provenance, run.deepspeed
    evaluations = [row for row in run.evaluations if row["step"] <= meta.step]
    if evaluations:
        best = min(evaluations, key=lambda row: (_finite(row["bits_per_byte"]), row["step"]))
        evaluations = [{"evaluation": "best", **best}, {"evaluation": "last", **evaluations[-1]}]
    given = _given_results(run_dir, origin)
    results = [{"result": name, **row} for name, row in given.items()]
    columns = [name for name in _RESULT_COLUMNS if any(row.get(name) is not None for row in results)]
    settings = meta.model_config.get("sentence_settings") or {}
    layout = meta.recipe["model"].get("layout")
    anchors = meta.model_config if layout == "anchors" else {}
    token_model = anchors["backbone"] if anchors else meta.model_config
    parts = {"vae": (meta.model_config, {}), "lm": ({}, token_model)}
    vae, backbone = parts.get(meta.objective) or (
        meta.model_config.get("vae") or {},
        meta.model_config["backbone"],
    )
    stack = meta.model_config if layout == "stack" else {}
    card = ModelCard.from_template(
        _card_data(meta, provenance, settings, backbone),
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        name=run_dir.resolve().name,
        folder=folder_name,
        objective=meta.objective,
        origin=origin,
        meta=meta,
        recipe=meta.recipe,
        recipe_yaml=yaml.safe_dump(meta.recipe, sort_keys=False, allow_unicode=True),
        evaluations=_rows(evaluations, ("evaluation", *_EVALUATION_COLUMNS)),
        results=_rows(results, ("result", "data", *columns)),
        given=given,
        parameters=parameters,
        vae=vae,
        stack=stack,
        anchors=anchors,
        backbone=backbone,
        epochs=Position.from_json(meta.position).epochs_started,
        precision=next((half for half in ("bf16", "fp16") if deepspeed.get(half, {}).get("enabled")), "fp32"),
        provenance=provenance,
        sentence_settings=settings,
        number=_number,
        counted=counted,
    )
    return f"{card}\n"


def _card_data(
    meta: Meta, provenance: dict[str, Any], settings: dict[str, Any], backbone: dict[str, Any]
) -> ModelCardData:
    languages = {part["settings"]["language"] for part in provenance.get("shards", [])}
    languages.add(settings.get("language"))
    path = meta.recipe["model"]["backbone"].get("path")
    tags = {"vae": ["sentence-vae"], "sllm": ["sllm", backbone.get("model_type")], "lm": []}
    anchors = meta.recipe["model"].get("layout") == "anchors"
    return ModelCardData(
        language=sorted(languages) if languages <= {"en", "zh"} else None,
        library_name="sentence-llm" if anchors or meta.objective != "lm" else "transformers",
        pipeline_tag=None if meta.objective == "vae" else "text-generation",
        # A relative `owner/name` is an id of the Hub; of any other folder, no id is known.
        base_model=path if path and len(Path(path).parts) == 2 and path[0] not in "./" else None,
        tags=["sentence-llm", *tags[meta.objective]],
    )


def _given_results(run_dir: Path, ours: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of `results/` by name. The `training.json` of the folder that each one measured must name the
    exported weights."""
    found = {}
    for path in sorted((run_dir / RESULTS).glob("*.json")):
        result = read_json(path)
        if not {"model", "kind", "data", "data_fingerprint"} <= set(result):
            raise UserError(
                f"{path} is no output of `sllm evaluate --json`: remove it from {run_dir / RESULTS}"
            )
        origin = read_json(Path(result["model"]) / ORIGIN, default={})
        same = all(origin.get(key) == ours.get(key) for key in _WEIGHTS)
        if result["kind"] != ours["recipe"]["objective"] or not same:
            raise UserError(
                f"{path} measured {result['model']}, which does not hold {ours['checkpoint']} of this run as "
                "exported here: remove it, or measure that export again and rerun the export"
            )
        found[path.stem] = result
    return found


def require_export_of(model: str | Path, run_dir: str | Path) -> None:
    """Raises: UserError unless the model folder was exported from a checkpoint of this run."""
    origin = read_json(Path(model) / ORIGIN, default={})
    checkpoint = checkpoints_folder(run_dir) / str(origin.get("checkpoint"))
    if not checkpoint.is_dir() or read_meta(checkpoint).recipe != origin.get("recipe"):
        raise UserError(f"--record {run_dir}: {model} is no export of this run")


def record_result(result: dict[str, Any], run_dir: str | Path) -> Path:
    """Keep a result of `sllm evaluate` for the run's model card; returns its file."""
    name = f"{Path(result['data']).name.split('.')[0]}-{result['data_fingerprint'][:8]}.json"
    path = Path(run_dir) / RESULTS / name
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (json.dumps(result, ensure_ascii=False, indent=1) + "\n").encode())
    return path


def _finite(value: float | None) -> float:
    return float("inf") if value is None else value


def _number(value: Any) -> str:
    """Whole numbers with separators, others to five digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _rows(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[list[str]]:
    """A table's header and cells, none without rows."""
    cells = [["" if row.get(name) is None else _number(row[name]) for name in columns] for row in rows]
    return [list(columns), *cells] if rows else []
