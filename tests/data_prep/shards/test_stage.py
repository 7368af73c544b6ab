"""`data-prep stage`: what is copied is what the manifest says, and appears whole or not at all."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.common.errors import UserError
from data_prep.shards import stage as staging
from data_prep.shards.reader import ShardSet
from data_prep.shards.stage import stage
from data_prep.shards.verify import verify


def test_copies_are_whole_used_again_and_mended(tiny_shards: Path, tmp_path: Path) -> None:
    copy = stage(tiny_shards, tmp_path / "local")
    assert verify(copy) == verify(tiny_shards)
    tar = sorted(copy.glob("*.tar"))[0]
    before = tar.stat().st_mtime_ns
    assert stage(tiny_shards, tmp_path / "local") == copy
    assert tar.stat().st_mtime_ns == before
    tar.write_bytes(tar.read_bytes()[:-1])
    assert stage(tiny_shards, tmp_path / "local") == copy
    assert verify(copy)["ok"]
    tar.write_bytes(tar.read_bytes()[:-1])
    assert stage(tiny_shards, tmp_path / "local", check=False) == copy  # as sets behind URLs: by the sizes
    assert verify(copy)["ok"]
    assert list((tmp_path / "local").iterdir()) == [copy]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 2)])
def test_a_signal_ends_a_copy_and_leaves_nothing(
    tiny_shards: Path, tmp_path: Path, number: int, status: int
) -> None:
    local = tmp_path / "local"
    script = (
        "import os, sys; from data_prep import cli; from data_prep.shards import stage as staging\n"
        "copy = staging._copy\n"
        "def copy_and_be_told(source, target):\n"
        "    found = copy(source, target)\n"
        f"    if target.suffix == '.tar': os.kill(os.getpid(), {int(number)})\n"
        "    return found\n"
        "staging._copy = copy_and_be_told\n"
        f"sys.exit(cli.main(['stage', {str(tiny_shards)!r}, '--to', {str(local)!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == status
    assert list(local.iterdir()) == []


def test_spoilt_source_and_small_disk_leave_nothing(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "train"
    shutil.copytree(tiny_shards, source)
    tar = sorted(source.glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=f"{tar} is not what its manifest says"):
        stage(source, tmp_path / "local")
    assert list((tmp_path / "local").iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match="free"):
        stage(tiny_shards, tmp_path / "local")


def test_command_prints_one_folder_a_line(
    tiny_shards: Path, tiny_valid_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = [str(tiny_shards), str(tiny_valid_shards)]
    assert not cli.main(["stage", *sets, "--to", str(tmp_path)])
    copies = capfd.readouterr().out.split()
    assert [ShardSet.open(copy).fingerprint for copy in copies] == [
        ShardSet.open(s).fingerprint for s in sets
    ]
