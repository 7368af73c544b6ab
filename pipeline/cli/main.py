"""The `sllm` command (`sllm COMMAND …`, or `python -m pipeline.cli COMMAND …`).

A command prints a readable result, or one JSON object with `--json`, to stdout, and its progress to stderr.
Exit status: 0, 1 (a check failed) or 2 (bad input, one line on stderr). Each command imports torch and
transformers itself, so that `sllm --help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from data_prep.common.command_line import run_app

# Importing a module registers its commands.
from pipeline.cli import benchmark, evaluation, models, runs, serving  # noqa: F401
from pipeline.cli.options import app

# Imported for this command alone: its help lists the keys of a recipe.
app.command(
    "pipeline.cli.train:command",
    name="train",
    group="Train",
    help="Train a SentenceVAE, an SLLM or a token-level model. Run the same command again to resume. "
    "Every recipe key may follow, as --section.key VALUE.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) asks for; returns its exit status."""
    # Hugging Face stays offline and silent: models come from local folders, stdout and stderr are ours.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return run_app(app, argv)
