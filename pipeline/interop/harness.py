"""`sllm lm-eval`: lm-evaluation-harness's own command line with a model folder and the local tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.common.errors import UserError, first_line
from data_prep.common.extras import import_extra

TASKS = Path(__file__).with_name("tasks")


def run(model: str, words: Sequence[str]) -> None:
    """Evaluate a model folder; `words` are the harness's own arguments.

    Raises: UserError for a folder that cannot be evaluated, and for what the harness refuses.
    """
    import_extra("lm_eval", "lm-eval")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    # Importing it registers the model.
    from pipeline.interop.lm_eval_model import require_predictions

    # Before the harness reads its thousands of tasks.
    require_predictions(model)
    if not words:
        raise UserError("--tasks is missing: `sllm lm-eval --model DIR ls tasks` lists the tasks")
    setup_logging()
    cli = HarnessCLI()
    if words[0] not in ("run", "ls", "validate"):
        words = ("run", *words)
    ours, sys.argv = sys.argv, ["sllm lm-eval", *words]
    try:
        arguments = cli.parse_args()
    finally:
        sys.argv = ours
    arguments.include_path = [str(TASKS), *filter(None, [arguments.include_path])]
    if arguments.command == "run":
        arguments.model = "sllm"
        arguments.model_args = {**(arguments.model_args or {}), "pretrained": model}
    try:
        cli.execute(arguments)
    except ValueError as error:
        raise UserError(f"lm_eval: {first_line(error)}") from error
