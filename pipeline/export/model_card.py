"""The model card: README.md of an exported model folder, in Hugging Face's format.

In: a run directory (the checkpoint's `Meta`, `evaluations.jsonl`, `provenance.json`, `ds_config.json`,
`results/*.json`) and the exported model's parameter count. Out: YAML front matter and Markdown. Nothing else
is looked at, no clock and no library version of this machine, so the same run gives the same card; what the
run does not know (a license, a model id of the Hub) is left out.

`RUN/provenance.json` is written when a run begins: package versions, device, and what the shard sets held.
`RUN/results/NAME.json` is the output of `sllm evaluate --json`, put there by whoever wants it on the card.
Called by `training_run.py` (provenance) and `export.py` (the card).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.errors import UserError
from pipeline.checkpoints.store import Meta
from pipeline.data.plan import Position
from pipeline.training.provenance import PROVENANCE
from pipeline.training.run_log import EVALUATIONS, read_records

RESULTS = "results"

_WHAT = {
    "vae": "A SentenceVAE: a sentence encoder and a sentence decoder, trained to rebuild sentences from one "
    "vector each. A sentence-level language model is built around it; by itself it does not continue texts.",
    "sllm": "A sentence-level language model (SLLM): a sentence encoder, a decoder-only backbone with one "
    "position per sentence, a sentence decoder and a stop head that ends the document.",
    "lm": "A token-level language model: the baseline, trained on the same tokens as sentence-level models.",
}

_USE = {
    "vae": """from pipeline import SentenceVAE

model = SentenceVAE.from_pretrained("{folder}")""",
    "sllm": """from pipeline import SLLM

model = SLLM.from_pretrained("{folder}")
print(model.generate("The list is", max_sentences=5))""",
    "lm": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")""",
}

_LIMITS = {
    "vae": "The figures above are of reconstruction: the model has read what it writes. They compare with no "
    "language model's.",
    "sllm": "Perplexity counts sentence ends and stop decisions as cost, and only plain tokens as length.",
    "lm": "Perplexity counts the document end as cost, and only plain tokens as length.",
}

_EVALUATION_COLUMNS = ("step", "bits_per_byte", "ppl", "tokens", "bytes")

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


def model_card(run_dir: str | Path, checkpoint: str, meta: Meta, parameters: int, folder_name: str) -> str:
    """The card's text.

    Args:
        run_dir: the run directory.
        checkpoint: name of the exported checkpoint.
        meta: that checkpoint's `meta.json`.
        parameters: of the exported model, shared ones counted once.
        folder_name: of the export; it stands in the example.
    Raises: UserError for a file in `results/` that is no result of these weights.
    """
    run_dir = Path(run_dir)
    known = _read_json(run_dir / PROVENANCE) or {}
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(meta, known), sort_keys=False, allow_unicode=True) + "---",
        f"# {run_dir.resolve().name}",
        _WHAT[meta.objective],
        "## Use",
        _use(meta, folder_name),
        "## Results",
        *_results(run_dir, checkpoint, meta),
        "## Model",
        _model(meta, parameters),
        "## Training",
        _training(run_dir, checkpoint, meta, known),
        "## Data",
        *_data(meta, known),
        "## Recipe",
        "```yaml\n" + yaml.safe_dump(meta.recipe, sort_keys=False, allow_unicode=True) + "```",
        "## Limits",
        _limits(meta),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(meta: Meta, known: dict[str, Any]) -> dict[str, Any]:
    languages = {part["settings"]["language"] for part in known.get("shards", [])}
    languages.add(_settings(meta).get("language"))
    front: dict[str, Any] = {}
    if languages and languages <= {"en", "zh"}:
        front["language"] = sorted(languages)
    front["library_name"] = "transformers" if meta.objective == "lm" else "sentence-llm"
    if meta.objective != "vae":
        front["pipeline_tag"] = "text-generation"
    if base := _hub_like(meta.recipe["model"]["backbone"].get("path")):
        front["base_model"] = base
    tags = {"vae": ["sentence-vae"], "sllm": ["sllm", _backbone(meta)["model_type"]], "lm": []}
    front["tags"] = ["sentence-llm", *tags[meta.objective]]
    return front


def _hub_like(path: str | None) -> str | None:
    """A relative `owner/name` reads as an id of the Hub; of any other folder, no id is known."""
    return path if path and len(Path(path).parts) == 2 and path[0] not in "./" else None


def _settings(meta: Meta) -> dict[str, Any]:
    return meta.model_config.get("sentence_settings") or {}


def _backbone(meta: Meta) -> dict[str, Any]:
    return meta.model_config["backbone"] if meta.objective == "sllm" else meta.model_config


def _use(meta: Meta, folder_name: str) -> str:
    code = "```python\n" + _USE[meta.objective].format(folder=folder_name) + "\n```"
    text = "The weights are float32 safetensors; the tokenizer is in `tokenizer/`."
    if meta.objective == "lm":
        return f"{text} Nothing but transformers is needed.\n\n{code}"
    register = "That import also lets `AutoModel.from_pretrained` load this folder; no remote code is needed."
    command = "generate --prompt 'The list is'" if meta.objective == "sllm" else "check"
    return f"{text}\n\n{code}\n\n{register} On the command line: `sllm {command} --model {folder_name}`."


def _results(run_dir: Path, checkpoint: str, meta: Meta) -> list[str]:
    rows = []
    measured = [row for row in read_records(run_dir / EVALUATIONS) if row["step"] <= meta.step]
    if measured:
        best = min(measured, key=lambda row: (_finite(row["bits_per_byte"]), row["step"]))
        rows += [("best", best), ("last", measured[-1])]
    parts = []
    if rows:
        parts.append(
            "In the loop, on the first "
            f"{meta.recipe['training']['eval_bins']} bins of the validation shards "
            f"(this folder holds the weights of step {meta.step}):"
        )
        parts.append(
            _table(
                ["evaluation", *_EVALUATION_COLUMNS], [[n, *_cells(r, _EVALUATION_COLUMNS)] for n, r in rows]
            )
        )
    given = _given_results(run_dir, checkpoint, meta)
    if given:
        columns = [
            name for name in _RESULT_COLUMNS if any(result.get(name) is not None for _, result in given)
        ]
        parts.append("By `sllm evaluate`, on a whole text, with these weights:")
        names = ["result", "data", *columns]
        parts.append(_table(names, [[n, r["data"], *_cells(r, columns)] for n, r in given]))
        prints = [f"- `{name}`: data fingerprint `{result['data_fingerprint']}`" for name, result in given]
        parts.append("\n".join(prints))
    return parts or ["Nothing was measured in this run: it had no validation shards."]


def _given_results(run_dir: Path, checkpoint: str, meta: Meta) -> list[tuple[str, dict[str, Any]]]:
    """The files of `results/`, each proven to be about the exported weights: the folder that it measured says
    by its `training.json` which checkpoint it holds."""
    from pipeline.export.model_card import ORIGIN

    found = []
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
        found.append((path.stem, result))
    return found


def _model(meta: Meta, parameters: int) -> str:
    rows: list[list[str]] = [["parameters", _number(parameters)]]
    sizes = {"vae": meta.model_config, "sllm": meta.model_config.get("vae"), "lm": None}[meta.objective]
    if sizes:
        names = ("vocab_size", "hidden_size", "layers", "heads", "ffn_size", "max_sentence_tokens")
        rows += [[f"SentenceVAE {name}", _number(sizes[name])] for name in names if name in sizes]
    if meta.objective != "vae":
        backbone = _backbone(meta)
        rows.append(["backbone model_type", backbone["model_type"]])
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        rows += [[f"backbone {name}", _number(backbone[name])] for name in names if name in backbone]
    for name in ("vae", "backbone"):
        if path := meta.recipe["model"][name].get("path"):
            rows.append([f"{name} began from", f"`{path}`"])
    return _table(["", "value"], rows)


def _training(run_dir: Path, checkpoint: str, meta: Meta, known: dict[str, Any]) -> str:
    strategy = _read_json(run_dir / "ds_config.json") or {}
    half = next((name for name in ("bf16", "fp16") if strategy.get(name, {}).get("enabled")), "fp32")
    rows = [
        ["checkpoint", checkpoint],
        ["steps", _number(meta.step)],
        ["tokens", _number(meta.tokens)],
        ["epochs begun", _number(Position.from_json(meta.position).epochs_started)],
        ["ranks", _number(meta.world)],
        ["ZeRO stage", _number(meta.zero_stage)],
        ["precision", half],
    ]
    rows += [[name, str(known[name])] for name in ("device", "python") if name in known]
    rows += [[name, version] for name, version in sorted(known.get("packages", {}).items())]
    return _table(["", "value"], rows)


def _data(meta: Meta, known: dict[str, Any]) -> list[str]:
    parts = []
    for role in ("shards", "validation"):
        for part in known.get(role, []):
            counts = ", ".join(f"{_number(count)} {name}" for name, count in part["totals"].items())
            settings = ", ".join(f"{name} {value}" for name, value in part["settings"].items())
            name = "training" if role == "shards" else role
            parts.append(
                f"- {name}: `{part['folder']}`: {counts}; {settings}; fingerprint `{part['fingerprint']}`"
            )
    if not parts:  # a run that began before provenance was written down
        parts = [f"- training: fingerprint `{one}`" for one in meta.shards]
        parts += [f"- validation: fingerprint `{meta.validation}`"] if meta.validation else []
    return ["\n".join(parts)]


def _limits(meta: Meta) -> str:
    lines = [
        f"It was trained on windows of at most {_number(meta.model_config['window_tokens'])} tokens; longer "
        "contexts are untested.",
        _LIMITS[meta.objective],
        "It has learnt what its training text says, true or not; it was not tuned to be helpful or harmless.",
    ]
    if meta.objective != "lm" and "max_tokens" in _settings(meta):
        lines.insert(1, f"Sentences are cut by `{_settings(meta)['segmenter']}` and have at most "
                        f"{_number(_settings(meta)['max_tokens'])} tokens.")  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


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


def _cells(row: dict[str, Any], columns: list[str] | tuple[str, ...]) -> list[str]:
    return ["" if row.get(name) is None else _number(row[name]) for name in columns]


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


ORIGIN = "training.json"  # where a folder's weights come from; its presence says that we wrote the folder
