"""Tokenizers give every text back, know the bytes of each token, and are refused when they lose any."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from helpers import tokenizer_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import main
from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from data_prep.text.fast_encoder import SWITCH, FastEncoder, fast_encoder
from data_prep.text.tokenizer import LossyTokenization, Tokenizer, load_tokenizer, train_sentencepiece

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
    end = "wombat" * 300  # behind the place where a line is cut
    whole = train_sentencepiece(["a b c d e " * 200 + end], tmp_path / "whole", 280)
    assert (
        whole.fingerprint
        == train_sentencepiece(["a b c d e " * 200, end], tmp_path / "parts", 280).fingerprint
    )


@pytest.mark.parametrize(
    ("size", "said"), [(5000, "too high"), (100, "smaller than"), (10**10, "cannot train")]
)
def test_a_size_that_does_not_suit_the_sample(tmp_path: Path, size: int, said: str):
    with pytest.raises(UserError, match=said):
        train_sentencepiece(tokenizer_folders.LINES[:3], tmp_path, size)


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


# The fast engine ----------------------------------------------------------------------------------------

FAMILIES = {
    "opt": tokenizer_folders.byte_level,
    "llama": tokenizer_folders.llama_like,
    "qwen": tokenizer_folders.qwen_like,
    "sentencepiece": tokenizer_folders.sentence_piece,
}
# What splits and added tokens ask for, beside letters, digits and spaces of many scripts.
PIECES = [*"aestSLdlmv 019.,!-\n\r\t'", "'ll", "'S", "<tool_call>", "<|im_end|>", "</s>", "\u017f", "\u3000"]
PIECES += [
    "\u0301",
    "\u0660",
    "\xb2",
    "\xa0",
    "\u2028",
    "\u200b",
    "\x1f",
    "\x85",
    "字",
    "한",
    "ไ",
    "\u088f's",
]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(FAMILIES[request.param](tmp_path_factory.mktemp(request.param)))


def test_the_engine_is_named_and_no_part_of_the_fingerprint(
    family: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert family.engine.startswith("gigatoken 0.")
    monkeypatch.setenv(SWITCH, "hf")
    slow = load_tokenizer(family.folder)
    assert slow.engine.split()[0] in ("tokenizers", "sentencepiece")
    assert slow.fingerprint == family.fingerprint
    assert np.array_equal(slow.encode("A <s> tale’s 12 clocks\n"), family.encode("A <s> tale’s 12 clocks\n"))
    assert capsys.readouterr().err == ""  # asked for, so no warning
    monkeypatch.setenv(SWITCH, "fast")
    with pytest.raises(UserError, match="DATA_PREP_TOKENIZER=fast"):
        load_tokenizer(family.folder)


@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=40).map("".join))
@settings(max_examples=200, deadline=None)
def test_the_fast_ids_are_the_reference_ids(family: Tokenizer, text: str):
    tokens = family.encode(text)
    assert tokens.dtype == np.uint32
    assert np.array_equal(tokens, family.encode_reference(text))
    assert np.array_equal(family.encode_exactly(text, text.encode()), tokens)


def test_every_character_is_split_as_in_the_reference(tmp_path: Path):
    # "'s" is one token only where a letter or digit stands before it, so it tells how a character is classed.
    tokenizer = load_tokenizer(tokenizer_folders.apostrophe(tmp_path))
    assert tokenizer.engine.startswith("gigatoken")
    assert tokenizer.encode("a's").size == 2 and tokenizer.encode(".'s").size == 3
    points = [*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200)]
    for start in range(0, len(points), 32):
        text = "\n".join(f"{chr(point)}'s" for point in points[start : start + 32])
        assert np.array_equal(tokenizer.encode(text), tokenizer.encode_reference(text)), hex(points[start])


def test_other_ids_are_found_at_the_start(both: dict[str, Tokenizer], capsys: pytest.CaptureFixture):
    ours, other = both["byte-level"], both["sentencepiece"]
    assert fast_encoder(lambda: other._fast._engine, ours.encode_reference, "the reference", []) is None
    said = capsys.readouterr().err
    assert said.startswith("data-prep: warning: the reference encodes, slowly") and "its ids differ" in said
    assert said.count("\n") == 1


def test_other_ids_are_found_in_passing(both: dict[str, Tokenizer]):
    ours, other = both["byte-level"], both["sentencepiece"]
    encoder = FastEncoder(lambda: other._fast._engine, ours.encode_reference, "the reference")
    with pytest.raises(UserError, match=r"text that starts with 'The 1\d\d\. sea'.*DATA_PREP_TOKENIZER=hf"):
        for i in range(200):
            encoder.encode(f"The {i}. sea")


class InBlocks:
    """An engine that cuts long texts, so that words at the cuts get other ids."""

    def __init__(self, engine: Any):
        self.engine = engine

    def encode(self, text: str) -> np.ndarray:
        size = 900 if len(text) > 8000 else 8000
        return np.concatenate([self.engine.encode(text[at : at + size]) for at in range(0, len(text), size)])


def test_other_ids_in_the_middle_of_a_long_text_are_found(both: dict[str, Tokenizer]):
    for tokenizer in both.values():
        read: list[int] = []

        def reference(text: str, tokenizer: Tokenizer = tokenizer, read: list[int] = read) -> np.ndarray:
            read.append(len(text))
            return tokenizer.encode_reference(text)

        texts = [f"The sea {n} was calm, and then it rained. " * 500 for n in range(200)]
        right = FastEncoder(lambda engine=tokenizer._fast._engine: engine, reference, "the reference")
        for text in texts:
            right.encode(text)
        assert len(read) == 1 and 4000 < read[0] < 4200
        wrong = FastEncoder(lambda engine=tokenizer._fast._engine: InBlocks(engine), reference, "it")
        with pytest.raises(UserError, match="different token ids"):
            for text in texts:
                wrong.encode(text)


def test_without_gigatoken_the_reference_encodes(
    both: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if it were not installed
    for kind, tokenizer in both.items():
        slow = load_tokenizer(tokenizer.folder)
        assert slow.engine == slow.reference_name != tokenizer.engine
        assert "it is not installed" in capsys.readouterr().err
        text = tokenizer_folders.ENGLISH + "\u2581" + tokenizer_folders.CHINESE
        assert np.array_equal(slow.encode_exactly(text, text.encode()), tokenizer.encode(text)), kind


def test_a_definition_that_the_engine_cannot_read(both: dict[str, Tokenizer], capsys: pytest.CaptureFixture):
    from gigatoken import Tokenizer as Gigatoken

    reference = both["byte-level"].encode_reference
    assert fast_encoder(lambda: Gigatoken.from_json(b"{}"), reference, "the reference", []) is None
    assert "cannot be used" in capsys.readouterr().err


ALONE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = ALONE | {"use_regex": False}
DIGITS = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": BYTES}, "unknown"),  # gigatoken would split as OPT does
        ({"pre_tokenizer": None}, "unknown"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, ALONE]}}, "unknown"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}}, "no fast pretokenizer"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS | {"invert": True}, BYTES]}},
            "unknown",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [DIGITS | {"pattern": {"Regex": r"\p{Lu}|\p{L}+"}}, BYTES],
                }
            },
            "asks for Lu",
        ),
        ({"model": {"end_of_word_suffix": "s"}}, "sets end_of_word_suffix"),
        ({"added_tokens": [{"content": "<x>", "id": 700, "lstrip": True}]}, "matched in a special way"),
    ],
)
def test_definitions_that_the_engine_might_misread_are_left_to_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, said: str
):
    folder = tokenizer_folders.byte_level(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"] |= change.pop("model", {})
    for token in change.pop("added_tokens", []):
        flags = {"single_word": False, "rstrip": False, "normalized": False, "special": False}
        spec["added_tokens"].append(flags | token)
    (folder / "tokenizer.json").write_text(json.dumps(spec | change), encoding="utf-8")
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:  # such a suffix loses text with either encoder
        assert "loses text" in str(error)
    else:
        assert tokenizer.engine.startswith("tokenizers ")
    warning = capsys.readouterr().err
    assert said in warning and warning.count("\n") == 1


def test_the_engine_is_rebuilt_when_memory_grows(both: dict[str, Tokenizer]):
    built = []

    def build() -> object:
        built.append(1)
        return both["byte-level"]._fast._engine

    texts = [f"Line {i}: the sea, the sea; 第{i}天。" for i in range(50)]
    reference = both["byte-level"].encode_reference
    never = FastEncoder(build, reference, "the reference", check_cost=100, memory_growth=1 << 50)
    always = FastEncoder(build, reference, "the reference", check_cost=100, memory_growth=-(1 << 50))
    for text in texts:
        assert np.array_equal(never.encode(text), reference(text))
    assert len(built) == 2
    for text in texts:
        assert np.array_equal(always.encode(text), reference(text))
    assert len(built) > 10


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_encoding_starts_no_thread(tmp_path: Path):
    before = len(os.listdir("/proc/self/task"))
    tokenizer = load_tokenizer(tokenizer_folders.byte_level(tmp_path))
    tokenizer.encode_batch([tokenizer_folders.ENGLISH * 50, tokenizer_folders.CHINESE])
    assert len(os.listdir("/proc/self/task")) == before


# Other families -----------------------------------------------------------------------------------------


def test_a_vocabulary_above_65536_gives_uint32_shards(tmp_path: Path):
    tokenizer = load_tokenizer(tokenizer_folders.llama_like(tmp_path / "llama"))
    assert tokenizer.vocab_size == 70_003
    # Its last merges are made up of letters: some of these words are the highest ids.
    table = tokenizer._table
    words = [table[index].decode() for index in range(69_000, 70_000, 100)]
    text = tokenizer_folders.ENGLISH + " ".join(words) + " <|end_of_text|> " + tokenizer_folders.CHINESE
    assert tokenizer.encode(text).max() > 65_535
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "content": text}) + "\n", encoding="utf-8")
    command = ["shard", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out"]
    assert main([str(part) for part in (*command, "--tokenizer", tmp_path / "llama")]) == 0
    shards = ShardSet.open(tmp_path / "out")
    (document,) = shards.documents()
    assert document.tokens.dtype == np.dtype("<u4")
    assert np.array_equal(document.tokens, tokenizer.encode(text))
    assert shards.tokenizer().decode(document.tokens) == text


def test_symbols_of_a_qwen_like_tokenizer(tmp_path: Path):
    tokenizer = load_tokenizer(tokenizer_folders.qwen_like(tmp_path))
    assert tokenizer.decode(tokenizer.encode("<tool_call>")) == "<tool_call>"
    assert tokenizer.encode("<tool_call>").size == 1  # an added token that is plain text
    assert tokenizer.encode("<|im_end|>").size > 1  # a control symbol written in a text is text
    assert tokenizer.encode("12345").size == 5


def test_a_normalizer_is_refused_with_what_to_do(tmp_path: Path):
    folder = tokenizer_folders.qwen_like(tmp_path, nfc=True)
    with pytest.raises(UserError, match=r'changes text first \(NFC\): set "normalizer" to null'):
        load_tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": None}), encoding="utf-8")
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("e\u0301")) == "e\u0301"


def test_one_sample_serves_two_languages(both: dict[str, Tokenizer]):
    tokenizer = both["sentencepiece"]
    for text in (tokenizer_folders.ENGLISH, tokenizer_folders.CHINESE):
        assert len(text.encode()) / tokenizer.encode(text).size > 2.5
