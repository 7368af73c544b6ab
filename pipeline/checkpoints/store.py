"""Checkpoints as folders: which there are, which are whole, and which one a run may go on from.

In: a run directory. Out: `RUN/checkpoints/step-00000100/` (DeepSpeed's files and `meta.json`) as a path and
its `Meta`; the text files `latest` and `best` each name one. A folder named `step-…` is complete: it got that
name after every rank had written its part (`checkpoint_saving.py`). `meta.json` holds the sha256 of every
file and of itself, so a single changed byte is found before anything of it is used. Imports no torch, so that
a finished run can say so at once.
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

from data_prep.common.errors import UserError
from data_prep.common.files import file_sha256, json_bytes, write_atomically
from pipeline.config.schema import LossRecipe, ModelRecipe

FORMAT_VERSION = 3
META = "meta.json"
TMP = ".tmp-"


@dataclass
class Meta:
    """What `meta.json` holds: where the run stands and what a reader needs to make sense of the weights.

    `position` is where the stream of bins stands and `consumed` says which ones were trained on
    (`bins.Position`, `bins.Consumed`, as JSON); `tokens` counts the real tokens trained on; `best` is the
    best evaluation so far (`{"step", "bits_per_byte"}`) or None; `shards` and `validation` are the
    fingerprints of the shard sets, in the recipe's order, `tokenizer` that of their tokenizer; `guard` is
    `health.Guard`; `files` maps file names to (size in bytes, sha256).
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
    """A checkpoint that is not whole: an older one may do instead."""


def checkpoints_folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def find(run_dir: str | Path, which: str = "latest") -> tuple[Path, Meta] | None:
    """The newest checkpoint (`latest`), or the best one by validation (`best`); None when there is none yet.

    The best one's name comes from the newest checkpoint's own record, which is guarded, not from the file
    `best`. Raises UserError when the newest or the best one is damaged: an older one is not what was asked.
    """
    found = _first_whole(run_dir, {})
    if found is None:
        return None
    checkpoint, meta, damages = found
    if damages:
        raise DamagedCheckpoint(f"{'; '.join(damages)}; the training command goes on from {checkpoint.name}")
    if which == "latest":
        return checkpoint, meta
    folder = checkpoint.with_name(step_name(meta.best["step"])) if meta.best else None
    return (folder, read_meta(folder)) if folder and folder.is_dir() else None


def newest_whole(
    run_dir: str | Path, spoilt: Mapping[str, str] | None = None
) -> tuple[Path, Meta, str] | None:
    """The checkpoint to go on from: the latest, or the newest before it that is whole; None when there is
    none yet.

    Whole as far as names, sizes and `meta.json` tell; `damaged_files` reads the bytes, and what it found is
    passed back in `spoilt` (name of a checkpoint → what is wrong). Returns (folder, its meta, one line that
    names the damaged ones passed over, else empty). Raises UserError when every one is damaged.
    """
    found = _first_whole(run_dir, spoilt or {})
    if found is None:
        return None
    checkpoint, meta, damages = found
    return checkpoint, meta, f"{'; '.join(damages)}: using {checkpoint.name} instead" if damages else ""


def listed(run_dir: str | Path) -> tuple[list[Path], str]:
    """The checkpoints up to `latest`, newest first, whole or not; and what is wrong with `latest`, else
    empty.

    What is beyond `latest` was left by a run that went on from further back: it will be written again.
    """
    folder = checkpoints_folder(run_dir)
    paths = sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)
    try:
        latest = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:  # none yet, or killed between the first checkpoint's rename and this file
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
        f"no checkpoint of {run_dir} is whole: {'; '.join(damages)}; begin anew with another --output_dir"
    )


def write_meta(checkpoint: Path, meta: Meta) -> None:
    """Write `meta.json` with the digest of its own content."""
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
        # The bytes too: what is not as we write it was changed by somebody.
        digest = values.pop("digest")
        if _digest(values) != digest or json_bytes({**values, "digest": digest}) != raw:
            raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {META} is not as it was written")
        if values["format_version"] != FORMAT_VERSION:
            raise _other_release(path, values)
        meta = Meta(**values)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {META} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"checkpoint {checkpoint} is damaged: {META} does not parse ({error})"
        ) from None
    for name, (size, _) in meta.files.items():
        file = checkpoint / name
        if not file.is_file():
            raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(
                f"checkpoint {checkpoint} is damaged: {name} has {file.stat().st_size} bytes, not {size}"
            )
    return meta


def _other_release(path: Path, values: dict[str, Any]) -> UserError:
    return UserError(
        f"{path} was written by another release: format {values['format_version']}, this one reads "
        f"{FORMAT_VERSION}"
    )


def damaged_files(checkpoint: Path, meta: Meta, names: Iterable[str] | None = None) -> list[str]:
    """Which of a checkpoint's files (all, or these) are not the bytes that were written; reads them whole."""
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
    """Read every file of a checkpoint (one process alone); DamagedCheckpoint when one has other bytes."""
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
    was, now = _identity(meta), _identity(ours)
    difference = first_difference(was, now)
    if difference:
        raise UserError(
            f"checkpoint {checkpoint} is of another model: {difference}; "
            "use another --output_dir, or the recipe that began this run"
        )
    if meta.zero_stage != ours.zero_stage and 0 in (meta.zero_stage, ours.zero_stage):
        raise UserError(
            f"checkpoint {checkpoint} was written with ZeRO stage {meta.zero_stage} and this run has stage "
            f"{ours.zero_stage}: stages 1, 2 and 3 go on from each other, stage 0 from itself"
        )


def require_same_model_recipe(meta: Meta, checkpoint: Path, recipe: dict[str, Any]) -> None:
    """Refuse a checkpoint whose recipe asks for another model than `recipe` (`Recipe.to_dict()`).

    For a finished run, of which no model is built: what is written in the recipe counts, not the model config
    that comes of it.
    """
    was, now = (
        {
            # Older recipes kept numbers of a model as text where YAML does (1e-2).
            "model": ModelRecipe(**r["model"]).model_dump(),
            "loss": loss.head_settings() | {"embedding_weight": loss.embedding_weight},
        }
        for r in (meta.recipe, recipe)
        for loss in [LossRecipe(**r["loss"])]
    )
    difference = first_difference(was, now)
    if difference:
        raise UserError(
            f"checkpoint {checkpoint} is of another model: {difference}; "
            "use another --output_dir, or the recipe that began this run"
        )


def _identity(meta: Meta) -> dict[str, Any]:
    """What makes a run the same run: the model, and what decides which bins come in which order.

    Shards count by content: a set may move, but not change in its place.
    """
    data = {key: value for key, value in meta.recipe["data"].items() if key != "validation"}
    data["shards"] = [fingerprint[:12] for fingerprint in meta.shards]
    return {
        "objective": meta.objective,
        "model": meta.model_config,
        "data": data,
        "seed": meta.recipe["seed"],
        # They decide what states the optimizer has, and in which groups.
        "optimizer": {"parts": meta.recipe["optimizer"].get("parts", {})},
        "training": {"ema": meta.recipe["training"].get("ema")},
    }


def first_difference(was: Any, now: Any, where: str = "") -> str | None:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            if key in ("transformers_version", "_name_or_path"):
                continue
            found = first_difference(was.get(key), now.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if was == now else f"{where} is {was!r} there and {now!r} here"


def remove_unfinished(run_dir: str | Path) -> None:
    """Delete what a killed run was writing when it died (rank 0 only)."""
    folder = checkpoints_folder(run_dir)
    for path in folder.glob(f"{TMP}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*Path(run_dir).glob("*.partial"), *folder.glob("*.partial")):  # of `write_atomically`
        path.unlink(missing_ok=True)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def beyond(run_dir: str | Path, checkpoint: Path) -> set[str]:
    """Names of the checkpoints later than this one: damaged, or left by a run that went on from further
    back."""
    return {path.name for path in checkpoints_folder(run_dir).glob("step-*") if path.name > checkpoint.name}


def prune(folder: Path, latest: str, best: str | None, keep: int, abandoned: Collection[str] = ()) -> None:
    """Remove all checkpoints up to `latest` but the last `keep` whole ones and the best (rank 0 only).

    Whole as far as names, sizes and `meta.json` tell, and not `abandoned` (`beyond` the one that this run
    went on from, and not written again): a damaged one must not push a good one out.
    """
    older = sorted(path.name for path in folder.glob("step-*") if path.is_dir() and path.name <= latest)
    whole = [name for name in older if name not in abandoned and _seems_whole(folder / name)]
    for name in older:
        if name not in whole[-keep:] and name != best:
            shutil.rmtree(folder / name, ignore_errors=True)


def _seems_whole(checkpoint: Path) -> bool:
    try:
        read_meta(checkpoint)
    except DamagedCheckpoint:
        return False
    except (UserError, OSError):  # another release's, or a disk that does not answer: nothing to remove
        return True
    return True
