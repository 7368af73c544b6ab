"""Documents that share 13 words with test texts are dropped; nothing else is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers.data_prep_command import data_prep, refused
from helpers.model_folders import write_jsonl
from helpers.tokenizer_folders import byte_level

from data_prep.corpus.compression import CONTAMINATED
from data_prep.corpus.decontamination import SPAN, HeldOutSpans
from data_prep.shards.reader import ShardSet
from data_prep.shards.verify import verify

WORDS = [f"word{number}" for number in range(500)]


def test_planted_spans_are_found_in_any_spelling_and_shorter_ones_are_not() -> None:
    rng = random.Random(0)
    tests = [" ".join(rng.choices(WORDS, k=rng.randint(SPAN, 60))) for _ in range(100)]
    spans = HeldOutSpans(tests)
    for number in range(1000):
        words = rng.choice(tests).split()
        start = rng.randint(0, len(words) - SPAN)
        planted = words[start : start + SPAN]
        around = [rng.choices(WORDS, k=rng.randint(0, 50)) for _ in range(2)]
        spelled = rng.choice([" ", "\n", ", ", " — "]).join(planted)
        text = " ".join([*around[0], spelled.upper() if number % 2 else spelled, *around[1]])
        assert spans.found_in(text) is not None
        broken = [*planted[:6], "otherwise", *planted[7:]]
        assert spans.found_in(" ".join([*around[0], *broken[:12], *around[1]])) is None
    assert spans.found_in(" ".join(tests[0].split()[:SPAN])) == " ".join(tests[0].split()[:SPAN])


def test_text_that_shares_no_span_is_kept_and_short_texts_are_counted() -> None:
    rng = random.Random(1)
    spans = HeldOutSpans(" ".join(rng.choices(WORDS, k=n)) for n in (0, 5, 12, 13, 14, 400))
    assert (spans.texts, spans.short, len(spans)) == (6, 3, 1 + 2 + 388)
    assert not any(spans.found_in(" ".join(rng.choices(WORDS, k=500))) for _ in range(200))
    assert spans.found_in("") is None and HeldOutSpans().found_in("a " * 20) is None


def test_chinese_counts_characters() -> None:
    spans = HeldOutSpans(["人工智能是研究如何让机器思考的学科。"])
    assert spans.found_in("书上说：人工智能，是研究如何让机器思考") == " ".join("人工智能是研究如何让机器思")
    assert spans.found_in("人工智能是研究如何思考的学科") is None


def test_written_spans_find_the_same(tmp_path: Path) -> None:
    spans = HeldOutSpans([" ".join(WORDS[:30])])
    spans.write(tmp_path / "spans.npz")
    loaded = HeldOutSpans.load(tmp_path / "spans.npz")
    for text in (" ".join(WORDS[10:25]), " ".join(WORDS[20:40]), "x"):
        assert loaded.found_in(text) == spans.found_in(text)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_shards_drop_contaminated_documents_and_count_them(
    workers: str, tokenizer: Path, tmp_path: Path
) -> None:
    rng = random.Random(2)
    texts = [" ".join(rng.choices(WORDS, k=60)) + "." for _ in range(40)]
    tests = [" ".join(text.split()[20:40]) for text in texts[:7]] + ["Too short."]
    write_jsonl(tmp_path / "in.jsonl", texts)
    (tmp_path / "tests").mkdir()
    write_jsonl(tmp_path / "tests" / "a.jsonl", tests[:3])
    write_jsonl(tmp_path / "tests" / "b.jsonl", tests[3:])
    shard = ("shard", "--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--workers", workers)
    shard += ("--output", tmp_path / "out", "--unit-mb", "0.004", "--decontaminate", tmp_path / "tests")
    data_prep(*shard)
    manifest = ShardSet.open(tmp_path / "out").manifest
    assert manifest["rejected"] == {"shares words with a test text": 7}
    found = manifest["settings"]["decontaminate"]
    assert {key: found[key] for key in ("texts", "short", "words")} == {"texts": 8, "short": 1, "words": SPAN}
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["of"] for line in lines] == [" ".join(text.split()[20:33]) for text in texts[:7]]


def _command(folder: Path, tokenizer: Path) -> tuple[str | Path, ...]:
    return ("shard", "--input", folder / "in.jsonl", "--tokenizer", tokenizer, "--output", folder / "out")


def test_contaminated_documents_are_only_marked_on_request(tokenizer: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=60)) + "." for _ in range(5)]
    write_jsonl(tmp_path / "in.jsonl", texts)
    write_jsonl(tmp_path / "tests.jsonl", [texts[1], texts[4]])
    shard = _command(tmp_path, tokenizer)
    data_prep(*shard, "--decontaminate", tmp_path / "tests.jsonl", "--mark-contaminated")
    shards = ShardSet.open(tmp_path / "out")
    assert [document.mark for document in shards.documents()] == [0, CONTAMINATED, 0, 0, CONTAMINATED]
    assert shards.manifest["marked"] == {"contaminated": 2} and shards.manifest["rejected"] == {}
    assert verify(tmp_path / "out")["ok"]


def test_changed_or_unusable_test_texts_are_refused(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "in.jsonl", [" ".join(WORDS)])
    shard = _command(tmp_path, tokenizer)
    shard += ("--decontaminate", tmp_path / "tests.jsonl")
    assert "tests.jsonl" in refused(capsys, *shard)
    write_jsonl(tmp_path / "tests.jsonl", ["Too short."])
    assert "13 words" in refused(capsys, *shard)
    (tmp_path / "tests.jsonl").write_text('{"content": 3}\n')
    assert "line 1" in refused(capsys, *shard)
    write_jsonl(tmp_path / "tests.jsonl", [" ".join(reversed(WORDS))])
    data_prep(*shard)
    write_jsonl(tmp_path / "tests.jsonl", [" ".join(WORDS)])
    assert "other settings" in refused(capsys, *shard)
