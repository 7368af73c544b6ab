"""Variants of a text on literal examples, and `sllm robustness` with real small models."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.model_folders import save, small_model, write_jsonl

from data_prep.common.errors import run_main
from data_prep.corpus.documents import RawDocument, Reject
from data_prep.text.segmenter import get_segmenter
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli import main as cli
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.robustness import (
    MIXED,
    PLAIN,
    VARIANTS,
    changed,
    cut_by_limit,
    mixed_with,
    no_punctuation,
    noise,
    one_long_sentence,
    wrong_punctuation,
)

ENGLISH = (
    'Dr. Smith paid $3.14 at 12:30, e.g. for tea; "Go!" he said—then left... '
    "The site http://example.com/a.b is up.\nNext line, well-known (1914–1918). It -- maybe -- works?"
)
CHINESE = "第三天，他说：“好。”然后他走了！价格是3.14元，对吗？\n苹果、梨；还有……桃。你好,世界."
MARKS = ".,;:!?。，；：！？"


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (PLAIN, ENGLISH, ENGLISH),
        ("lowercase", "Ein ÄPFEL, DNA. 你好。", "ein äpfel, dna. 你好。"),
        (
            "no punctuation",
            ENGLISH,
            'Dr Smith paid $3.14 at 12:30 e.g for tea "Go" he said then left '
            "The site http://example.com/a.b is up\nNext line well-known (1914–1918) It maybe works",
        ),
        ("no punctuation", CHINESE, "第三天他说“好”然后他走了价格是3.14元对吗\n苹果梨还有桃你好世界"),
        (
            "one long sentence",
            ENGLISH,
            'Dr Smith paid $3.14 at 12:30 e.g for tea "Go" he said then left '
            "The site http://example.com/a.b is up Next line well-known (1914–1918) It maybe works",
        ),
        ("one long sentence", CHINESE, "第三天他说“好”然后他走了价格是3.14元对吗 苹果梨还有桃你好世界"),
        ("no punctuation", "...", ""),
        ("no punctuation", "", ""),
    ],
)
def test_variants_that_draw_nothing(name, text, expected):
    assert VARIANTS[name](text, generator()) == expected


@pytest.mark.parametrize("segmenter", ["clause", "sentence"])
def test_one_long_sentence_is_one_to_the_segmenter(segmenter, tiny_corpus):
    texts = [json.loads(line)["content"] for line in open(tiny_corpus / "valid.jsonl", encoding="utf-8")]
    cut = get_segmenter(segmenter, "auto")
    for text in [ENGLISH, CHINESE, *texts]:
        changed_text = one_long_sentence(text, generator())
        assert len(cut(text)) > 1 and cut(changed_text) == [changed_text]
        # No letter or digit is lost with the marks.
        assert list(filter(str.isalnum, changed_text)) == list(filter(str.isalnum, text))


@pytest.mark.parametrize(
    ("text", "some"),
    [
        ("One, two; three. Four!", {"One, two; three? Four!", "One two,; three. Four!"}),
        ("一，二。三！", {"一；二。三！", "一二，。三！"}),
    ],
)
def test_wrong_punctuation_swaps_or_moves_a_third_of_the_marks(text, some):
    seen = {wrong_punctuation(text, generator(seed)) for seed in range(200)}
    assert some <= seen and text not in seen
    for other in seen:  # one mark of three or four
        kept = sum(a == b for a, b in zip(marks_of(text), marks_of(other), strict=True))
        assert kept >= len(marks_of(text)) - 1
        assert "".join(c for c in other if c not in MARKS) == "".join(c for c in text if c not in MARKS)
    swapped = [other for other in seen if marks_of(other) != marks_of(text)]
    moved = [other for other in seen if marks_of(other) == marks_of(text)]
    assert swapped and moved


def marks_of(text: str) -> str:
    return "".join(c for c in text if c in MARKS)


def test_wrong_punctuation_leaves_numbers_and_addresses_alone():
    for seed in range(20):
        text = wrong_punctuation(ENGLISH, generator(seed))
        assert all(unit in text for unit in ("3.14", "12:30", "http://example.com/a.b", "1914–1918"))
    assert wrong_punctuation("no marks here", generator()) == "no marks here"


@pytest.mark.parametrize("text", ["abcdefgh " * 2000, "一二三四五六七八。" * 2000])
def test_noise_changes_a_twentieth_of_the_letters(text):
    out = noise(text, generator())
    letters = sum(map(str.isalpha, text))
    dropped_or_doubled = letters / 20 * 2 / 3
    same = [c for c in text if not c.isalpha()]
    assert [c for c in out if not c.isalpha()] == same, "only letters change"
    # Doubled and dropped letters balance: what remains is three standard deviations of their difference.
    assert abs(len(out) - len(text)) < 3 * dropped_or_doubled**0.5
    changed_at = [a != b for a, b in zip(text.split(text[8]), out.split(text[8]), strict=True)]
    expected = 1 - 0.95**8  # words of eight letters with at least one change
    assert np.mean(changed_at) == pytest.approx(expected, abs=0.03)


def test_noise_swaps_drops_and_doubles():
    seen = {noise("abc", generator(seed)) for seed in range(2000)}
    assert {"abc", "bac", "acb", "bc", "ac", "ab", "aabc", "abbc", "abcc"} <= seen


def test_mixed_languages_replaces_every_second_sentence():
    mix = mixed_with(["你好。再见。"])
    assert mix("One is here. Two is here.\nThree is here. Four.", generator()) == (
        "One is here. 你好。\nThree is here. 再见。"
    )
    assert mix("Only one.", generator()) == "Only one."
    assert mixed_with(["Yes, I do."])("他来了。她走了。", generator()) == "他来了。Yes, I do."


def test_the_same_seed_gives_the_same_text_however_many_documents():
    documents = [RawDocument(str(n), f"{n} {ENGLISH}", "en", "", n) for n in range(6)]
    for name in ("wrong punctuation", "noise"):
        all_of_them = changed(documents, name, VARIANTS[name], 1)
        assert changed(documents[:3], name, VARIANTS[name], 1) == all_of_them[:3]
        assert changed(documents, name, VARIANTS[name], 2) != all_of_them
        assert all_of_them[0].content[2:] != all_of_them[1].content[2:], "each document has draws of its own"
    (empty,) = changed([RawDocument("1", "?!", "en", "", 7)], "x", no_punctuation, 1)
    assert empty == Reject(7, "empty content")


def test_sentences_cut_by_the_limit(tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_tokenizer)
    document = RawDocument("1", "One two three. " + "word " * 200, "en", "", 1)
    cut = SentenceSettings("clause", "en", 64)
    tokens = len(tokenizer.encode(document.content))
    share = cut_by_limit([document, Reject(2, "empty content")], tokenizer, cut)
    # Two sentences without a limit; how many more, the limit decides.
    extra = share * 2 / (1 - share)
    assert extra == pytest.approx(round(extra)) and tokens / 64 - 2 <= extra <= tokens / 48
    assert cut_by_limit([RawDocument("1", "Short. Shorter.", "en", "", 1)], tokenizer, cut) == 0


# --- the command ---


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run_main("sllm", lambda: cli.main(["robustness", *map(str, arguments)]))
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folders(tiny_tokenizer, tmp_path_factory):
    tokenizer = load_tokenizer(tiny_tokenizer)
    base = tmp_path_factory.mktemp("models")
    return [save(small_model(kind, tokenizer), base / kind, tokenizer) for kind in ("sllm", "lm")]


def test_the_command_measures_what_evaluate_does(run, folders, tiny_corpus, tmp_path):
    text, output = tiny_corpus / "valid.jsonl", tmp_path / "result.json"
    mix = write_jsonl(tmp_path / "zh.jsonl", [CHINESE, "你好。再见。"])
    read = ("--model", *folders, "--text", text, "--max-documents", 2, "--mix", mix)
    status, out, _ = run(*read, "--output", output, "--json")
    result = json.loads(out)
    assert status == 0 and json.loads(output.read_text()) == result
    assert list(result["variants"]) == [*VARIANTS, MIXED] and result["skipped"] == {}
    assert [model["kind"] for model in result["models"]] == ["sllm", "lm"]
    assert result["packages"]["torch"] and result["documents"] == 2
    for number, folder in enumerate(folders):
        plain = evaluate(folder, text=text, max_documents=2)
        first = result["variants"][PLAIN][number]
        assert first["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-6)
        assert first["data_fingerprint"] == plain["data_fingerprint"] and first["change"] == 0
    # Any other variant: write its text to a file, and let `evaluate` read that.
    documents = [json.loads(line)["content"] for line in open(text, encoding="utf-8")][:2]
    raw = [RawDocument(str(n), content, "en", "", n) for n, content in enumerate(documents)]
    noisy = [record.content for record in changed(raw, "noise", noise, 1)]
    expected = evaluate(folders[0], text=write_jsonl(tmp_path / "noisy.jsonl", noisy))
    ours = result["variants"]["noise"][0]
    for key in ("bits_per_byte", "vector_gain", "bytes", "tokens", "sentences", "data_fingerprint"):
        assert ours[key] == pytest.approx(expected[key]), key
    assert ours["change"] == ours["bits_per_byte"] - result["variants"][PLAIN][0]["bits_per_byte"]
    sllm, lm = result["variants"]["one long sentence"]
    assert sllm["cut_by_limit"] == (sllm["sentences"] - 2) / sllm["sentences"]  # two documents, no mark left
    assert sllm["cut_by_limit"] > result["variants"][PLAIN][0]["cut_by_limit"]
    assert sllm["tokens_per_sentence"] == sllm["tokens"] / sllm["sentences"] and "vector_gain" not in lm
    assert sllm["data_fingerprint"] == lm["data_fingerprint"]
    assert sllm["bytes"] < result["variants"][PLAIN][0]["bytes"]


def test_the_table_says_what_was_left_out(run, folders, tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [ENGLISH, "?!"])
    status, out, _ = run("--model", folders[1], "--text", text)
    assert status == 0
    assert "per byte of the changed text" in out and "--mix FILE" in out
    assert out.count("empty content") == 1 and "wrong punctuation" in out


def test_mistakes_are_one_line(run, folders, tiny_corpus, tmp_path):
    good = ("--model", folders[1], "--text", tiny_corpus / "valid.jsonl")
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    for arguments, words in (
        (("--model", folders[1], "--text", tmp_path / "nowhere"), "nowhere"),
        (("--model", tmp_path / "nothing", "--text", tiny_corpus / "valid.jsonl"), "nothing"),
        (("--model", folders[1], "--text", empty), "empty.jsonl: nothing to evaluate"),
        ((*good, "--mix", empty), "empty.jsonl: nothing to evaluate"),
        ((*good, "--mix", tmp_path / "gone"), "gone"),
        ((*good, "--output", tmp_path / "no" / "file.json"), "its folder does not exist"),
        ((*good, "--seed", -1), '"-1" for --seed'),
    ):
        status, out, err = run(*arguments)
        (line,) = err.strip().splitlines()
        assert status == 2 and out == "" and line.startswith("sllm: error: ") and words in line, line
