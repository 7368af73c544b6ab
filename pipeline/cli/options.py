"""The program `sllm`, and what its commands share: options, and how a result is printed."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

import pipeline
from data_prep.common.command_line import make_app
from pipeline.parallel.device import DeviceName, DtypeName

VAE_RECIPE_HELP = "recipe of the SentenceVAE where model.vae.path does not exist (default: by its name)"

Json = Annotated[bool, Parameter(help="print one JSON object")]
Int8 = Annotated[
    bool,
    Parameter(help="weights in 8 bits (CPU): faster generation, slightly higher loss (docs/generation.md)"),
]
Device = Annotated[DeviceName, Parameter(help="where to compute (auto: the GPU if there is one)")]
Dtype = Annotated[DtypeName, Parameter(help="precision (auto: bf16 on a GPU that has it, else fp32)")]
# Recipe keys as --section.key VALUE: every word that is no option of the command.
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
Output = Annotated[str | None, Parameter(help="also write the figures to this file, as JSON")]

app = make_app(
    "sllm",
    pipeline.__version__,
    "Train, evaluate, generate with, check, export, audit, inspect and measure sentence-level models.",
    "sllm generate --model demo/models/sllm --prompt 'The list is' --max-sentences 5",
)


def print_json(result: dict) -> None:
    """A result for a machine."""
    print(jsonlib.dumps(result, ensure_ascii=False, allow_nan=False))


def answer(result: dict[str, Any], json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """Print a result as one JSON object, or as `text` formats it for a reader."""
    if json:
        print_json(result)
    else:
        print(text(result))
