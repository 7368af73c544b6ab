"""`make test-versions`: the tests on every Python found, and on the oldest and newest torch and transformers.

Each combination gets its own virtual environment below `.versions/` (6 GB with a CUDA build of torch),
which later runs reuse. A Python that is not found is checked as far as one can without it: wheels of all
requirements but DeepSpeed (source only) resolve, and mypy passes with that target.

python -m tools.versions --list
python -m tools.versions python3.12 oldest -- -m 'not long and not launch' -x
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from data_prep.common.errors import UserError, run_main, say

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
EXTRAS = (
    "mpi,dask,fast,s3,near-duplicates,lang,serve,report,eval,lm-eval,import,lora,engines,research,docs,dev"
)
FAST = ("-q", "-m", "not long and not launch")
RANGED = ("torch", "transformers")  # tested at both ends of their ranges


class Environment(NamedTuple):
    """A virtual environment: its interpreter, None if there is none, and the versions it must have."""

    name: str
    version: str
    python: str | None
    pins: tuple[str, ...] = ()


def requirements() -> list[Requirement]:
    """What setup.cfg requires of every installation."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def find_python(version: str) -> str | None:
    """An interpreter of a version: on PATH, or the newest of pyenv's."""
    found = shutil.which(f"python{version}")
    if found and _runs(found, version):
        return found
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = sorted(of_pyenv.glob(f"{version}.*/bin/python"))
    return next((str(path) for path in reversed(places) if _runs(str(path), version)), None)


def _runs(python: str, version: str) -> bool:
    """A shim of pyenv may be there without its interpreter."""
    ask = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version


def environments() -> list[Environment]:
    """Every Python with the newest packages that pip chooses, then the ends of the ranges on this one's."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    ranges = {one.name: one.specifier for one in requirements() if one.name in RANGED}
    oldest = [
        f"{name}=={bound.version}" for name in RANGED for bound in ranges[name] if bound.operator == ">="
    ]
    newest = [f"{name}{ranges[name]}" for name in RANGED]
    return [
        *(Environment(f"python{version}", version, find_python(version)) for version in PYTHONS),
        Environment("oldest", here, sys.executable, tuple(oldest)),
        Environment("newest", here, sys.executable, tuple(newest)),
    ]


def install(environment: Environment) -> Path:
    """Make a virtual environment, or find it complete; returns its interpreter."""
    folder = ROOT / ".versions" / environment.name
    python, complete = folder / "bin" / "python", folder / ".complete"
    if complete.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run([environment.python, "-m", "venv", str(folder)])
    pins = folder / "pins.txt"
    pins.write_text("\n".join(environment.pins) + "\n")
    pip = [str(python), "-m", "pip", "install", "-q", "--upgrade", "--constraint", str(pins)]
    _run([*pip, "setuptools", "wheel", "ninja", "torch"])
    source = [*pip, "--no-build-isolation"]
    _run([*source, "deepspeed<0.20"], DS_BUILD_OPS="0")
    _run([*source, "--editable", f"{ROOT}[{EXTRAS}]"])
    complete.touch()
    return python


def test(environment: Environment, flags: Sequence[str]) -> bool:
    """Run the tests, or what can be checked without the interpreter."""
    if environment.python is None:
        return _resolves(environment.version) and _type_checks(environment.version)
    python = install(environment)
    _run([str(python), "-c", f"from importlib.metadata import version; print(*map(version, {RANGED}))"])
    return subprocess.run([str(python), "-m", "pytest", *flags], cwd=ROOT).returncode == 0


def _resolves(version: str) -> bool:
    wanted = [str(one) for one in requirements() if one.name != "deepspeed"]
    target = ["--dry-run", "--ignore-installed", "--target", str(ROOT / ".versions" / "none")]
    pip = [sys.executable, "-m", "pip", "install", "-q", *target, "--python-version", version]
    return subprocess.run([*pip, "--only-binary=:all:", *wanted]).returncode == 0


def _type_checks(version: str) -> bool:
    return (
        subprocess.run([sys.executable, "-m", "mypy", "--python-version", version], cwd=ROOT).returncode == 0
    )


def _run(command: Sequence[str], **variables: str) -> None:
    if subprocess.run(command, env={**os.environ, **variables}).returncode:
        raise UserError(f"versions: this command failed: {' '.join(command)}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="environments of --list (default: all)")
    parser.add_argument("--list", action="store_true", help="print the environments and leave")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :] or FAST
    known = environments()
    if unknown := set(given.names) - {one.name for one in known}:
        raise UserError(f"versions: no environment {', '.join(sorted(unknown))}: see --list")
    if given.list:
        for one in known:
            found = one.python or "not found: wheels and types only"
            say("  ".join([f"{one.name:11}", found, *one.pins]))
        return 0
    bad = [
        one.name
        for one in known
        if one.name in (given.names or [e.name for e in known]) and not test(one, flags)
    ]
    say(f"versions: failed: {', '.join(bad)}" if bad else "versions: all passed")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(run_main("versions", main))
