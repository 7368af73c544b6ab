"""A command that meets a started or finished run: what may differ, and how differences are named."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import tokenizer_folders
from helpers.data_prep_command import call, contents, refused

from data_prep.jobs import units
from data_prep.shards.layout import MANIFEST
from data_prep.shards.reader import ShardSet


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.byte_level(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        lines = [json.dumps({"id": f"{number}-{n}", "content": f"Text {n}. " * 9}) for n in range(60)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(corpus: Path, output: Path, tokenizer: Path, *more: str) -> tuple:
    return (
        "shard",
        "--input",
        corpus,
        "--output",
        output,
        "--tokenizer",
        tokenizer,
        "--unit-mb",
        "0.005",
        *more,
    )


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """Run, and stop like Ctrl-C before a further unit is started."""
    done = []
    real = units.Worker.shard_unit

    def shard_unit(*words: object) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(real(*words))

    with monkeypatch.context() as patch:
        patch.setattr(units.Worker, "shard_unit", shard_unit)
        assert call(*arguments) == 130


@pytest.mark.parametrize("more", [(), ("--deduplicate",)])
def test_touched_and_moved_input_is_resumed(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
):
    assert call(*command(corpus, tmp_path / "reference", tokenizer, *more)) == 0
    stop_after(3, monkeypatch, *command(corpus, tmp_path / "s", tokenizer, *more))
    before = sorted((tmp_path / "s/.unfinished/shard").iterdir())
    assert len(before) >= 3
    for path in corpus.iterdir():
        os.utime(path, ns=(5, 5))
    moved = shutil.copytree(corpus, tmp_path / "elsewhere/corpus")
    made: list[int] = []
    real = units.Worker.shard_unit
    with monkeypatch.context() as patch:
        patch.setattr(units.Worker, "shard_unit", lambda *words: (made.append(words[1]), real(*words)))
        assert call(*command(moved, tmp_path / "s", tokenizer, *more)) == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "reference")
    inputs = ShardSet.open(tmp_path / "s").manifest["inputs"]
    assert len(made) == len({piece["unit"] for entry in inputs for piece in entry["pieces"]}) - 3


def test_the_same_files_in_another_order_are_another_input(
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    first, second = command(corpus / "0.jsonl", tmp_path / "s", tokenizer), corpus / "1.jsonl"
    stop_after(1, monkeypatch, *first[:3], second, *first[3:])
    said = refused(capsys, *first[:2], second, *first[2:])
    assert "unfinished run with other input: another order of the files" in said


def test_changed_input_is_named(
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    arguments = command(corpus, tmp_path / "s", tokenizer)
    stop_after(5, monkeypatch, *arguments)
    for path in sorted(corpus.iterdir()):
        path.write_bytes(path.read_bytes().replace(b"Text 1", b"Text 2"))  # same size
    said = refused(capsys, *arguments)
    assert (
        "unfinished run with other input: corpus/" in said and ".jsonl has changed; finish that one" in said
    )
    (corpus / "1.jsonl").write_bytes(b"")
    (corpus / "3.jsonl").write_bytes(b"")
    (corpus / "2.jsonl").unlink()
    assert "other input: corpus/2.jsonl is missing, corpus/3.jsonl is new, corpus/1.jsonl had " in refused(
        capsys, *arguments
    )


def test_a_finished_set_is_of_every_piece_of_its_input(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    arguments = command(corpus, tmp_path / "s", tokenizer)
    assert call(*arguments) == 0 == call(*arguments)
    pieces = ShardSet.open(tmp_path / "s").manifest["inputs"][1]["pieces"]
    assert len(pieces) > 1
    path = corpus / "1.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: pieces[-1]["start"]] + data[pieces[-1]["start"] :].replace(b"Text", b"Test"))
    assert "holds shards made from another corpus/1.jsonl" in refused(capsys, *arguments)


def test_a_repair_is_not_resumed_as_a_new_run(
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    arguments = command(corpus, tmp_path / "s", tokenizer)
    assert call(*arguments) == 0
    next((tmp_path / "s").glob("*.tar")).unlink()
    stop_after(0, monkeypatch, *arguments)
    (tmp_path / "s" / MANIFEST).unlink()
    assert "unfinished run with another purpose: it repairs a set; " in refused(capsys, *arguments)


def test_other_settings_are_named(
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    arguments = command(corpus, tmp_path / "s", tokenizer)
    stop_after(1, monkeypatch, *arguments)
    for _ in ("unfinished", "finished"):
        said = refused(capsys, *arguments, "--max-tokens", "32", "--white-space")
        assert "other settings: " in said
        assert "white_space (false there, true here)" in said and "max_tokens (64 there, 32 here)" in said
        other = tokenizer_folders.byte_level(tmp_path / f"other-{_}", vocab_size=500)
        assert "another tokenizer: " in refused(capsys, *command(corpus, tmp_path / "s", other))
        assert call(*arguments) == 0
        capsys.readouterr()


def test_files_that_limit_the_workers_are_named(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = b"".join(path.read_bytes() for path in sorted(corpus.iterdir())) * 9
    (corpus / "large.jsonl.gz").write_bytes(gzip.compress(data, 1))
    for path in corpus.glob("[01].jsonl"):
        path.unlink()
    (corpus / "2.jsonl").write_bytes((corpus / "2.jsonl").read_bytes()[:400].rpartition(b"\n")[0] + b"\n")
    assert call(*command(corpus, tmp_path / "s", tokenizer, "--workers", "4")) == 0
    said = capsys.readouterr().err
    assert "corpus/large.jsonl.gz cannot be split and is " in said and " of 4 workers are busy" in said
    assert call(*command(corpus, tmp_path / "one", tokenizer, "--workers", "1")) == 0
    assert "cannot be split" not in capsys.readouterr().err


def test_the_output_may_be_below_the_input(corpus: Path, tokenizer: Path, tmp_path: Path):
    (corpus / "lost.jsonl").symlink_to("nowhere")
    assert call(*command(corpus, corpus / "shards", tokenizer)) == 3  # for the link
    manifest = ShardSet.open(corpus / "shards").manifest
    assert (
        manifest["lost"] == ["corpus/lost.jsonl (a link to nothing)"]
        and manifest["totals"]["documents"] == 180
    )
    assert call(*command(corpus, corpus / "shards", tokenizer)) == 3
    assert call("verify", corpus / "shards", "--deep", "--input", corpus) == 0
