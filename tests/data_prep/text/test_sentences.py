"""Sentences are cut where the text allows, split where too long, and joined where too short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import regex
from helpers import tokenizer_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.common.errors import UserError
from data_prep.text.segmenter import get_segmenter
from data_prep.text.sentences import SentenceSettings, cut_document
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

PIECES = [
    "Well, ",
    "he said.",
    " 3.14 ",
    "“No!”",
    "他说：",
    "“好。”",
    "……",
    "\n\n",
    "é",
    "🙂",
    "\u2581",
    "word ",
    "  ",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=40).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": tokenizer_folders.byte_level(folder / "bytes"),
        "sentencepiece": tokenizer_folders.sentence_piece(folder / "pieces"),
        "tails": tokenizer_folders.tails_and_heads(folder / "tails"),
    }


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "tails"])
def tokenizer(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(folders[request.param])


def check_cut(
    text: str, tokenizer: Tokenizer, segmenter: Callable, limits: SentenceSettings | int
) -> list[str]:
    tokens, lengths = cut_document(text, tokenizer, segmenter, limits)
    max_tokens = limits if isinstance(limits, int) else limits.max_tokens
    assert lengths.dtype == np.uint16
    assert lengths.sum() == tokens.size
    assert tokenizer.decode(tokens) == text
    if not text:
        assert lengths.size == 0
        return []
    assert 1 <= lengths.min() and lengths.max() <= max_tokens
    # Strict: a sentence that began or ended inside a character would not decode.
    ends = np.cumsum(lengths, dtype=np.int64)
    sentences = [
        tokenizer.decode_bytes(tokens[end - length : end]).decode("utf-8")
        for end, length in zip(ends, lengths.astype(int), strict=True)
    ]
    assert "".join(sentences) == text
    return sentences


@given(text=TEXTS, name=st.sampled_from(["clause", "sentence"]), max_tokens=st.integers(4, 40))
@settings(max_examples=150, deadline=None)
def test_any_text_is_cut_without_loss(tokenizer: Tokenizer, text: str, name: str, max_tokens: int):
    check_cut(text, tokenizer, get_segmenter(name, "auto"), max_tokens)


@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_every_cut_is_the_first_place_after_its_boundary(tokenizer: Tokenizer, text: str):
    segmenter = get_segmenter("clause", "auto")
    sentences = check_cut(text, tokenizer, segmenter, 65535)
    tokens, _ = cut_document(text, tokenizer, segmenter, 65535)
    # Token boundaries that are character boundaries, in characters, found the slow way.
    places = {0}
    for n in range(1, tokens.size + 1):
        try:
            places.add(len(tokenizer.decode_bytes(tokens[:n]).decode("utf-8")))
        except UnicodeDecodeError:
            continue
    wanted = np.cumsum([len(sentence) for sentence in segmenter(text)])
    expected = sorted({min(place for place in places if place >= boundary) for boundary in wanted})
    assert np.cumsum([len(sentence) for sentence in sentences]).tolist() == expected


def test_boundaries_inside_a_token_move_on_and_merge(tokenizer: Tokenizer):
    def every_character(text: str) -> list[str]:
        return list(text)

    text = "the engineer " * 3
    sentences = check_cut(text, tokenizer, every_character, 64)
    tokens = tokenizer.encode(text)
    assert len(sentences) == tokens.size  # as many cuts as tokens, not as characters


def test_long_sentences_are_split_before_white_space(folders: dict[str, Path]):
    tokenizer = load_tokenizer(folders["byte-level"])
    text = " quartz" * 100
    sentences = check_cut(text, tokenizer, lambda text: [text], 20)
    assert len(sentences) > 10
    assert all(sentence.startswith(" quartz") for sentence in sentences)
    solid = "qx" * 100
    lengths = [len(tokenizer.encode(s)) for s in check_cut(solid, tokenizer, lambda text: [text], 20)]
    assert lengths[:-1] == [20] * (len(lengths) - 1)


@pytest.mark.parametrize(
    "piece",
    ["👨\u200d👩\u200d👧", "🇩🇪", "e\u0301\u0323", "क्षि", "ที่", "각", "👍🏽", "\r\n", "❤\ufe0f"],
    ids=ascii,
)
def test_forced_cuts_fall_between_grapheme_clusters(folders: dict[str, Path], piece: str):
    """Also right behind a word that ends in the first quarter of the limit."""
    tokenizer = load_tokenizer(folders["byte-level"])
    clusters = regex.findall(r"\X", piece)
    for before in ("", "x", "xy z"):
        sentences = check_cut(before + piece * 60, tokenizer, lambda text: [text], 50)
        assert len(sentences) > 2
        cut = [cluster for sentence in sentences for cluster in regex.findall(r"\X", sentence)]
        assert cut == regex.findall(r"\X", before) + clusters * 60


def test_forced_cuts_prefer_word_ends(folders: dict[str, Path]):
    tokenizer = load_tokenizer(folders["byte-level"])
    sentences = check_cut("使用sentence的方法" * 30, tokenizer, lambda text: [text], 40)
    assert len(sentences) > 5
    assert "".join(sentences).count("sentence") == sum(part.count("sentence") for part in sentences)


def test_a_row_of_characters_without_a_place_to_cut(folders: dict[str, Path]):
    tokenizer = load_tokenizer(folders["tails"])
    text = "a, " + "é" * 50 + " b."
    assert tokenizer.encode(text).size == 3 + 51 + 3  # joined across the characters
    sentences = check_cut(text, tokenizer, get_segmenter("clause", "en"), 16)
    assert sentences[0] == "a,"
    assert all(len(sentence) >= 7 for sentence in sentences[1:-1])
    assert len(check_cut("é" * 50, tokenizer, get_segmenter("clause", "en"), 16)) > 3  # from the start on


def test_a_segmenter_that_loses_text_is_noticed(tokenizer: Tokenizer):
    with pytest.raises(AssertionError, match="lost text"):
        cut_document("One. Two.", tokenizer, lambda text: ["One."], 64)


@pytest.mark.parametrize("limit", [3, 0, 65536])
def test_impossible_limits(limit: int):
    with pytest.raises(UserError, match="between 4 and 65535"):
        SentenceSettings("clause", "en", limit)


@pytest.mark.parametrize("limit", [0, 65, -1])
def test_impossible_minimum(limit: int):
    with pytest.raises(UserError, match=r"--min-tokens must lie between 1 and --max-tokens \(64\)"):
        SentenceSettings("clause", "en", 64, limit)


def test_settings_choose_the_segmenter():
    for language in ("en", "zh", "other", "de"):
        named = SentenceSettings("clause", language, 64)
        assert {named.segmenter_for(of).language for of in ("en", "zh", "de", "")} == {language}
    auto = SentenceSettings("sentence", "auto", 64)
    chosen = {of: auto.segmenter_for(of).language for of in ("en", "zh", "", "auto", "de", "ja", "tlh")}
    assert chosen == {"en": "auto", "zh": "auto", "": "auto", "auto": "auto"} | {
        "de": "de", "ja": "ja", "tlh": "other"
    }  # fmt: skip
    assert auto.segmenter_for("en").name == "sentence"
    with pytest.raises(UserError, match="unknown segmenter 'words'"):
        SentenceSettings("words", "en", 64).segmenter_for("en")
    assert SentenceSettings(**auto.to_dict()) == auto


# Splitting: a letter is a token in these texts (the tokenizer merges only words it knows).


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tokenizer_folders.byte_level(tmp_path_factory.mktemp("letters") / "bytes"))


def split(text: str, tokenizer: Tokenizer, max_tokens: int, name: str = "sentence") -> list[str]:
    assert tokenizer.encode(text).size == len(text)
    return check_cut(text, tokenizer, get_segmenter(name, "auto"), max_tokens)


def test_a_long_sentence_is_split_after_the_last_clause_that_fits(letters: Tokenizer):
    text = "Qxq zq, zqxz qzx; qxz qq zqxq zxqz."
    assert split(text, letters, 20) == ["Qxq zq, zqxz qzx;", " qxz qq zqxq zxqz."]
    assert split(text, letters, 16) == ["Qxq zq,", " zqxz qzx;", " qxz qq zqxq", " zxqz."]
    # `clause` has no boundary inside a clause: the sentence is cut at them anyway.
    assert split(text, letters, 20, "clause") == ["Qxq zq,", " zqxz qzx;", " qxz qq zqxq zxqz."]


def test_no_split_in_the_first_quarter(letters: Tokenizer):
    assert split("Qz, qxzqxzqxzqxzqxzqxzqxzqxz.", letters, 16) == ["Qz, qxzqxzqxzqxz", "qxzqxzqxzqxz."]
    assert split("Qz zq, qxzqxzqxzqxzqxzqxzqxz.", letters, 16) == ["Qz zq,", " qxzqxzqxzqxzqxz", "qxzqxz."]
    assert split("Q qxzqxzqxzqxzqxzqxzqxz", letters, 8) == ["Q qxzqxz", "qxzqxzqx", "zqxzqxz"]


def test_long_chinese_sentences_are_split_at_clauses(folders: dict[str, Path]):
    tokenizer = load_tokenizer(folders["byte-level"])
    text = "他来了，她走了，我们都在这里等着。他来了，她走了，我们都在这里等着。"
    size = tokenizer.encode("他来了，她走了，").size
    pieces = check_cut(text, tokenizer, get_segmenter("sentence", "zh"), size)
    assert pieces[0] == "他来了，她走了，"
    assert pieces[-1].endswith("等着。")


# Joining ------------------------------------------------------------------------------------------------


def join(
    text: str, tokenizer: Tokenizer, min_tokens: int, max_tokens: int, name: str = "clause"
) -> list[str]:
    assert tokenizer.encode(text).size == len(text)
    limits = SentenceSettings(name, "auto", max_tokens, min_tokens)
    return check_cut(text, tokenizer, limits.segmenter_for("en"), limits)


@pytest.mark.parametrize(
    ("text", "min_tokens", "max_tokens", "wanted"),
    [
        ("Qz, qxzqxz, zxqzxq.", 1, 64, ["Qz,", " qxzqxz,", " zxqzxq."]),
        ("Qz, qxzqxz, zxqzxq.", 4, 64, ["Qz, qxzqxz,", " zxqzxq."]),  # to the next
        ("Qxzqxz, zxqzxq, zx.", 5, 64, ["Qxzqxz,", " zxqzxq, zx."]),  # at the line's end to the one before
        ("Qz, qxzqxz, zxqzxq.", 4, 10, ["Qz,", " qxzqxz,", " zxqzxq."]),  # never beyond the limit
        ("Qxzq, z, zxqzxq.", 4, 9, ["Qxzq, z,", " zxqzxq."]),  # too long with the next: to the one before
        ("Qz, zx, qx, zq.", 12, 64, ["Qz, zx, qx, zq."]),
        ("Qxzqxz.\nQz.\nZxqzxq.", 5, 64, ["Qxzqxz.", "\nQz.\nZxqzxq."]),  # alone on its line
        ("Qxzqxz.\nQz.", 5, 64, ["Qxzqxz.\nQz."]),  # alone on the last line
        ("Qxzqxz.\nQz.\nZxqzxqzxq.", 5, 12, ["Qxzqxz.\nQz.", "\nZxqzxqzxq."]),
        ("Qxzqxz, zx.\nZxqzxq.", 5, 64, ["Qxzqxz, zx.", "\nZxqzxq."]),  # not across a line break
        ("Zx, zqxzqxzqxz.\nZq, zxqzxq.", 5, 14, ["Zx,", " zqxzqxzqxz.", "\nZq, zxqzxq."]),
        ("Qz", 8, 64, ["Qz"]),
    ],
)
def test_short_sentences_are_joined(
    letters: Tokenizer, text: str, min_tokens: int, max_tokens: int, wanted: list[str]
):
    assert join(text, letters, min_tokens, max_tokens) == wanted


@given(text=TEXTS, max_tokens=st.integers(8, 40), share=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_joining_only_removes_cuts(tokenizer: Tokenizer, text: str, max_tokens: int, share: float):
    segmenter = get_segmenter("clause", "auto")
    limits = SentenceSettings("clause", "auto", max_tokens, 1 + int(share * (max_tokens - 1)))
    check_cut(text, tokenizer, segmenter, limits)
    _, plain = cut_document(text, tokenizer, segmenter, max_tokens)
    _, joined = cut_document(text, tokenizer, segmenter, limits)
    assert set(np.cumsum(joined)) <= set(np.cumsum(plain))
    for first, second in zip(joined[:-1].astype(int), joined[1:].astype(int), strict=True):
        # Two short neighbours remain only where a line or the limit parts them.
        if max(first, second) < limits.min_tokens and first + second <= max_tokens:
            assert any(text.count(mark) for mark in "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
