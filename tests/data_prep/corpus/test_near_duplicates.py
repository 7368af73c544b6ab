"""Near-duplicates: found by the share of equal words, for a document that stays, in any cut into units."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.data_prep_command import call, contents, data_prep, refused
from helpers.model_folders import write_jsonl
from helpers.tokenizer_folders import byte_level

from data_prep.corpus import near_duplicates
from data_prep.corpus.near_duplicates import Signer, band_rows, find, jaccard
from data_prep.corpus.words import words_of
from data_prep.shards.reader import ShardSet

WORDS = [f"word{number}" for number in range(3000)]


def _text(rng: random.Random, words: int = 300) -> list[str]:
    return rng.choices(WORDS, k=words)


def _changed(rng: random.Random, words: list[str], share: float) -> list[str]:
    """A copy with this share of its words replaced, evenly spread."""
    places = set(rng.sample(range(len(words)), round(share * len(words))))
    return [rng.choice(WORDS) if n in places else word for n, word in enumerate(words)]


def _found(folder: Path, units: list[list[str]], similarity: float) -> dict[str, str]:
    """{document: the one it is dropped for}; a document's id is unit.number."""
    folders = []
    for unit, texts in enumerate(units):
        signer = Signer()
        for number, text in enumerate(texts):
            signer.add(f"{unit}.{number}", text)
        folders.append(folder / str(unit))
        folders[-1].mkdir(parents=True)
        signer.write(folders[-1])
    found = find(folders, similarity)
    return {f"{unit}.{n}": of for unit, dropped in enumerate(found) for n, of in dropped.items()}


def test_words_ignore_case_marks_width_and_count_characters_where_there_are_no_spaces() -> None:
    assert words_of("The cat's  HAT, ｔｈｅ end_2") == ["the", "cat", "s", "hat", "the", "end", "2"]
    assert words_of("我们2010年") == ["我", "们", "2010", "年"]
    assert words_of("... — !") == []


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.95])
def test_bands_find_pairs_of_the_similarity_asked_for(similarity: float) -> None:
    rows = band_rows(similarity)
    assert 1 - (1 - jaccard(similarity) ** rows) ** (near_duplicates.VALUES // rows) >= 0.99
    assert jaccard(1.0) == 1 and jaccard(0.8) == pytest.approx(0.64 / 1.36)


def test_copies_above_the_similarity_are_found_and_those_below_are_kept(tmp_path: Path) -> None:
    rng = random.Random(0)
    originals = [_text(rng) for _ in range(60)]
    copies = {share: [_changed(rng, text, share) for text in originals] for share in (0.05, 0.1, 0.35)}
    units = [originals, *copies.values()]
    found = _found(tmp_path, [[" ".join(text) for text in unit] for unit in units], 0.8)
    near = {f"{unit}.{n}": f"0.{n}" for unit in (1, 2) for n in range(60)}
    assert {name: of for name, of in found.items() if name[0] in "12"} == near
    assert sum(name.startswith("3") for name in found) <= 1
    assert not any(name.startswith("0") for name in found)


def test_the_result_is_the_same_however_documents_are_cut_into_units(tmp_path: Path) -> None:
    rng = random.Random(1)
    originals = [_text(rng, 80) for _ in range(40)]
    texts = [
        " ".join(_changed(rng, rng.choice(originals), rng.choice([0, 0.1, 0.2, 0.3]))) for _ in range(200)
    ]
    orders = {}
    for size in (200, 7, 1):
        units = [texts[start : start + size] for start in range(0, 200, size)]
        names = [f"{unit}.{n}" for unit, held in enumerate(units) for n in range(len(held))]
        found = _found(tmp_path / str(size), units, 0.8)
        orders[size] = {names.index(name): names.index(of) for name, of in found.items()}
    assert orders[200] == orders[7] == orders[1]
    assert 60 < len(orders[200]) < 200
    # A document is dropped for one that stays.
    assert not set(orders[200].values()) & set(orders[200])


def test_of_two_that_a_document_resembles_the_earlier_is_named(tmp_path: Path) -> None:
    """Also where a band of the later one is compared first."""
    last, first, both = np.random.default_rng(3).integers(1 << 32, size=(3, near_duplicates.VALUES))
    half = near_duplicates.VALUES // 2
    first[:half], last[half:] = both[:half], both[half:]
    near_duplicates.write_signatures(tmp_path, np.stack([last, first, both]))
    (tmp_path / near_duplicates.IDS).write_text('"last"\n"first"\n"both"')
    assert list(find([tmp_path], 0.6)) == [{2: "last"}]


def test_texts_without_words_and_empty_units_are_kept(tmp_path: Path) -> None:
    assert _found(tmp_path / "a", [["...", "", "!!!"], [], ["one", "one", "two"]], 0.8) == {"2.1": "2.0"}
    assert _found(tmp_path / "b", [[]], 0.8) == {}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[list[str], Path]:
    rng = random.Random(2)
    originals = [_text(rng, 120) for _ in range(30)]
    texts = [" ".join(text) + "." for text in originals]
    texts += [" ".join(_changed(rng, text, 0.08)) + "." for text in originals[:12]]
    (tmp_path / "in").mkdir()
    for part in range(3):
        lines = [json.dumps({"id": f"d{n}", "content": texts[n]}) for n in range(part, len(texts), 3)]
        (tmp_path / "in" / f"{part}.jsonl").write_text("\n".join(lines))
    return texts, tmp_path / "in"


def test_shards_drop_near_duplicates_list_them_and_are_the_same_at_any_number_of_workers(
    corpus: tuple[list[str], Path], tokenizer: Path, tmp_path: Path
) -> None:
    shard = ("shard", "--input", corpus[1], "--tokenizer", tokenizer, "--unit-mb", "0.005")
    shard += ("--near-duplicates", "0.8", "--deduplicate")
    data_prep(*shard, "--output", tmp_path / "one")
    data_prep(*shard, "--output", tmp_path / "three", "--workers", "3")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    shards = ShardSet.open(tmp_path / "one")
    assert shards.manifest["rejected"] == {"near-duplicate": 12}
    kept = {document.id for document in shards.documents()}
    lines = [json.loads(line) for line in (tmp_path / "one" / "quarantine.jsonl").read_text().splitlines()]
    assert len(kept) == 30 and len(lines) == 12
    assert all(line["reason"] == "near-duplicate" and line["of"] in kept for line in lines)
    assert shards.manifest["settings"]["near_duplicates"]["similarity"] == 0.8


def test_documents_of_an_earlier_set_count(
    corpus: tuple[list[str], Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, folder = corpus
    shard = ("shard", "--tokenizer", tokenizer, "--near-duplicates", "0.8")
    data_prep(*shard, "--input", folder, "--output", tmp_path / "first")
    fresh = " ".join(reversed(texts[0].split()))
    write_jsonl(tmp_path / "more.jsonl", [texts[3].upper(), fresh])
    more = (*shard, "--input", tmp_path / "more.jsonl")
    data_prep(*more, "--output", tmp_path / "second", "--seen", tmp_path / "first")
    assert ShardSet.open(tmp_path / "second").manifest["totals"]["documents"] == 1
    # Other earlier sets are other settings.
    assert "other settings" in refused(capsys, *more, "--output", tmp_path / "second")
    assert "--near-duplicates" in refused(
        capsys, *more[:3], *more[5:], "--output", tmp_path / "third", "--seen", tmp_path / "first"
    )
    assert call(*shard[:3], *more[5:], "--output", tmp_path / "third", "--near-duplicates", "80") == 2


def test_documents_are_those_that_a_plain_search_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(1 << 32, size=(900, near_duplicates.VALUES), dtype=np.uint32)
    for n in range(100, 900, 2):  # chains of copies of copies, in other units too
        kept = rng.random(near_duplicates.VALUES) < rng.choice([0.4, 0.6, 0.9])
        values[n, kept] = values[rng.integers(n), kept]
    folders, rows, least = [tmp_path / str(unit) for unit in range(3)], band_rows(0.8), jaccard(0.8)
    for unit, folder in enumerate(folders):
        folder.mkdir()
        near_duplicates.write_signatures(folder, values[unit * 300 : unit * 300 + 300])
        (folder / near_duplicates.IDS).write_text("\n".join(str(unit * 300 + n) for n in range(300)))
    found = [unit * 300 + n for unit, dropped in enumerate(find(folders, 0.8)) for n in dropped]
    bands = near_duplicates.VALUES // rows
    kept: list[int] = []
    for n, row in enumerate(values):
        same = values[kept] == row
        alike = (same.mean(axis=1) >= least) & same[:, : bands * rows].reshape(-1, bands, rows).all(2).any(1)
        if not alike.any():
            kept.append(n)
    # A search by bands drops only what a plain one drops, and nearly all of it.
    dropped = set(range(900)) - set(kept)
    assert set(found) <= dropped and len(found) > 0.95 * len(dropped) > 100
