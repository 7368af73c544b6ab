"""Checkpoints: written aside, renamed when complete, then made current; read on resume and by `export.py`.

In: a DeepSpeed engine and a `Meta`. Out: `RUN/checkpoints/step-00000100/` (DeepSpeed's files and
`meta.json`), and the text files `latest` and `best`, each naming a checkpoint. A folder named `step-…` is
complete: it got that name after every rank had written its part. Imports no torch, so that a finished run can
say so at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, first_line
from data_prep.files import flush_to_disk, write_atomically
from pipeline.recipe import LossRecipe

FORMAT_VERSION = 3
_TMP = ".tmp-"


@dataclass
class Meta:
    """What `meta.json` holds: where the run stands and what a reader needs to make sense of the weights.

    `position` is where the stream of bins stands and `consumed` says which ones were trained on
    (`bins.Position`, `bins.Consumed`, as JSON); `tokens` counts the real tokens trained on; `best` is the
    best evaluation so far (`{"step", "bits_per_byte"}`) or None; `shards` and `validation` are the
    fingerprints of the shard sets, in the recipe's order; `guard` is
    `health.Guard`; `files` maps file names to sizes in bytes.
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
    model_config: dict[str, Any]
    recipe: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


class DamagedCheckpoint(UserError):
    """A checkpoint that is not whole: an older one may do instead."""


def checkpoints_folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def find(run_dir: str | Path, which: str = "latest") -> Path | None:
    """The checkpoint that `latest` or `best` names; None when there is none yet. UserError if it is gone."""
    folder = checkpoints_folder(run_dir)
    try:
        name = (folder / which).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not name or not (folder / name).is_dir():
        raise UserError(f"{folder / which} names the checkpoint {name!r}, which is not there")
    return folder / name


def newest_whole(run_dir: str | Path) -> tuple[Path, Meta, str] | None:
    """The checkpoint to go on from: the latest, or the newest before it that is whole; None when there is
    none yet.

    Returns (folder, its meta, one line that names the damaged ones passed over, else empty). Raises UserError
    when every one is damaged.
    """
    folder = checkpoints_folder(run_dir)
    try:
        latest = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    names = sorted((path.name for path in folder.glob("step-*") if path.is_dir()), reverse=True)
    damages = []
    if latest in names:
        names = names[names.index(latest) :]
    else:
        damages.append(f"{folder / 'latest'} names the checkpoint {latest!r}, which is not there")
    for name in names:
        try:
            meta = read_meta(folder / name)
        except DamagedCheckpoint as error:
            damages.append(str(error))
            continue
        passed_over = "; ".join(damages)
        return folder / name, meta, f"{passed_over}: using {name} instead" if damages else ""
    raise UserError(
        f"no checkpoint of {run_dir} is whole: {'; '.join(damages)}; begin anew with another --output_dir"
    )


def read_meta(checkpoint: Path) -> Meta:
    """Read and check `meta.json`: known version, every file there with its full size.

    Raises DamagedCheckpoint, or UserError for another format.
    """
    path = checkpoint / "meta.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} was written by another release: format {values['format_version']}, this one reads "
                f"{FORMAT_VERSION}"
            )
        meta = Meta(**values)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: meta.json is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            f"checkpoint {checkpoint} is damaged: meta.json does not parse ({error})"
        ) from None
    for name, size in meta.files.items():
        file = checkpoint / name
        if not file.is_file():
            raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(
                f"checkpoint {checkpoint} is damaged: {name} has {file.stat().st_size} bytes, not {size}"
            )
    return meta


def require_same_run(meta: Meta, checkpoint: Path, ours: Meta) -> None:
    """Refuse a checkpoint that this run cannot continue: `ours` is the Meta this run would write now.

    Raises UserError naming the first difference and what to do: another objective, model, data order, world
    or stage. Length, learning rate and validation shards may change.
    """
    was, now = _identity(meta), _identity(ours)
    difference = _first_difference(was, now)
    if difference:
        raise UserError(
            f"checkpoint {checkpoint} is of another model: {difference}; "
            "use another --output_dir, or the recipe that began this run"
        )
    if meta.world != ours.world:
        raise UserError(
            f"checkpoint {checkpoint} was written by {meta.world} ranks and this run has {ours.world}: "
            f"start with {meta.world} ranks, or export the weights and begin a new run from them"
        )
    if meta.zero_stage != ours.zero_stage:
        raise UserError(
            f"checkpoint {checkpoint} was written with ZeRO stage {meta.zero_stage} and this run has stage "
            f"{ours.zero_stage}: use a DeepSpeed config of stage {meta.zero_stage}"
        )


def require_same_model_recipe(meta: Meta, checkpoint: Path, recipe: dict[str, Any]) -> None:
    """Refuse a checkpoint whose recipe asks for another model than `recipe` (`Recipe.to_dict()`).

    For a finished run, of which no model is built: what is written in the recipe counts, not the model config
    that comes of it.
    """
    was, now = (
        {
            "model": r["model"],
            "loss": LossRecipe(**r["loss"]).head_settings(),
        }
        for r in (meta.recipe, recipe)
    )
    difference = _first_difference(was, now)
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
    }


def _first_difference(was: Any, now: Any, where: str = "") -> str | None:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            if key in ("transformers_version", "_name_or_path"):
                continue
            found = _first_difference(was.get(key), now.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if was == now else f"{where} is {was!r} there and {now!r} here"


def save(engine: Any, run_dir: str | Path, meta: Meta, keep: int) -> Path:
    """Write a checkpoint (called by every rank), make it `latest`, and remove all but the last `keep`.

    The best checkpoint (`meta.best["step"]`) is kept beside them and named by `best`. A kill at any moment
    leaves the checkpoint before this one current and whole.
    """
    import deepspeed.comm as dist

    folder = checkpoints_folder(run_dir)
    name = step_name(meta.step)
    aside = folder / f"{_TMP}{name}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    engine.save_checkpoint(str(folder), tag=aside.name, save_latest=False)
    dist.barrier()
    if first:
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        meta.files = {path.relative_to(aside).as_posix(): path.stat().st_size for path in files}
        write_atomically(
            aside / "meta.json", (json.dumps(dataclasses.asdict(meta), indent=1) + "\n").encode()
        )
        for path in files:
            flush_to_disk(path)
        shutil.rmtree(folder / name, ignore_errors=True)  # left by a run that was continued from further back
        os.rename(aside, folder / name)
        flush_to_disk(folder)
        write_atomically(folder / "latest", f"{name}\n".encode())
        best = step_name(meta.best["step"]) if meta.best else None
        if best and (folder / best).is_dir():
            write_atomically(folder / "best", f"{best}\n".encode())
        elif best is None:  # none yet, or no longer comparable: the next evaluation names one
            (folder / "best").unlink(missing_ok=True)
        _prune(folder, name, best, keep)
    dist.barrier()
    return folder / name


def restore(engine: Any, checkpoint: Path) -> None:
    """Load weights and optimizer state into the engine (called by every rank)."""
    try:
        path, _ = engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
        )
    except Exception as error:  # torch, pickle and DeepSpeed raise many kinds for a damaged file
        raise DamagedCheckpoint(
            f"checkpoint {checkpoint} is damaged, a file of it does not load ({first_line(error)}): "
            "delete the folder to go on from the checkpoint before it"
        ) from error
    if path is None:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: DeepSpeed finds no state in it")


def remove_unfinished(run_dir: str | Path) -> None:
    """Delete what a killed run was writing when it died (rank 0 only)."""
    for path in checkpoints_folder(run_dir).glob(f"{_TMP}*"):
        shutil.rmtree(path, ignore_errors=True)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def _prune(folder: Path, latest: str, best: str | None, keep: int) -> None:
    older = sorted(path.name for path in folder.glob("step-*") if path.is_dir() and path.name <= latest)
    for name in older[:-keep]:
        if name != best:
            shutil.rmtree(folder / name, ignore_errors=True)
