"""Packages that come with an extra of this project, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from data_prep.common.errors import UserError


def import_extra(module: str, extra: str) -> Any:
    """The module. Raises: UserError that names the extra when its package is not installed."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] != package:
            raise
        raise UserError(f"this needs {package}: pip install 'sentence-llm[{extra}]'") from None
