"""Tokenizer folders as they are found: an end symbol in any of its places, dropout, stripping tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.data_prep_command import call
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer

TEXT = "River stone window letter garden, winter morning market silver travel. " * 30
END = "<|endoftext|>"


def folder(place: Path, end: bool = True, dropout: float | None = None, **files: dict) -> Path:
    """A byte-level BPE; `files`: more of the folder's files, by their stems."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END] if end else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["model"]["dropout"] = dropout
    place.mkdir(parents=True)
    for name, content in ({"tokenizer": spec} | files).items():
        (place / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return place


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": END}},
        {"tokenizer_config": {}, "special_tokens_map": {"eos_token": END}},
        {"special_tokens_map": {"eos_token": {"content": END, "lstrip": False}, "pad_token": END}},
        {"tokenizer_config": {"model_max_length": 1024}},  # GPT-2's own
        {"tokenizer_config": {"eos_token": None}},
        {},
    ],
)
def test_the_end_symbol_is_found(tmp_path: Path, files: dict):
    tokenizer = load_tokenizer(folder(tmp_path / "t", **files))
    assert tokenizer.eos_id == 0 and tokenizer.encode(END).size > 1  # a text does not give it
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.eos_id) == (tokenizer.fingerprint, 0)
    assert json.loads((tmp_path / "copy/tokenizer_config.json").read_text())["eos_token"]


def test_control_symbols_are_part_of_the_fingerprint(tmp_path: Path):
    symbols = [{"eos_token": END}, {"eos_token": END, "pad_token": "r"}, {"eos_token": END, "bos_token": "r"}]
    made = [folder(tmp_path / str(n), tokenizer_config=config) for n, config in enumerate(symbols)]
    assert len({load_tokenizer(one).fingerprint for one in made}) == 3


def test_vocabulary_and_merges_alone(tmp_path: Path):
    whole = folder(tmp_path / "whole")
    model = json.loads((whole / "tokenizer.json").read_text())["model"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (bare / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer, known = load_tokenizer(bare), load_tokenizer(whole)
    assert tokenizer.eos_id == known.eos_id == 0
    assert np.array_equal(tokenizer.encode(TEXT + END), known.encode(TEXT + END))
    (bare / "vocab.json").write_text("no JSON")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(bare)


@pytest.mark.parametrize(
    "files", [{}, {"tokenizer_config": {"eos_token": "</s>"}}, {"special_tokens_map": {"eos_token": "</s>"}}]
)
def test_no_end_symbol_is_refused(tmp_path: Path, files: dict):
    with pytest.raises(UserError, match="names no end symbol: set eos_token in tokenizer_config.json"):
        load_tokenizer(folder(tmp_path / "t", end=False, **files))


def test_dropout_is_switched_off_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    tokenizer = load_tokenizer(folder(tmp_path / "t", dropout=0.3))
    assert "sets BPE dropout 0.3: off here" in capsys.readouterr().err
    plain = load_tokenizer(folder(tmp_path / "plain"))
    assert all(np.array_equal(tokenizer.encode(TEXT), plain.encode(TEXT)) for _ in range(5))
    assert all(np.array_equal(tokenizer.encode_reference(TEXT), plain.encode(TEXT)) for _ in range(5))
    tokenizer.save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy/tokenizer.json").read_text())["model"]["dropout"] is None
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
@pytest.mark.parametrize("special", [True, False])
def test_tokens_that_strip_are_refused_at_the_start(
    tmp_path: Path, side: str, special: bool, capsys: pytest.CaptureFixture
):
    place = folder(tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    token = AddedToken("<mask>", **{side: True})
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.save(str(place / "tokenizer.json"))
    (tmp_path / "x.jsonl").write_text('{"content": "Without it."}\n')
    arguments = ("--input", tmp_path / "x.jsonl", "--output", tmp_path / "s", "--tokenizer", place)
    capsys.readouterr()
    assert call("shard", *arguments) == 2
    assert "its added tokens <mask> strip white space: set lstrip, rstrip" in capsys.readouterr().err
    if special:  # a set or model that has such a tokenizer still loads
        assert load_tokenizer(shutil.copytree(place, tmp_path / "copy")).eos_id == 0
