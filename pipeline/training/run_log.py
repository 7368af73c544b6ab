"""The log of a run: JSONL files, the console, TensorBoard and Weights & Biases.

The files are metrics.jsonl, evaluations.jsonl, saves.jsonl and starts.jsonl; docs/training.md names the
fields. Each step is in them once: a resume first removes the records of steps after the checkpoint. A full
disk raises nothing here, because rank 0 must not end alone (`RunLog.error`). A closed console or a failure of
Weights & Biases does not end the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError, first_line, say
from data_prep.common.files import read_json_lines, write_atomically
from pipeline.config.schema import Recipe
from pipeline.training.records import StepRecord

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
SAVES, STARTS = "saves.jsonl", "starts.jsonl"
WANDB_ID = "wandb-id"
_CURVES = (
    "loss",
    "bits_per_byte",
    "tokens_per_second",
    "padding_share",
    "data_wait_seconds",
    "grad_norm",
    "lr",
    "memory_bytes",
    "mfu",
    "save_seconds",
)


class RunLog:
    """The log of one run; ranks other than 0 write nothing. Use as a context manager.

    error: the first OSError of writing a record; nothing is written after it. The ranks share it in the next
    step's all-reduce or when they save. After the last step, leaving the context raises it.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, rank: int, resumed_step: int):
        self._on = rank == 0
        self.error: OSError | None = None
        self._tensorboard = self._wandb = self._bar = None
        self._every = recipe.log.console_every
        self._training = recipe.training
        if not self._on:
            return
        opened = {name: _open_after(run_dir / name, resumed_step) for name in (METRICS, EVALUATIONS, SAVES)}
        self._files = {name: file for name, (file, _) in opened.items()}
        self._lost = opened[METRICS][1]
        self._starts = run_dir / STARTS
        if recipe.log.tensorboard:
            self._tensorboard = _tensorboard(run_dir / "tensorboard", resumed_step)
        if recipe.log.wandb:
            self._wandb = _wandb_run(run_dir, recipe)
        if sys.stderr.isatty():
            from tqdm import tqdm

            limit = recipe.training.max_tokens
            total, unit = (limit, "tok") if limit else (recipe.training.max_steps, "step")
            self._bar = tqdm(total=total, unit=unit, unit_scale=bool(limit), dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._on:
            return
        for part in (*self._files.values(), self._tensorboard):
            if part is not None:
                with self._remembering():  # retries what a full disk has left in a buffer
                    part.close()
        if self._bar is not None:
            with self._on_terminal():
                self._bar.close()
        if self._wandb is not None:
            with self._or_without_wandb():
                self._wandb.finish()
        if self.error is not None and kind is None:
            raise self.error

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error

    @contextlib.contextmanager
    def _on_terminal(self) -> Iterator[None]:
        """Drop the progress bar when its terminal has gone."""
        try:
            yield
        except OSError:
            self._bar = None

    @contextlib.contextmanager
    def _or_without_wandb(self) -> Iterator[None]:
        """Log the first error of Weights & Biases, and send nothing more there."""
        try:
            yield
        except Exception as error:
            self._wandb = None
            self.say(f"log.wandb: nothing is sent to Weights & Biases any more ({first_line(error)})")

    def flush_to_disk(self) -> None:
        """fsync the records of steps and evaluations. Raises OSError, also an earlier one (`error`)."""
        if self.error is not None:
            raise self.error
        if self._on:
            for name in (METRICS, EVALUATIONS):
                os.fsync(self._files[name].fileno())

    def say(self, text: str) -> None:
        """Print a line to the console (rank 0 only)."""
        if not self._on:
            return
        if self._bar is None:
            say(text)
            return
        with self._on_terminal(), self._bar.external_write_mode():
            say(text)

    def start(self, record: dict[str, Any]) -> None:
        """Add a line to starts.jsonl. `lost_steps` is added: the steps in metrics.jsonl that are computed
        again, because they came after the checkpoint."""
        if not self._on:
            return
        with self._remembering():
            complete = read_records(self._starts)  # a kill may have left half a line
            lines = [*complete, record | {"lost_steps": self._lost}]
            write_atomically(self._starts, "".join(json.dumps(one) + "\n" for one in lines).encode())

    def step(self, step: StepRecord) -> None:
        """Log an optimizer step."""
        record = step.to_dict()
        if not self._add(METRICS, "train", record):
            return
        progress = self._training.progress(step.step, step.tokens)
        if self._bar is not None:
            with self._on_terminal():
                self._bar.n = step.tokens if self._training.max_tokens else step.step
                self._bar.set_postfix_str(f"loss {step.loss:.3f}, {step.tokens_per_second:,.0f} tokens/s")
        elif step.step % self._every == 0 or progress >= 1 or step.step == 1:
            say(
                f"step {step.step:>7}  {progress:6.1%}  loss {step.loss:.4f}  "
                f"bits/byte {step.bits_per_byte:.4f}  {step.tokens_per_second:,.0f} tokens/s  "
                f"lr {step.lr:.2e}  grad norm {step.grad_norm:.2f}"
            )

    def evaluation(self, record: dict[str, Any]) -> None:
        """Log an evaluation."""
        if self._add(EVALUATIONS, "validation", record):
            best = " (best so far)" if record["best"] else ""
            self.say(
                f"step {record['step']:>7}  validation bits/byte {record['bits_per_byte']:.4f}  "
                f"ppl {record['ppl']:.2f}{best}"
            )

    def save(self, record: dict[str, Any]) -> None:
        """Log a checkpoint and how long training waited for it."""
        self._add(SAVES, "train", record)

    def _add(self, file: str, group: str, record: dict[str, Any]) -> bool:
        """Write a record to a file and to the dashboards; False if this rank writes none, or not any more."""
        if not self._on or self.error is not None:
            return False
        with self._remembering():
            _write(self._files[file], record)
            self._publish(group, record)
        return self.error is None

    def _publish(self, group: str, record: dict[str, Any]) -> None:
        curves = {
            f"{group}/{name}": record[name]
            for name in (*_CURVES, "ppl")
            if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
        }
        if self._tensorboard is not None:
            for name, value in curves.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            if "loss" in record:  # an evaluation's tokens are those of its sample
                curves["tokens"] = record["tokens"]
            with self._or_without_wandb():
                self._wandb.log(curves, step=record["step"])


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of one of these files. Other lines are dropped: half a line of a killed run, or what a
    machine that lost its power left of a block."""
    values = (value for _, value in read_json_lines(path))
    return [value for value in values if isinstance(value, dict) and isinstance(value.get("step"), int)]


def _open_after(path: Path, step: int) -> tuple[Any, int]:
    """Open for appending, keeping only the records up to `step`; and how many were dropped."""
    records = read_records(path)
    kept = [record for record in records if record["step"] <= step]
    write_atomically(path, "".join(map(_line, kept)).encode())
    return open(path, "a", encoding="utf-8"), len(records) - len(kept)


def _line(record: dict[str, Any]) -> str:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain) + "\n"


def _write(file: Any, record: dict[str, Any]) -> None:
    try:
        file.write(_line(record))
        file.flush()
    except OSError as error:  # an error of writing does not know the file's name
        error.filename = error.filename or file.name
        raise


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "log.tensorboard is true and TensorBoard is not installed: pip install tensorboard, "
            "or --log.tensorboard false"
        ) from None
    return SummaryWriter(folder, purge_step=resumed_step + 1 if resumed_step else None)


def _wandb_run(run_dir: Path, recipe: Recipe) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "log.wandb is true and wandb is not installed: pip install wandb, or --log.wandb false"
        ) from None
    run_id = wandb_id(run_dir)
    try:
        return wandb.init(
            dir=str(run_dir), name=run_dir.name, id=run_id, resume="allow", config=recipe.to_dict()
        )
    except Exception as error:  # no account, no network, or settings that it does not take
        raise UserError(
            f"log.wandb is true and Weights & Biases does not start ({first_line(error)}): log in there, set "
            "WANDB_MODE=offline, or --log.wandb false"
        ) from error


def wandb_id(run_dir: Path) -> str:
    """The run's id at Weights & Biases: random, because two runs may have the same name; kept in the run
    directory for resumes."""
    path = run_dir / WANDB_ID
    if not path.exists():
        write_atomically(path, f"{secrets.token_hex(8)}\n".encode())
    return path.read_text(encoding="utf-8").strip()
