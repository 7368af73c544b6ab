"""`tools.gpu_check bundle`: what is carried, its limit, and the rehearsal's refusal of all else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from data_prep.common.processes import run_command
from tools.gpu_check import bundle


def test_what_the_other_machine_lacks_is_carried_in_this_environments_releases() -> None:
    import deepspeed

    carried = bundle.needed("3.12")
    assert carried["deepspeed"] == deepspeed.__version__.split("+")[0]
    # Requirements of requirements, too: pydantic does not import without this one.
    assert {
        "pydantic-core",
        "typing-inspection",
        "typing-extensions",
        "cyclopts",
        "zstandard",
        "pytest",
        "hjson",
    } <= set(carried)
    assert not set(carried) & (bundle.THERE | bundle.LEFT_OUT)
    # Of these, new Python has its own.
    assert not {"exceptiongroup", "tomli"} & set(carried)


def test_a_bundle_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "x.whl").write_bytes(bytes(3 << 20))
    assert bundle.require_size(tmp_path) == 3 << 20
    monkeypatch.setattr(bundle, "MOST_MIB", 2)
    with pytest.raises(UserError, match="3.0 MiB, at most 2"):
        bundle.require_size(tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        bundle.make(tmp_path, "3.12")


def test_the_rehearsal_refuses_modules_that_are_not_carried(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(bundle.REFUSE.format(refused=["yaml", "datasets"]))
    code = "import json, numpy\ntry:\n    import yaml.nodes\nexcept ModuleNotFoundError as e: print(e)\n"
    code += "import importlib.util\nprint(importlib.util.find_spec('datasets'))"
    printed = run_command(
        [sys.executable, "-c", code], "python", env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert printed == "No module named 'yaml'\nNone\n"
