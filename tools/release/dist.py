"""`python -m tools.release.dist`: wheel and sdist in dist/, byte for byte the same for a commit.

Builds from the files of HEAD. Times are those of the commit; owners and modes are fixed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from data_prep.common.errors import UserError, run_main
from data_prep.common.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
# setuptools changes sys.argv, so the folder is read once.
BUILD = "import setuptools.build_meta as b, sys; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"


def build(root: Path, output: Path) -> list[Path]:
    """Build the commit that is checked out in `root`; returns the files. Raises: UserError outside of git."""

    def git(*words: str) -> bytes:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True)
        if done.returncode:
            raise UserError(f"{root} is no git checkout with a commit: {done.stderr.decode().strip()}")
        return done.stdout

    epoch = int(git("log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "made")
        made.mkdir()
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", "HEAD"))) as tar:
            tar.extractall(source, filter="data")
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0"}
        previous = os.umask(0o022)
        try:
            command = [sys.executable, "-c", BUILD, str(made)]
            done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        finally:
            os.umask(previous)
        if done.returncode:
            raise UserError(f"the build failed: {done.stderr.strip().splitlines()[-1]}")
        files = []
        output.mkdir(parents=True, exist_ok=True)
        for path in sorted(made.iterdir()):
            data = path.read_bytes()
            write_atomically(output / path.name, _repacked(data, epoch) if path.suffix == ".gz" else data)
            files.append(output / path.name)
    return files


def _repacked(data: bytes, epoch: int) -> bytes:
    """A tar.gz with sorted members, one time, no owner and fixed modes."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as old,
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda one: one.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release.dist", description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=ROOT / "dist", type=Path, help="folder (default dist/)")
    for path in build(ROOT, parser.parse_args().output):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main("dist", main))
