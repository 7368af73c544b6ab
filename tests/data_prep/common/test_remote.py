"""Files behind URLs, on a real S3 server that is killed: read on, or one clear line."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from helpers import ranks, runs
from helpers.data_prep_command import call, contents, data_prep, refused
from helpers.s3_server import BUCKET, Server, serving
from helpers.tokenizer_folders import ENGLISH, byte_level

from data_prep.common import remote
from data_prep.common.errors import UserError
from data_prep.common.remote import is_url, open_remote, without_login
from data_prep.shards.reader import ShardSet
from data_prep.shards.verify import verify

pytestmark = pytest.mark.launch


@pytest.fixture
def server_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], None]:
    def use(server: Server) -> None:
        # An instance keeps the address of the server that it first met.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

    return use


def test_urls_are_told_from_paths_and_logins_are_hidden() -> None:
    assert is_url("s3://bucket/a") and is_url("zip://a.jsonl::s3://bucket/a.zip")
    assert not is_url("/data/a") and not is_url("a:b") and not is_url(Path("s3://bucket"))
    assert without_login("https://me:secret@host/a@b") == "https://host/a@b"


def test_a_read_goes_through_two_kills_of_the_server(
    tmp_path: Path, server_environment: Callable[[Server], None]
) -> None:
    content = bytes(range(256)) * 20_000
    (tmp_path / "file").write_bytes(content)
    with serving(tmp_path, kills=2, most=1) as server:
        server_environment(server)
        parts = []
        with open_remote(f"s3://{BUCKET}/file", block=1 << 20) as stream:
            assert stream.seek(0, 2) == len(content)
            stream.seek(1000)
            while part := stream.read(1 << 20):
                parts.append(part)
        assert server.killed == 2
    assert b"".join(parts) == content[1000:]


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, server_environment: Callable[[Server], None]
) -> None:
    (tmp_path / "file").write_bytes(bytes(6 << 20))
    with serving(tmp_path) as server:
        server_environment(server)
        with open_remote(f"s3://{BUCKET}/file", block=1 << 20) as stream:
            stream.read(1 << 20)
            (tmp_path / "file").write_bytes(bytes(7 << 20))
            server.restart()
            with pytest.raises(UserError, match=rf"^s3://{BUCKET}/file has changed while it was read"):
                stream.read()


def test_a_dead_server_and_a_missing_set_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server_environment: Callable[[Server], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with serving(tmp_path) as server:
        server_environment(server)
        message = refused(capsys, "stage", f"s3://{BUCKET}/nothing", "--to", tmp_path / "to")
        assert f"{BUCKET}/nothing/manifest.json" in message
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))
    assert call("stage", f"s3://{BUCKET}/nothing", "--to", tmp_path / "to") == 2
    *waits, message = capsys.readouterr().err.splitlines()
    assert len(waits) == 2 and all("next try in 0.01 s" in line for line in waits)
    assert message.startswith(f"data-prep: error: cannot read s3://{BUCKET}/nothing/manifest.json: ")
    assert message.endswith("given up after 3 tries in 0.02 s")
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_set_behind_a_url_is_copied_once_and_whole_through_kills(
    kills: int,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server_environment: Callable[[Server], None],
) -> None:
    shutil.copytree(tiny_shards, tmp_path / "served" / "set")
    monkeypatch.setenv("SLLM_SHARD_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "served", kills=kills, most=3) as server:
        server_environment(server)
        times = 0
        while server.killed < kills:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            shards = ShardSet.open(f"s3://{BUCKET}/set")
            assert contents(shards.folder) == contents(tiny_shards)
            times += 1
        (tar,) = [entry["file"] for entry in shards.manifest["shards"]][:1]
        before = (shards.folder / tar).stat().st_mtime_ns
        assert ShardSet.open(f"s3://{BUCKET}/set").folder == shards.folder
        assert (shards.folder / tar).stat().st_mtime_ns == before
    assert verify(shards.folder)["ok"]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_shards_from_a_bucket_are_those_of_the_folder_through_kills(
    kills: int,
    tmp_path: Path,
    server_environment: Callable[[Server], None],
) -> None:
    tokenizer = byte_level(tmp_path / "bytes")
    (tmp_path / "served" / "corpus").mkdir(parents=True)
    for number in range(9):
        text = "".join(f"Line {n} of file {number}. {ENGLISH}" for n in range(20))
        data = json.dumps({"id": str(number), "content": text}).encode() + b"\n"
        name = f"{number}.jsonl.gz" if number % 2 else f"{number}.jsonl"
        (tmp_path / "served" / "corpus" / name).write_bytes(
            gzip.compress(data, mtime=0) if number % 2 else data
        )
    shard = ("shard", "--tokenizer", tokenizer, "--unit-mb", "0.01")
    data_prep(*shard, "--input", tmp_path / "served" / "corpus", "--output", tmp_path / "folder")
    with serving(tmp_path / "served", kills=kills, most=6) as server:
        server_environment(server)
        runs = 0
        while server.killed < kills:
            workers = ("--workers", str(1 + runs % 2))
            data_prep(*shard, "--input", f"s3://{BUCKET}/corpus", "--output", tmp_path / str(runs), *workers)
            assert contents(tmp_path / str(runs)) == contents(tmp_path / "folder")
            runs += 1


def test_training_from_a_bucket_is_training_from_the_folder(
    pool: ranks.RankPool, recipes: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_shards, tmp_path / "served" / "set")
    folder = runs.arguments(recipes, "lm", "zero1", tmp_path / "folder")
    assert pool.run(2, ranks.train, folder) == [0, 0]
    with serving(tmp_path / "served", kills=2, most=3) as server:
        bucket = runs.arguments(
            recipes, "lm", "zero1", tmp_path / "bucket", "--data.shards", f"s3://{BUCKET}/set"
        )
        environment = server.environment | {"SLLM_SHARD_CACHE": str(tmp_path / "cache")}
        assert pool.run(2, ranks.train_with_environment, bucket, environment) == [0, 0]
        assert server.killed == 2
    assert runs.losses(tmp_path / "bucket") == runs.losses(tmp_path / "folder")


def test_a_missing_login_is_reported_at_once(capsys: pytest.CaptureFixture):
    exceptions = pytest.importorskip("botocore.exceptions")
    tries = []

    def action() -> None:
        tries.append(1)
        raise exceptions.NoCredentialsError

    with pytest.raises(UserError, match=r"^cannot read s3://bucket/x: NoCredentialsError: Unable to locate"):
        remote.retry("s3://user:secret@bucket/x", action)
    assert len(tries) == 1 and not capsys.readouterr().err
