"""What a run writes down: metrics.jsonl, evaluations.jsonl, saves.jsonl and starts.jsonl, TensorBoard,
Weights & Biases if asked for, and the console.

In: one record per step, evaluation, save and start, from rank 0. Out: files in the run directory; each step
stands in them once, also after a resume (records of steps that a killed run had computed but not saved are
removed first), and starts.jsonl keeps every start. A full disk raises nothing here: rank 0 must not end alone
(`RunLog.error`). A console that is gone, or trouble with Weights & Biases, ends no run. Called by
`training_run.py`; docs/training.md names the fields.
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
from data_prep.common.files import flush_and_rename, write_atomically
from pipeline.config.schema import Recipe

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
    """The log of one run. On ranks other than 0 nothing is written. Use as a context manager.

    error: the first OSError met while writing a record; nothing is written after it. The ranks share it with
    the next step's figures, or when they save; at the very end leaving the context raises it.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, rank: int, resumed_step: int):
        self._on = rank == 0
        self.error: OSError | None = None
        self._board = self._wandb = self._bar = None
        self._every = recipe.log.console_every
        self._training = recipe.training
        if not self._on:
            return
        self._metrics, self._lost = _open_after(run_dir / METRICS, resumed_step)
        self._evaluations, _ = _open_after(run_dir / EVALUATIONS, resumed_step)
        self._saves, _ = _open_after(run_dir / SAVES, resumed_step)
        self._starts = run_dir / STARTS
        if recipe.log.tensorboard:
            self._board = _tensorboard(run_dir / "tensorboard", resumed_step)
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
        for part in (self._metrics, self._evaluations, self._saves, self._board):
            if part is not None:
                with self._remembering():  # what a full disk has left in a buffer is tried once more
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
        """For what moves the bar: when its terminal has gone, there is no bar any more."""
        try:
            yield
        except OSError:
            self._bar = None

    @contextlib.contextmanager
    def _or_without_wandb(self) -> Iterator[None]:
        """Whatever goes wrong at Weights & Biases is said once, and nothing more is sent there."""
        try:
            yield
        except Exception as error:
            self._wandb = None
            self.say(f"log.wandb: nothing is sent to Weights & Biases any more ({first_line(error)})")

    def _write(self, file: Any, record: dict[str, Any]) -> None:
        try:
            _write(file, record)
        except OSError as error:  # an error of writing does not know the file's name
            error.filename = error.filename or file.name
            raise

    def flush_to_disk(self) -> None:
        """Have the records of steps and evaluations on the disk for good. Raises OSError, also one of
        before."""
        if self.error is not None:
            raise self.error
        if self._on:
            for file in (self._metrics, self._evaluations):
                os.fsync(file.fileno())

    def say(self, text: str) -> None:
        """One line for the person who watches (rank 0 only)."""
        if not self._on:
            return
        if self._bar is None:
            say(text)
            return
        with self._on_terminal(), self._bar.external_write_mode():
            say(text)

    def start(self, record: dict[str, Any]) -> None:
        """That the run begins, or goes on. `lost_steps` is added: the steps that stood in metrics.jsonl and
        are computed again, because they came after the checkpoint."""
        if not self._on:
            return
        with self._remembering():
            whole = read_records(self._starts)  # a kill may have left half a line
            lines = "".join(json.dumps(one) + "\n" for one in [*whole, record | {"lost_steps": self._lost}])
            write_atomically(self._starts, lines.encode())

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step's figures."""
        if self._on and self.error is None:
            with self._remembering():
                self._step(record)

    def _step(self, record: dict[str, Any]) -> None:
        self._write(self._metrics, record)
        self._publish("train", record)
        progress = self._training.progress(record["step"], record["tokens"])
        if self._bar is not None:
            with self._on_terminal():
                self._bar.n = record["tokens"] if self._training.max_tokens else record["step"]
                figures = {"loss": f"{record['loss']:.3f}", "tok_s": f"{record['tokens_per_second']:.0f}"}
                self._bar.set_postfix(figures)
        elif record["step"] % self._every == 0 or progress >= 1 or record["step"] == 1:
            say(
                f"step {record['step']:>7}  {progress:6.1%}  loss {record['loss']:.4f}  "
                f"bits/byte {record['bits_per_byte']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
                f"lr {record['lr']:.2e}  grad norm {record['grad_norm']:.2f}"
            )

    def evaluation(self, record: dict[str, Any]) -> None:
        """One evaluation's figures."""
        if self._on and self.error is None:
            with self._remembering():
                self._evaluation(record)

    def _evaluation(self, record: dict[str, Any]) -> None:
        self._write(self._evaluations, record)
        self._publish("validation", record)
        best = " (best so far)" if record["best"] else ""
        self.say(
            f"step {record['step']:>7}  validation bits/byte {record['bits_per_byte']:.4f}  "
            f"ppl {record['ppl']:.2f}{best}"
        )

    def save(self, record: dict[str, Any]) -> None:
        """That a checkpoint was written, and how long training stood still for it."""
        if self._on and self.error is None:
            with self._remembering():
                self._save(record)

    def _save(self, record: dict[str, Any]) -> None:
        self._write(self._saves, record)
        self._publish("train", record)

    def _publish(self, group: str, record: dict[str, Any]) -> None:
        curves = {
            f"{group}/{name}": record[name]
            for name in (*_CURVES, "ppl")
            if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
        }
        if self._board is not None:
            for name, value in curves.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            if "loss" in record:  # an evaluation's tokens are those of its sample
                curves["tokens"] = record["tokens"]
            with self._or_without_wandb():
                self._wandb.log(curves, step=record["step"])


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of one of these files. What is none is dropped: a half line that a killed run left at the
    end, or what a machine that lost its power left of a block."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _open_after(path: Path, step: int) -> tuple[Any, int]:
    """Open for appending, with only the records up to `step` kept; and how many were not."""
    records = read_records(path)
    kept = [record for record in records if record["step"] <= step]
    aside = path.with_name(f".tmp-{path.name}")
    with open(aside, "w", encoding="utf-8") as out:
        for record in kept:
            _write(out, record)
    flush_and_rename(aside, path)
    return open(path, "a", encoding="utf-8"), len(records) - len(kept)


def _write(file: Any, record: dict[str, Any]) -> None:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    file.write(json.dumps(plain) + "\n")
    file.flush()


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
            f"log.wandb is true and Weights & Biases does not begin ({first_line(error)}): log in there, set "
            "WANDB_MODE=offline, or --log.wandb false"
        ) from error


def wandb_id(run_dir: Path) -> str:
    """The run's id at Weights & Biases: random, made once, kept in the run directory for resumes.

    Not the folder's name: two runs of one name would become one there.
    """
    path = run_dir / WANDB_ID
    if not path.exists():
        write_atomically(path, f"{secrets.token_hex(8)}\n".encode())
    return path.read_text(encoding="utf-8").strip()
