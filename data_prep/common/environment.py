"""The environment of a result: date, machine, versions of packages and of this project's code."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.common.files import write_atomically


def header(packages: Iterable[str]) -> dict[str, Any]:
    """Date (UTC) and `machine`."""
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **machine(packages)}


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """CPU, cores, memory, Python, versions of `packages`, and this project's git commit or None."""
    cpu = platform.processor() or platform.machine()
    cores = os.cpu_count()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found.group(1) if found else cpu
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):
        pass
    return {
        "cpu": cpu,
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "packages": package_versions(packages),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package, None for one that is not there."""
    # Imported here: it takes longer than all else that the command's `--help` needs.
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git(*words: str) -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def code_version() -> str:
    """The first 12 hex digits of a sha256 over this project's Python files: other code is another version,
    committed or not."""
    digest = hashlib.sha256()
    for folder in ("data_prep", "pipeline"):
        root = Path(str(files(folder)))
        for path in sorted(root.rglob("*.py")):
            name = f"{folder}/{path.relative_to(root).as_posix()}"
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def require_folder(output: str | None) -> None:
    """Refuse (UserError) a result file that could not be written, before anything is measured for it."""
    if output and not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist")
    if output and Path(output).is_dir():
        raise UserError(f"--output {output}: is a folder; name a file")


def write_result(result: dict[str, Any], output: str | Path | None) -> None:
    """The result as JSON, where a file was asked for."""
    if output:
        write_atomically(Path(output), (json.dumps(result, indent=1) + "\n").encode())
