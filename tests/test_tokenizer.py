"""Tokenizers give every text back, know the bytes of each token, and are refused when they lose any."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizer_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.tokenizer import LossyTokenization, Tokenizer, load_tokenizer, train_sentencepiece

HARD = [
    "\u2581",
    " \u2581\u2581 a\u2581b ",
    "\0",
    "<0x0A>",
    "</s>",
    "<s><pad><unk></s>",
    "\ue000\uf8ff\U0010ffff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "  two  spaces  ",
    "\n\n\t\r\n",
    "\u2585\u2047",
    "\ufeffe\u0301\ufb01\uff21",
    "第三天，他说：“好。”",
    " ",
]
TEXTS = st.lists(st.sampled_from(HARD) | st.text(max_size=20) | st.sampled_from("aeitn ,.")).map("".join)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": load_tokenizer(tokenizer_folders.byte_level(folder / "bytes")),
        "sentencepiece": load_tokenizer(tokenizer_folders.sentence_piece(folder / "pieces")),
    }


@pytest.fixture(params=["byte-level", "sentencepiece"], scope="module")
def tokenizer(request: pytest.FixtureRequest, both: dict[str, Tokenizer]) -> Tokenizer:
    return both[request.param]


@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
    controls = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert not controls & set(tokens.tolist())


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_shapes_and_symbols(tokenizer: Tokenizer):
    tokens = tokenizer.encode("The sea, the sea.")
    assert tokens.dtype == np.uint32 and tokens.ndim == 1
    assert 0 < tokens.size < 17  # merges are used: fewer tokens than characters
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths.dtype == np.int32
    for control in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
        assert tokenizer.byte_lengths[control] == 0
        assert tokenizer.decode([control]) == ""
    assert tokenizer.encode("").size == 0
    batch = tokenizer.encode_batch(["a b", "", "第"])
    assert [tokenizer.decode(one) for one in batch] == ["a b", "", "第"]


def test_an_unfinished_character_is_marked(tokenizer: Tokenizer):
    tokens = tokenizer.encode("a\U0010ffff")
    assert tokens.size >= 4  # the rare character is spelled in bytes
    assert tokenizer.decode(tokens[:-1]) == "a\ufffd"
    assert tokenizer.decode_bytes(tokens[:-1]) == "a\U0010ffff".encode()[:-1]


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint
    text = "".join(HARD) + tokenizer_folders.ENGLISH
    assert np.array_equal(copy.encode(text), tokenizer.encode(text))
    copy.save(tmp_path / "copy")  # onto itself
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def test_ids_of_the_trained_tokenizer(both: dict[str, Tokenizer]):
    trained = both["sentencepiece"]
    assert (trained.bos_id, trained.pad_id, trained.eos_id, trained.vocab_size) == (0, 1, 2, 600)
    assert trained.encode("\n").tolist() == [4]


def test_ids_of_a_hugging_face_folder(both: dict[str, Tokenizer]):
    tokenizer = both["byte-level"]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (2, 1, 2)


def test_training_is_reproducible(tmp_path: Path):
    first = train_sentencepiece(tokenizer_folders.LINES, tmp_path / "a", 500)
    second = train_sentencepiece(iter(tokenizer_folders.LINES), tmp_path / "b", 500)
    assert first.fingerprint == second.fingerprint
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()


def test_a_sample_without_spaces_still_knows_the_space(tmp_path: Path):
    tokenizer = train_sentencepiece(["第二天早上他们又来到海边"] * 50, tmp_path, 290)
    assert tokenizer.encode(" ").size == 1
    assert tokenizer.decode(tokenizer.encode("天 \u2581 早")) == "天 \u2581 早"


def test_long_and_odd_lines_are_learned_from(tmp_path: Path):
    lines = ["zebra" * 3000, "quokka\tquokka\0quokka\u2581quokka\u2585quokka " * 50] + ["a b c d e"] * 50
    tokenizer = train_sentencepiece(lines, tmp_path, 300)
    assert tokenizer.encode("zebra").size <= 2
    assert tokenizer.encode("quokka").size <= 2


@pytest.mark.parametrize(("size", "said"), [(5000, "too high"), (100, "smaller than")])
def test_a_size_that_does_not_suit_the_sample(tmp_path: Path, size: int, said: str):
    with pytest.raises(UserError, match=said):
        train_sentencepiece(tokenizer_folders.LINES[:3], tmp_path, size)


@pytest.mark.slow  # imports transformers
def test_slow_files_and_transformers_agree(tmp_path: Path):
    from transformers import AutoTokenizer

    folder = tokenizer_folders.byte_level(tmp_path / "fast")
    ours = load_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (slow / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (slow / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text(), encoding="utf-8"
    )
    text = tokenizer_folders.ENGLISH + tokenizer_folders.CHINESE
    assert np.array_equal(load_tokenizer(slow).encode(text), ours.encode(text))
    theirs = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert theirs == ours.encode(text).tolist()


def test_tokenizers_that_lose_text_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="loses text: 'Plain words.*comes back as 'plain"):
        load_tokenizer(tokenizer_folders.byte_level(tmp_path / "lower", lowercase=True))
    with pytest.raises(UserError, match="does not work on bytes"):
        load_tokenizer(tokenizer_folders.word_piece(tmp_path / "words"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"byte_fallback": False, "vocab_size": 150}, "no byte pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "loses text"),
        ({"add_dummy_prefix": True}, "loses text"),
        ({"remove_extra_whitespaces": True}, "loses text"),
        ({"pad_id": -1}, "lacks"),
    ],
)
def test_sentencepiece_models_that_lose_text_are_refused(tmp_path: Path, options: dict, said: str):
    good = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "pad_id": 3,
        "vocab_size": 400,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_folders.LINES),
        model_writer=model,
        minloglevel=2,
        **(good | options),
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


def test_folders_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a tokenizer definition"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_a_folder_without_an_end_symbol(tmp_path: Path):
    folder = tokenizer_folders.byte_level(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8")
    with pytest.raises(UserError, match="names no end symbol"):
        load_tokenizer(folder)


def test_loss_in_one_text_is_noticed(both: dict[str, Tokenizer]):
    with pytest.raises(LossyTokenization):
        both["byte-level"].encode_exactly("a text", b"another")
