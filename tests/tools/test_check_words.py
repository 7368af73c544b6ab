"""`tools/check_words.py`: finds a phrase wherever it breaks over lines, and nothing in ordinary English."""

from __future__ import annotations

from pathlib import Path

from tools.check_words import found, text_of


def test_phrases_are_found_with_their_line() -> None:
    text = "ok\n# the run goes\n    # on where it was, Anew\n_begun = 1\nnobody reads"
    assert [(line, phrase.lower()) for line, phrase, _ in found(text)] == [
        (2, "goes on"),
        (3, "anew"),
        (4, "begun"),
        (5, "nobody"),
    ]


def test_ordinary_english_and_quotations_pass() -> None:
    ordinary = "texts are told apart; inputs are output by it; undergo one step; notion; it resumes"
    assert not list(found(ordinary))
    quoted = "<!-- words: quoted -->\nthe run goes on\nthe run goes on"
    assert [line for line, _, _ in found(quoted)] == [3]


def test_only_the_header_of_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n  "//": [\n    "goes on"\n  ],\n  "begun": 1\n}\n')
    assert [(line, phrase) for line, phrase, _ in found(text_of(path))] == [(3, "goes on")]
