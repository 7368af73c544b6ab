"""The benchmark of language identification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmarks import identify_quality


def test_accuracy_speed_and_mixture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sentences = {
        "en": "The river rose in the night, and none of us could reach the old mill below the town.",
        "cs": "V noci se řeka zvedla a nikdo se nemohl dostat ke starému mlýnu pod městem.",
        "bs": "The texts of this file are English.",
        "zh": "夜里河水上涨，没有人能到达城下的老磨坊。",
    }
    for language, sentence in sentences.items():
        (tmp_path / f"{language}.txt").write_text(f"{sentence}\n" * 90, encoding="utf-8")
    output = tmp_path / "result.json"
    assert identify_quality.main([str(tmp_path), "--texts", "3", "--output", str(output)]) == 0
    found = json.loads(output.read_text())["identifiers"]["py3langid"]
    right = {"50": 1.0, "200": 1.0, "1000": 1.0}
    kept = {"precision": 1.0, "recall": 1.0}
    assert found["languages"]["en"] == found["languages"]["cs"] == found["languages"]["zh"] == right | kept
    assert found["languages"]["bs"]["200"] == 0 and found["pairs"] == {"bs as en": 3}
    assert found["installed_mb"] > 1 and found["mb_per_second"]["1000"] > 0 and found["seconds_to_first"] > 0
    assert "| en | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |" in capsys.readouterr().out


def test_texts_are_cut_to_their_length(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("One two.\nThree four.\nFive six.\nSeven.\n")
    (tmp_path / "zh.txt").write_text("一二三。\n四五六。\n", encoding="utf-8")
    assert identify_quality.cut_texts(tmp_path, "en", 12, 9) == ["One two. Thr", "Five six. Se"]
    assert identify_quality.cut_texts(tmp_path, "zh", 6, 9) == ["一二三。四五"]


def test_a_folder_without_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert identify_quality.main([str(tmp_path)]) == 2
    assert "natural_text" in capsys.readouterr().err
