"""Every module can be imported, and every command of tools/ answers --help."""

from __future__ import annotations

import importlib
import pkgutil
import runpy
import sys
from importlib.util import find_spec

import pytest

import data_prep
import pipeline
import tools

# Optional packages that a module may need as soon as it is imported.
EXTRAS = ("datatrove", "griffe", "grimp", "lm_eval", "mpi4py", "peft", "psutil")
# Processes that other modules start, with arguments of their own.
INTERNAL = ("tools.benchmarks.datatrove_run", "tools.benchmarks.measured_steps", "tools.gpu_check.bench")
MODULES = [
    module.name
    for package in (data_prep, pipeline, tools)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def test_every_module_can_be_imported() -> None:
    faults = {}
    for name in MODULES:
        if not name.endswith(".__main__"):
            try:
                importlib.import_module(name)
            except ImportError as error:
                if (error.name or "").split(".")[0] not in EXTRAS:
                    faults[name] = error
    assert len(MODULES) > 250 and not faults


def test_every_command_of_tools_answers_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "--help"])
    commands, faults = 0, {}
    for name in MODULES:
        source = find_spec(name).loader.get_source(name) if name.startswith("tools.") else ""
        if 'if __name__ == "__main__"' not in source or name in INTERNAL:
            continue
        commands += 1
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as end:
            if end.code:
                faults[name] = end
        except ImportError as error:
            if (error.name or "").split(".")[0] not in EXTRAS:
                faults[name] = error
        if name not in faults and "usage" not in capsys.readouterr().out.lower():
            faults[name] = "no help"
    assert commands > 20 and not faults
