"""A folder that brings a machine without a package index what the checks need: wheels, shards, run.sh.

That machine has torch, transformers and what these two need; everything else that the checks import is
carried, in the releases of this environment. A rehearsal runs checks here with all other packages refused.
"""

from __future__ import annotations

import configparser
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from data_prep.common.errors import UserError, log
from data_prep.common.processes import run_command
from tools.gpu_check import runner

MOST_MIB = 40
# What comes with torch and transformers, by their own requirements, but typing-extensions: pydantic needs a
# newer one than they do.
THERE = frozenset(
    "filelock fsspec huggingface-hub jinja2 markupsafe mpmath networkx numpy packaging pyyaml regex "
    "safetensors setuptools sympy tokenizers torch tqdm transformers triton".split()
)
# The checks read shards only: what reads corpora stays here, and so does TensorBoard.
LEFT_OUT = frozenset("datasets pyarrow webdataset tensorboard".split())
SOURCE_ONLY = "deepspeed"  # without ops it is pure Python
PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1")]
REHEARSED = ("train", "tests")
VOCABULARY = "8192"
RUN = """\
#!/usr/bin/env bash
# In the project's folder: bash BUNDLE/run.sh OUT [OPTIONS of `python -m tools.gpu_check run`]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=$(mktemp -d)
for wheel in "$here"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
export PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1
python3 -m tools.gpu_check run --inputs "$here/inputs" --output "$1" "${@:2}"
"""
# As sitecustomize.py: a module of a package that the other machine lacks is not found.
REFUSE = """\
import sys
from importlib.machinery import PathFinder
REFUSED = set({refused!r})
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
"""


def make(output: Path, python_version: str, inputs: str | None = None) -> int:
    """Write the folder; its size in bytes. inputs: shard sets to carry, in place of the demo corpus.

    Raises: UserError for one that is too large, that is no empty folder, or whose rehearsal fails.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output}: is not empty: name a new folder")
    (output / "wheels").mkdir(parents=True, exist_ok=True)
    carried = needed(python_version)
    log(f"wheels for Python {python_version}: {', '.join(carried)}")
    _download(carried, python_version, output / "wheels")
    if inputs:
        shutil.copytree(inputs, output / "inputs")
    else:
        prepare_inputs(output / "inputs")
    (output / "run.sh").write_text(RUN)
    size = require_size(output)
    rehearse(output, carried)
    return size


def require_size(output: Path) -> int:
    """Bytes of a folder. Raises: UserError above the limit."""
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if size > MOST_MIB * 2**20:
        raise UserError(f"{output}: {size / 2**20:.1f} MiB, at most {MOST_MIB}: carry smaller shards")
    return size


def needed(python_version: str) -> dict[str, str]:
    """Package → release of all that must be carried: the project's requirements and theirs, and the tests'.

    Raises: UserError for one that is not installed here.
    """
    setup = configparser.ConfigParser()
    setup.read(runner.ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    direct = [line for line in lines if line and not line.startswith("#")]
    return _closure([*direct, "pytest", "hypothesis"], python_version, THERE | LEFT_OUT)


def _closure(direct: Iterable[str], python_version: str, without: Collection[str] = ()) -> dict[str, str]:
    place = {"python_version": python_version, "python_full_version": f"{python_version}.0", "extra": ""}
    open_, found = list(map(Requirement, direct)), dict[str, str]()
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        if name in without or name in found:
            continue
        if requirement.marker and not requirement.marker.evaluate(place):
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            raise UserError(f"{name} is not installed here: run `make setup`") from None
        found[name] = installed.version
        open_ += map(Requirement, installed.requires or ())
    return dict(sorted(found.items()))


def _download(carried: dict[str, str], python_version: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    pinned = [f"{name}=={version}" for name, version in carried.items() if name != SOURCE_ONLY]
    place = [word for name in PLATFORMS for word in ("--platform", name)]
    place += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    run_command([*pip, "download", "-q", "--no-deps", *place, "-d", str(folder), *pinned], "pip download")
    source = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    run_command([*pip, *source, f"{SOURCE_ONLY}=={carried[SOURCE_ONLY]}"], "pip wheel", env=environment)


def prepare_inputs(folder: Path) -> None:
    """Shard sets `train` and `valid` of the demo corpus."""
    from data_prep.cli import main as data_prep

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as text:
        tokenizer, sources = f"{text}/tokenizer", {"train": f"{text}/EN", "valid": f"{text}/valid"}
        data_prep(["demo-corpus", "--output", text])
        words = ["--output", tokenizer, "--vocab-size", VOCABULARY]
        data_prep(["tokenizer", "--input", sources["train"], *words])
        for part, source in sources.items():
            words = ["--tokenizer", tokenizer, "--segmenter", "clause", "--lang", "en"]
            data_prep(["shard", "--input", source, "--output", str(folder / part), *words])


def rehearse(bundle: Path, carried: Iterable[str], checks: Sequence[str] = REHEARSED) -> None:
    """Run checks on this CPU without the packages that the other machine lacks.

    Raises: UserError with the last line of a check that fails."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    allowed = {*_closure(["torch", "transformers"], version), *THERE, *carried, "sentence-llm"}
    refused = sorted(
        module
        for module, owners in packages_distributions().items()
        if not allowed & set(map(canonicalize_name, owners))
    )
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(REFUSE.format(refused=refused))
        command = [sys.executable, "-m", "tools.gpu_check", "run", "--device", "cpu", "--small", "--output"]
        command += [str(folder / "out"), "--inputs", str(bundle / "inputs"), "--only", *checks]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        log(f"rehearsal of {', '.join(checks)} without {len(refused)} modules that stay here")
        run_command(command, "the rehearsal", env=environment, cwd=runner.ROOT)
