"""Wheel and sdist: byte for byte the same at another time, in another folder, under another umask."""

from __future__ import annotations

import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

from data_prep.common.errors import UserError
from tools.release.dist import build

pytestmark = pytest.mark.long


def git(folder: Path, *words: str) -> None:
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a"}
    environment = os.environ | identity | {"GIT_COMMITTER_EMAIL": "a@b"}
    subprocess.run(["git", *words], cwd=folder, env=environment, check=True, capture_output=True)


def test_the_same_commit_gives_the_same_bytes(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    source = tmp_path / "source"
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith(("docs/results", "tests")) and (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    git(source, "init", "-q")
    git(source, "add", "-A")
    git(source, "commit", "-qm", "all")
    subprocess.run(["git", "clone", "-q", source, tmp_path / "clone"], check=True)
    first = build(source, tmp_path / "first")
    time.sleep(2.1)  # zip files keep times to two seconds
    before = os.umask(0o077)
    try:
        second = build(tmp_path / "clone", tmp_path / "second")
    finally:
        os.umask(before)
    assert [path.name for path in first] == [path.name for path in second] and len(first) == 2
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    with tarfile.open(next(path for path in first if path.suffix == ".gz")) as tar:
        assert len({(member.uid, member.uname, member.mtime) for member in tar.getmembers()}) == 1
        names = tar.getnames()
    assert any(name.endswith("pipeline/train.py") for name in names)


def test_outside_of_git_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no git checkout"):
        build(tmp_path, tmp_path / "out")
