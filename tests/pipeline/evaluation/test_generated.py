"""Generated text as documents to score, and the agreement of its sentence ends with the segmenter's cuts."""

from __future__ import annotations

import json

import pytest
from helpers import tokenizer_folders
from helpers.model_folders import save, small_model

from data_prep.common.errors import UserError
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import load_tokenizer
from pipeline.evaluation.evaluate import evaluate, format_result
from pipeline.evaluation.generated import cut_agreement, read_generated

LINES = [
    # Two ends: one is a cut; the other, inside a number, is none; "sea. It" is a cut inside a sentence.
    {"prompt": "It was", "samples": [{"sentences": [" so, but 3.", "14 of the sea. It", " ends."]}]},
    {"prompt": "", "samples": [{"sentences": ["One.", " Two.", " Three."]}, {"sentences": ["No end"]}]},
    {"prompt": "too long", "error": "shorten the prompt"},
]


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def test_written_ends_are_compared_with_the_cuts_of_the_same_text(output, tmp_path) -> None:
    tokenizer = load_tokenizer(tokenizer_folders.byte_level(tmp_path / "tokenizer"))
    documents, ends = read_generated(output)
    assert [d.content for d in documents] == [
        "It was so, but 3.14 of the sea. It ends.",
        "One. Two. Three.",
        "No end",
    ]
    assert ends == [[17, 34], [4, 9], []]
    found = cut_agreement(documents, ends, tokenizer, SentenceSettings("sentence", "en", 64))
    assert found == {"written_ends": 4, "agreed": 2, "share": 0.5, "cuts_inside_sentences": 1}


def test_evaluate_reports_the_agreement(output, tmp_path) -> None:
    tokenizer = load_tokenizer(tokenizer_folders.byte_level(tmp_path / "tokenizer"))
    folder = save(small_model("sllm", tokenizer), tmp_path / "sllm", tokenizer)
    result = evaluate(folder, generated=output)
    assert result["documents"] == 3 and result["cut_agreement"]["written_ends"] == 4
    assert "cut agreement" in format_result(result)
    assert "cut_agreement" not in evaluate(folder, text=_records(tmp_path))


def _records(tmp_path) -> str:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"id": "a", "content": "One. Two."}) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "line", ["rubbish", "[]", '{"prompt": "a"}', '{"prompt": 1, "samples": [{"sentences": [2]}]}']
)
def test_another_file_is_refused(line, tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"x.jsonl line 1: no output of `sllm generate"):
        read_generated(tmp_path / "x.jsonl")
