"""Checkpoints as folders: which exist, which are whole, and which one a run resumes from.

`RUN/checkpoints/step-00000100/` holds DeepSpeed's files and `meta.json`; the text files `latest` and `best`
name one each. A folder named `step-…` is complete: it is renamed after every rank has written its part.
`meta.json` holds the sha256 of every file and of itself, so a single changed byte is detected before use.
Imports no torch, so that a finished run reports that at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, counted
from data_prep.common.files import file_sha256, json_bytes, write_atomically
from pipeline.config.schema import LossRecipe, ModelRecipe

FORMAT_VERSION = 3
META = "meta.json"
TMP = ".tmp-"


@dataclass
class Meta:
    """The content of `meta.json`: the run's progress, and what a reader needs to interpret the weights.

    position, consumed: of the stream of bins (`plan.Position`, `plan.Consumed`, as JSON).
    tokens: real tokens trained on.
    best: the best evaluation so far (`{"step", "bits_per_byte"}`) or None.
    shards, validation, tokenizer: fingerprints; shards in the recipe's order.
    guard: `health.Guard`. files: file name → (size in bytes, sha256).
    """

    objective: str
    step: int
    position: list[list[int]]
    consumed: list[Any]
    tokens: int
    best: dict[str, Any] | None
    world: int
    zero_stage: int
    shards: list[str]
    validation: str | None
    tokenizer: str
    model_config: dict[str, Any]
    recipe: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


class DamagedCheckpoint(UserError):
    """A checkpoint that is not whole; an older one may be."""


def checkpoints_folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def find(run_dir: str | Path, which: str = "latest") -> tuple[Path, Meta] | None:
    """The newest checkpoint (`latest`), or the best one by validation (`best`); None when there is none yet.

    The best one's name comes from the newest checkpoint's `meta.json`, which has a checksum, not from the
    file `best`. Raises UserError when the newest or the best one is damaged.
    """
    found = _first_whole(run_dir, {})
    if found is None:
        return None
    checkpoint, meta, damages = found
    if damages:
        raise DamagedCheckpoint(f"{'; '.join(damages)}; the training command resumes from {checkpoint.name}")
    if which == "latest":
        return checkpoint, meta
    folder = checkpoint.with_name(step_name(meta.best["step"])) if meta.best else None
    return (folder, read_meta(folder)) if folder and folder.is_dir() else None


def newest_whole(
    run_dir: str | Path, spoilt: Mapping[str, str] | None = None
) -> tuple[Path, Meta, str] | None:
    """The checkpoint to resume from: the latest, or the newest before it that is whole; None when there is
    none yet.

    Checks names, sizes and `meta.json`. `damaged_files` reads the bytes; pass what it found as `spoilt`
    (checkpoint's name → message). Returns (folder, its meta, a line that names the damaged ones before it,
    or empty). Raises UserError when all are damaged.
    """
    found = _first_whole(run_dir, spoilt or {})
    if found is None:
        return None
    checkpoint, meta, damages = found
    return checkpoint, meta, f"{'; '.join(damages)}: using {checkpoint.name} instead" if damages else ""


def listed(run_dir: str | Path) -> tuple[list[Path], str]:
    """The checkpoints up to `latest`, newest first, whole or not; and what is wrong with `latest`, or empty.

    Those beyond `latest` were left by an earlier start and will be written again.
    """
    folder = checkpoints_folder(run_dir)
    paths = sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)
    try:
        latest = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:  # none yet, or killed before this file was written
        return paths, ""
    if folder / latest not in paths:
        return paths, f"{folder / 'latest'} names the checkpoint {latest!r}, which is not there"
    return [path for path in paths if path.name <= latest], ""


def _first_whole(run_dir: str | Path, spoilt: Mapping[str, str]) -> tuple[Path, Meta, list[str]] | None:
    paths, wrong = listed(run_dir)
    if not paths and not wrong:
        return None
    damages = [wrong] if wrong else []
    for path in paths:
        try:
            if path.name in spoilt:
                raise DamagedCheckpoint(spoilt[path.name])
            return path, read_meta(path), damages
        except DamagedCheckpoint as error:
            damages.append(str(error))
    raise UserError(
        f"no checkpoint of {run_dir} is whole: {'; '.join(damages)}; start again with another --output_dir"
    )


def write_meta(checkpoint: Path, meta: Meta) -> None:
    """Write `meta.json` with a digest of its content."""
    values = dataclasses.asdict(meta)
    write_atomically(checkpoint / META, json_bytes({**values, "digest": _digest(values)}))


def read_meta(checkpoint: Path) -> Meta:
    """Read and check `meta.json`: its own digest, a known version, every file there with its full size.

    Raises DamagedCheckpoint, or UserError for another format.
    """
    path = checkpoint / META
    try:
        raw = path.read_bytes()
        values = json.loads(raw)
        if "digest" not in values and values["format_version"] < FORMAT_VERSION:
            raise _other_release(path, values)
        # The bytes too: a file in another format than ours was edited.
        digest = values.pop("digest")
        if _digest(values) != digest or json_bytes({**values, "digest": digest}) != raw:
            raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {META} is not as it was written")
        if values["format_version"] != FORMAT_VERSION:
            raise _other_release(path, values)
        meta = Meta(**values)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {META} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"checkpoint {checkpoint} is damaged: {META} does not parse ({error})"
        ) from None
    for name, (size, _) in meta.files.items():
        file = checkpoint / name
        if not file.is_file():
            raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(
                f"checkpoint {checkpoint} is damaged: "
                f"{name} has {counted(file.stat().st_size, 'byte')}, not {size:,}"
            )
    return meta


def _other_release(path: Path, values: dict[str, Any]) -> UserError:
    return UserError(
        f"{path} was written by another release: format {values['format_version']}, this one reads "
        f"{FORMAT_VERSION}"
    )


def damaged_files(checkpoint: Path, meta: Meta, names: Iterable[str] | None = None) -> list[str]:
    """Which of a checkpoint's files (all, or `names`) differ from what was written; reads them whole."""
    damaged = []
    for name in meta.files if names is None else names:
        try:
            same = file_sha256(checkpoint / name) == meta.files[name][1]
        except OSError:
            same = False
        if not same:
            damaged.append(name)
    return damaged


def require_undamaged(checkpoint: Path, meta: Meta) -> None:
    """Read every file of a checkpoint in this process; DamagedCheckpoint when one has changed."""
    damaged = damaged_files(checkpoint, meta)
    if damaged:
        raise DamagedCheckpoint(spoilt_message(checkpoint, damaged))


def spoilt_message(checkpoint: Path, names: Iterable[str]) -> str:
    return f"checkpoint {checkpoint} is damaged: {', '.join(names)} is not as it was written (sha256)"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json_bytes(values)).hexdigest()


def require_same_run(meta: Meta, checkpoint: Path, ours: Meta) -> None:
    """Refuse a checkpoint that this run cannot continue: `ours` is the Meta this run would write now.

    Raises UserError naming the first difference and what to do: another objective, model or data order.
    Length, learning rate, validation shards, number of ranks and ZeRO stage (among 1, 2 and 3) may change.
    """
    _require_same(checkpoint, _identity(meta), _identity(ours))
    if meta.zero_stage != ours.zero_stage and 0 in (meta.zero_stage, ours.zero_stage):
        raise UserError(
            f"checkpoint {checkpoint} was written with ZeRO stage {meta.zero_stage} and this run has stage "
            f"{ours.zero_stage}: stages 1, 2 and 3 resume from each other, stage 0 from itself"
        )


def require_same_model_recipe(meta: Meta, checkpoint: Path, recipe: dict[str, Any]) -> None:
    """Refuse a checkpoint whose recipe asks for another model than `recipe` (`Recipe.to_dict()`).

    For a finished run, whose model is not built: it compares the recipes instead of the model configs.
    """
    _require_same(checkpoint, _recipe_identity(meta.recipe), _recipe_identity(recipe))


def _require_same(checkpoint: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    difference = first_difference(was, now)
    if difference:
        raise UserError(
            f"checkpoint {checkpoint} is of another model: {difference}; "
            "use another --output_dir, or the recipe that started this run"
        )


def _recipe_identity(recipe: dict[str, Any]) -> dict[str, Any]:
    loss = LossRecipe(**recipe["loss"])
    head = loss.head_settings() | {"embedding_weight": loss.embedding_weight}
    # Older recipes kept numbers of a model as text where YAML does (1e-2).
    return {"model": ModelRecipe(**recipe["model"]).model_dump(), "loss": head}


def _identity(meta: Meta) -> dict[str, Any]:
    """What identifies a run: the model, and what determines the order of bins.

    Shards are compared by content: a set may move, but not change.
    """
    data = {key: value for key, value in meta.recipe["data"].items() if key != "validation"}
    data["shards"] = [fingerprint[:12] for fingerprint in meta.shards]
    return {
        "objective": meta.objective,
        "model": meta.model_config,
        "data": data,
        "seed": meta.recipe["seed"],
        # They determine the optimizer's states and groups.
        "optimizer": {
            "parts": meta.recipe["optimizer"].get("parts", {}),
            "kind": meta.recipe["optimizer"].get("kind", "adamw"),
        },
        "training": {"ema": meta.recipe["training"].get("ema")},
    }


def first_difference(was: Any, now: Any, where: str = "") -> str | None:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            # A key that one of two releases does not have, at the value that changes nothing.
            neutral = (key not in was or key not in now) and not (was.get(key) or now.get(key))
            if neutral or key in ("transformers_version", "_name_or_path"):
                continue
            found = first_difference(was.get(key), now.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if was == now else f"{where} is {was!r} there and {now!r} here"


def remove_unfinished(run_dir: str | Path) -> None:
    """Delete what a killed run was writing (rank 0 only)."""
    folder = checkpoints_folder(run_dir)
    for path in folder.glob(f"{TMP}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*Path(run_dir).glob("*.partial"), *folder.glob("*.partial")):  # of `write_atomically`
        path.unlink(missing_ok=True)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def beyond(run_dir: str | Path, checkpoint: Path) -> set[str]:
    """Names of the checkpoints later than this one: damaged, or left by an earlier start."""
    return {path.name for path in checkpoints_folder(run_dir).glob("step-*") if path.name > checkpoint.name}


def prune(
    folder: Path,
    latest: str,
    best: str | None,
    keep: int,
    abandoned: Collection[str] = (),
    held: Collection[str] = (),
) -> None:
    """Remove all checkpoints up to `latest` except the last `keep` whole ones, the best and those `held`
    (rank 0 only).

    Checks names, sizes and `meta.json`. Damaged and `abandoned` ones (`beyond` the checkpoint that this run
    resumed from, and not written again) do not count, so that they cannot displace a good one.
    """
    older = sorted(path.name for path in folder.glob("step-*") if path.is_dir() and path.name <= latest)
    whole = [name for name in older if name not in abandoned and _seems_whole(folder / name)]
    for name in older:
        if name not in whole[-keep:] and name != best and name not in held:
            shutil.rmtree(folder / name, ignore_errors=True)


def steps_of_whole(run_dir: str | Path) -> list[int]:
    """The steps of the checkpoints that seem whole, up to `latest`."""
    return [int(path.name.removeprefix("step-")) for path in listed(run_dir)[0] if _seems_whole(path)]


def _seems_whole(checkpoint: Path) -> bool:
    try:
        read_meta(checkpoint)
    except DamagedCheckpoint:
        return False
    except (UserError, OSError):  # of another release, or an unreachable disk: keep it
        return True
    return True
