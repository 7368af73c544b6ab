"""Readers of JSON and JSONL, and commands whose failure is one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from data_prep.common.errors import UserError
from data_prep.common.files import read_json, read_json_lines, write_atomically
from data_prep.common.processes import run_command, start_logged


def test_a_file_gets_its_name_once_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "one", b"data")
    assert done == ["fsync", "replace"] and (tmp_path / "one").read_bytes() == b"data"


def test_a_folder_is_no_place_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (".", "..", "/", str(tmp_path)):
        with pytest.raises(IsADirectoryError):
            write_atomically(Path(place), b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_json_object_is_read_or_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    with pytest.raises(UserError, match=r"one\.json does not exist$"):
        read_json(path)
    with pytest.raises(UserError, match=r"^the config is missing: make it$"):
        read_json(path, "the config", "is missing: make it")
    assert read_json(path, default={}) == {}
    path.write_text('{"a": [1]}')
    assert read_json(path) == read_json(str(path), default={}) == {"a": [1]}
    for content, words in ((b"{", "cannot be read as JSON"), (b"\xff", "cannot be read as JSON")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_json(path, default={})
    path.write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        read_json(path, default={})


def test_lines_that_are_not_json_are_none_and_a_half_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert list(read_json_lines(path)) == []
    path.write_bytes(b'{"a": 1}\n\xff\n7\n{"b"')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (2, None), (3, 7)]
    path.write_text('{"a": 1}\n{"b": 2}')  # whole, but for the end of its line
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (2, {"b": 2})]


def test_a_command_returns_its_output_or_fails_with_its_last_line(tmp_path: Path) -> None:
    assert run_command([sys.executable, "-c", "print(1)"], "it") == "1\n"
    fails = "import sys; print('out'); print('why\\nbecause', file=sys.stderr); sys.exit(3)"
    with pytest.raises(UserError, match=r"^it ended with status 3: because$"):
        run_command([sys.executable, "-c", fails], "it")
    with pytest.raises(UserError, match=r"^it ended with status 1: no message$"):
        run_command([sys.executable, "-c", "raise SystemExit(1)"], "it")


def test_a_log_has_the_command_and_what_it_prints(tmp_path: Path) -> None:
    log, code = tmp_path / "one.log", "import sys; print('out'); print('err', file=sys.stderr)"
    process = start_logged([sys.executable, "-c", code], log)
    assert process.wait() == 0
    assert sorted(log.read_text().splitlines()[1:]) == ["err", "out"]
    process = start_logged([sys.executable, "-c", code], log, capture=True)
    assert process.communicate()[0] == "out\n"
    assert log.read_text().count("$ ") == 2 and log.read_text().endswith("err\n")
    assert start_logged([sys.executable, "-c", "input()"], log).wait() == 1  # nothing to read
    assert "EOFError" in log.read_text()
