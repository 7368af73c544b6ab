"""The copy of a run in object storage: complete or absent, and no more than the run's folder has."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.s3_server import BUCKET, serving

from data_prep.common import remote
from data_prep.common.errors import UserError
from pipeline.checkpoints import store
from pipeline.checkpoints.mirror import Mirror


def save(run: Path, step: int, best: int | None = None) -> str:
    """A checkpoint of two files, and the run's records."""
    name = store.step_name(step)
    folder = run / "checkpoints" / name
    (folder / "deep").mkdir(parents=True)
    files = {}
    for file in ("model.pt", "deep/optimizer.pt"):
        content = f"{file} {step}".encode() * 1000
        (folder / file).write_bytes(content)
        files[file] = [len(content), hashlib.sha256(content).hexdigest()]
    named = {"best": {"step": best, "bits_per_byte": 1.0} if best else None, "files": files}
    fixed = {"objective": "lm", "step": step, "position": [], "consumed": [], "tokens": step, "world": 1}
    fixed |= {"zero_stage": 1, "shards": [], "validation": None, "tokenizer": "", "model_config": {}}
    store.write_meta(folder, store.Meta(**fixed, recipe={}, **named))
    (run / "checkpoints/latest").write_text(f"{name}\n")
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, step + 1)))
    return name


def contents(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def upload(url: str, run: Path, *names: str) -> list[str]:
    said: list[str] = []
    mirror = Mirror(url, run, said.append)
    for name in names:
        mirror.add(name)
        assert mirror.wait(60)
    return [*said, mirror.missing()]


def fetch(url: str, run: Path) -> str:
    return Mirror(url, run, print).fetch()


def test_the_copy_is_whole_or_absent(tmp_path: Path) -> None:
    url, run = "memory://bucket/whole", tmp_path / "run"
    assert fetch(url, tmp_path / "none") == ""
    assert upload(url, run, save(run, 10), save(run, 20, best=10)) == [""]
    assert fetch(url, tmp_path / "a") == f"step-00000020 was copied from {url}"
    assert contents(tmp_path / "a") == contents(run)
    assert fetch(url, tmp_path / "a") == "", "what is there counts"

    files = fsspec.filesystem("memory")
    meta = files.cat_file("/bucket/whole/checkpoints/step-00000020/meta.json")
    files.rm_file("/bucket/whole/checkpoints/step-00000020/meta.json")
    line = fetch(url, tmp_path / "b")
    assert line.startswith("step-00000020 is not whole there (FileNotFoundError")
    assert line.endswith(f"; step-00000010 was copied from {url}")
    assert (tmp_path / "b/checkpoints/latest").read_text() == "step-00000010\n"
    assert store.find(tmp_path / "b")[1].step == 10
    files.pipe_file("/bucket/whole/checkpoints/step-00000020/meta.json", meta)
    for name in ("step-00000010", "step-00000020"):
        files.pipe_file(f"/bucket/whole/checkpoints/{name}/model.pt", b"short")
    with pytest.raises(UserError, match="bucket/whole has no whole checkpoint: step-00000020 is not whole"):
        fetch(url, tmp_path / "c")


def test_the_newest_one_is_enough_when_the_upload_died_before_the_best_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, run = "memory://bucket/died", tmp_path / "run"
    save(run, 10)
    assert upload(url, run, save(run, 20, best=10)) == [""]
    line = fetch(url, tmp_path / "a")
    assert line.startswith("step-00000010 is not whole there (FileNotFoundError")
    assert line.endswith(f"; step-00000020 was copied from {url}")
    assert store.find(tmp_path / "a")[1].step == 20

    # A network that dies at the last download leaves nothing that a second start would take for the run.
    assert upload(url, run, "step-00000020", "step-00000010") == [""]
    memory = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patched:
        patched.setattr(remote, "WAITS", ())
        patched.setattr(memory, "get_file", _cut(memory.get_file, 3))
        with pytest.raises(UserError, match="no route"):
            fetch(url, tmp_path / "b")
    assert fetch(url, tmp_path / "b") == f"step-00000020 was copied from {url}"
    assert (tmp_path / "b/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (tmp_path / "b/checkpoints/step-00000010/meta.json").exists()


def test_a_checkpoint_of_an_earlier_start_is_uploaded_once(tmp_path: Path) -> None:
    url, run = "memory://bucket/earlier", tmp_path / "run"
    name, memory, written = save(run, 10), fsspec.filesystem("memory"), []
    for _ in range(2):
        mirror = Mirror(url, run, print)
        mirror.add_earlier(name)
        assert mirror.wait(None) and mirror.missing() == ""
        written.append(memory.modified(f"/bucket/earlier/checkpoints/{name}/model.pt"))
    assert written[0] == written[1]


@pytest.mark.parametrize("uploaded", ["no latest", "no best", "nothing"])
def test_a_start_uploads_what_an_earlier_one_did_not_reach(tmp_path: Path, uploaded: str) -> None:
    url, run = f"memory://bucket/{tmp_path.name}", tmp_path / "run"
    files, there = fsspec.filesystem("memory"), f"/bucket/{tmp_path.name}/checkpoints"
    best, last = save(run, 10), save(run, 20, best=10)
    assert upload(url, run, *((best, last) if uploaded == "no latest" else ())) == [""]
    if uploaded == "no latest":
        files.pipe_file(f"{there}/latest", f"{best}\n".encode())
    elif uploaded == "no best":
        assert upload(url, run, last) == [""]
    mirror = Mirror(url, run, print)
    mirror.add_earlier(last)
    assert mirror.wait(60) and mirror.missing() == ""
    assert fetch(url, tmp_path / uploaded) == f"{last} was copied from {url}"
    assert contents(tmp_path / uploaded) == contents(run)


def _cut(function: Any, after: int) -> Any:
    """`function`, which fails after so many calls."""
    calls: list[int] = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise ConnectionError("no route to host")
        return function(*arguments, **options)

    return call


def test_a_checkpoint_that_is_uploaded_again_is_absent_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, run = "memory://bucket/again", tmp_path / "run"
    name = save(run, 10)
    files, meta = fsspec.filesystem("memory"), f"/bucket/again/checkpoints/{name}/meta.json"
    put, there = type(files).put_file, []

    def put_and_look(self: Any, *arguments: Any, **options: Any) -> None:
        there.append(files.exists(meta))
        put(self, *arguments, **options)

    monkeypatch.setattr(type(files), "put_file", put_and_look)
    for _ in range(2):
        assert upload(url, run, name) == [""] and files.exists(meta)
    assert there == [False] * 4


def test_the_copy_loses_what_the_run_has_removed(tmp_path: Path) -> None:
    url, run = "memory://bucket/pruned", tmp_path / "run"
    names = [save(run, step) for step in (10, 20, 30)]
    assert upload(url, run, *names) == [""]
    # Back to 20: 30 is gone, and the run trains on from there.
    shutil.rmtree(run / "checkpoints" / names[2])
    assert upload(url, run, last := save(run, 25), names[1]) == [""]
    assert fetch(url, tmp_path / "a") == f"step-00000025 was copied from {url}"
    there = fsspec.filesystem("memory").ls("/bucket/pruned/checkpoints", detail=False)
    assert sorted(path.rpartition("/")[2] for path in there) == ["latest", *names[:2], last]


def test_a_server_that_is_away_costs_a_line_and_the_next_checkpoint_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    url, run, said = f"s3://{BUCKET}/a/run", tmp_path / "run", []
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        mirror = Mirror(url, run, said.append)
        assert mirror.fetch() == ""
        for step in (10, 20):
            mirror.add(save(run, step, best=10))
            assert mirror.wait(60)
        assert said == [] and mirror.missing() == ""
        assert fetch(url, tmp_path / "a") == f"step-00000020 was copied from {url}"
        assert contents(tmp_path / "a") == contents(run)
    mirror.add(save(run, 30))
    assert mirror.wait(60)
    [line] = said
    assert line.startswith(f"step-00000030 is not uploaded to {url} (cannot reach {url}/checkpoints/step-")
    assert line.endswith("the next checkpoint or start tries again") and "\n" not in line
    assert mirror.missing() == f"not uploaded to {url}: step-00000030"
    with pytest.raises(UserError, match=f"cannot reach {url}/checkpoints/latest: "):
        fetch(url, tmp_path / "b")
