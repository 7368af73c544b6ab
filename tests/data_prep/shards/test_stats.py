"""`stats` against a plain slow loop over the documents, and its page: figures, escaping, structure, bytes."""

from __future__ import annotations

import json
import math
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import tokenizer_folders

from data_prep import cli
from data_prep.common.charts import figure
from data_prep.common.errors import UserError
from data_prep.shards.layout import Document
from data_prep.shards.reader import ShardSet
from data_prep.shards.stats import percent, stats, stats_text
from data_prep.shards.stats_page import _document_sizes, _lengths, stats_page
from pipeline.data.windows import cut_windows

LIMIT = 24  # tokens a sentence: short enough for some to be split
HOSTILE = (
    "<script>alert('1')</script> & \"</title></style><img src=x onerror=alert(1)>\", \u202eback\u202c, "
    "nul \0 bell \x07 tab \t c1 \x9b end. \uffff"
)


def text(seed: int, sentences: int) -> str:
    """Sentences of very different lengths."""
    numbers = random.Random(seed)
    words = "the sea was cold and they had nothing to say of it when morning came".split()
    parts = []
    for n in range(sentences):
        length = min(60, int(numbers.expovariate(0.12)) + 1)
        parts.append(f"{n}" + "".join(" " + numbers.choice(words) for _ in range(length)) + ".")
    return " ".join(parts)


def record(key: str, content: str) -> str:
    return json.dumps({"id": key, "content": content})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    books = [record(f"book-{n}", text(n, 3 + 7 * n)) for n in range(60)]
    web = [record(f"web-{n}", text(1000 + n, 1 + n % 9)) for n in range(70)]
    web += [
        "{broken",
        record("x", ""),
        record("again", text(1003, 4)),
        "{broken",
        record("once", text(1003, 4)),
    ]
    web += [record("book again", text(5, 38)), json.dumps({"content": "No id, no name."})]
    news = [record(f"news-{n}", tokenizer_folders.CHINESE * (1 + n)) for n in range(30)]
    news += ["[]"]
    hostile = [record('<b onclick="x">', HOSTILE + f" {n // 2}.") for n in range(4)]
    for name, lines in (("EN/books", books), ("EN/web", web), ("CN/news", news), ("EN/<i>&amp;", hostile)):
        (folder / name).mkdir(parents=True)
        (folder / name / "part.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def make(corpus: Path, output: Path, *more: str) -> Path:
    tokenizer = tokenizer_folders.byte_level(output.parent / "tokenizer")
    arguments = ["shard", "--input", corpus, "--output", output, "--tokenizer", tokenizer]
    assert cli.main([*map(str, arguments), "--max-tokens", str(LIMIT), *more]) == 0
    return output


@pytest.fixture(scope="module")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(corpus, tmp_path_factory.mktemp("made") / "shards", "--shard-documents", "25")


@pytest.fixture(scope="module")
def documents(shards: Path) -> list[Document]:
    return list(ShardSet.open(shards).documents())


@pytest.fixture(scope="module")
def result(shards: Path) -> dict:
    return stats(shards, bin_tokens=600, window_tokens=200)


def percentile(values: list[int], percent: int) -> int:
    return sorted(values)[max(1, math.ceil(percent * len(values) / 100)) - 1]


def expected(documents: list[Document]) -> dict:
    """One group's figures, one document and one sentence at a time."""
    lengths = [int(length) for document in documents for length in document.sentence_lengths]
    spreads = {
        "tokens_per_sentence": lengths,
        "sentences_per_document": [document.sentence_lengths.size for document in documents],
        "tokens_per_document": [document.tokens.size for document in documents],
    }
    kept = 0
    for document in documents:
        tensor = np.zeros((64, 64), dtype=bool)
        for row, sentence in enumerate(document.sentences()[:64]):
            tensor[row, : sentence[:64].size] = True
        kept += int(tensor.sum())
    tokens = sum(lengths)
    size = sum(document.bytes for document in documents)
    rows = []
    while not rows or rows[-1][1] < max(spreads["sentences_per_document"]):
        first = 2 ** len(rows)
        counted = sum(first <= n < 2 * first for n in spreads["sentences_per_document"])
        rows.append([first, 2 * first - 1, counted])
    return {
        "documents": len(documents),
        "sentences": len(lengths),
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": pytest.approx(size / tokens, abs=1e-4),
        **{
            name: {
                "mean": pytest.approx(sum(values) / len(values), abs=1e-3),
                "p5": percentile(values, 5),
                "median": percentile(values, 50),
                "p95": percentile(values, 95),
                "p99": percentile(values, 99),
                "max": max(values),
            }
            for name, values in spreads.items()
        },
        "share_at_limit": pytest.approx(lengths.count(LIMIT) / len(lengths), abs=1e-6),
        "share_one_token": pytest.approx(lengths.count(1) / len(lengths), abs=1e-6),
        "histogram": [lengths.count(length) for length in range(LIMIT + 1)],
        "document_histogram": rows,
        "tensor_64x64": {
            "padding": pytest.approx(1 - kept / (4096 * len(documents)), abs=1e-6),
            "dropped": pytest.approx(1 - kept / tokens, abs=1e-6),
        },
    }


def test_figures_are_those_of_a_plain_loop(result: dict, documents: list[Document]):
    whole = expected(documents)
    assert {key: result[key] for key in whole} == whole
    assert whole["documents"] == 168 and whole["sentences"] > 2 * 6400 and result["shards"] > 5
    assert 0 < result["share_at_limit"] < 1 and 0 < result["tensor_64x64"]["dropped"] < 1
    assert set(result["languages"]) == {"en", "zh"}
    for name, group in result["languages"].items():
        assert group == expected([d for d in documents if d.language == name])
    assert set(result["sources"]) == {"books", "web", "news", "<i>&amp;"}
    for name, group in result["sources"].items():
        assert group == expected([d for d in documents if d.source == name])
    for group in result["groups"]:
        key = group["language"], group["source"]
        facts = {"language": key[0], "source": key[1]}
        assert group == facts | expected([d for d in documents if (d.language, d.source) == key])
    assert sum(group["tokens"] for group in result["groups"]) == result["tokens"]
    json.dumps(result)


def test_padding_by_brute_force(result: dict, documents: list[Document]):
    lengths = [int(length) for document in documents for length in document.sentence_lengths]
    tokens = sum(lengths)

    def cells(sentences: list[int]) -> int:
        batches = [sentences[n : n + 64] for n in range(0, len(sentences), 64)]
        return sum(len(batch) * max(batch) for batch in batches)

    sorted_cells = sum(cells(sorted(lengths[n : n + 6400])) for n in range(0, len(lengths), 6400))
    padding = result["padding"]
    for name, computed in (("batch", cells(lengths)), ("sorted_batch", sorted_cells)):
        assert padding[name]["padding"] == pytest.approx(1 - tokens / computed, abs=1e-6)
        assert padding[name]["cells_per_token"] == pytest.approx(computed / tokens, abs=1e-4)
    assert {name: padding["tensor_64x64"][name] for name in ("padding", "dropped")} == result["tensor_64x64"]

    # The trainer's windows, and best fit as a search through all open bins.
    windows = [
        int(document.sentence_lengths[first:end].sum())
        for document in documents
        for first, end in cut_windows(document.sentence_lengths, 200)
    ]
    open_bins: list[int] = []
    closed = 0
    for window in windows:
        fitting = [room for room in open_bins if room >= window]
        if fitting:
            open_bins.remove(min(fitting))
            room = min(fitting)
        else:
            if len(open_bins) == 64:
                open_bins.remove(min(open_bins))
                closed += 1
            room = 600
        if room == window:
            closed += 1
        else:
            open_bins.append(room - window)
    bins = closed + len(open_bins)
    assert closed > 100
    assert (padding["packed"]["windows"], padding["packed"]["bins"]) == (len(windows), bins)
    assert padding["packed"]["padding"] == pytest.approx(1 - tokens / (600 * bins), abs=1e-6)


def test_a_window_holds_the_longest_sentence(shards: Path, result: dict):
    packed = stats(shards, bin_tokens=1, window_tokens=1)["padding"]["packed"]
    assert packed["window_tokens"] == packed["bin_tokens"] == LIMIT
    assert packed["windows"] > result["padding"]["packed"]["windows"]


def test_copies_are_counted(result: dict, documents: list[Document]):
    tokenizer_text: dict[bytes, list[Document]] = {}
    for document in documents:
        tokenizer_text.setdefault(document.tokens.tobytes(), []).append(document)
    several = [same for same in tokenizer_text.values() if len(same) > 1]
    copies = result["duplicates"]
    assert copies["texts"] == len(several) == 4
    assert copies["documents"] == sum(len(same) - 1 for same in several) == 5
    assert copies["share"] == pytest.approx(5 / 168, abs=1e-6)
    assert copies["tokens"] == sum(same[0].tokens.size * (len(same) - 1) for same in several)
    assert [one["documents"] for one in copies["most_copied"]] == [3, 2, 2, 2]
    most = copies["most_copied"][0]
    assert (most["id"], most["source"], most["start"]) == ("web-3", "web", text(1003, 4)[:100])


def test_rejects_are_told_by_reason_and_file(result: dict):
    assert result["rejected"] == {"empty content": 1, "invalid JSON": 2, "not an object": 1}
    assert result["repaired"] == {"missing id": 1}
    assert result["rejected_files"] == [
        {"file": "web/part.jsonl", "records": 3, "reasons": {"empty content": 1, "invalid JSON": 2}},
        {"file": "news/part.jsonl", "records": 1, "reasons": {"not an object": 1}},
    ]


def test_samples_are_sentences_of_the_corpus(shards: Path, result: dict, documents: list[Document]):
    tokenizer = ShardSet.open(shards).tokenizer()
    stored = {
        (document.language, document.id, tokens.size, tokenizer.decode(tokens))
        for document in documents
        for tokens in document.sentences()
    }
    for language, bands in result["samples"].items():
        spans = [(band["from"], band["to"]) for band in bands]
        assert set(spans) <= {(1, 2), (3, 8), (9, 16), (17, 23), (24, 24)} and spans == sorted(spans)
        for band in bands:
            found = band["sentences"]
            assert 1 <= len(found) <= 5 and len({one["text"] for one in found}) == len(found)
            for one in found:
                assert band["from"] <= one["tokens"] <= band["to"]
                assert (language, one["id"], one["tokens"], one["text"]) in stored
    assert [len(band["sentences"]) for band in result["samples"]["en"]][1:] == [5, 5, 5, 5]


def test_copies_do_not_crowd_out_samples(tmp_path: Path):
    """Two hundred copies in four shards give the sentences of one, with the id of the first."""
    folder = tmp_path / "EN"
    folder.mkdir()
    content = " ".join(
        f"Then {word} came to the house." for word in "Ann Bob Cid Dan Eve Flo Gus Hal".split()
    )
    lines = "".join(record(f"copy-{n}", content) + "\n" for n in range(200))
    (folder / "part.jsonl").write_text(lines, encoding="utf-8")
    made = stats(make(folder, tmp_path / "shards", "--shard-documents", "50"))
    assert made["shards"] == 4
    found = [one for band in made["samples"]["en"] for one in band["sentences"]]
    assert len(found) >= 5 and {one["id"] for one in found} == {"copy-0"}


def test_the_size_of_shards_changes_no_figure(corpus: Path, result: dict, tmp_path: Path):
    other = stats(make(corpus, tmp_path / "shards"), bin_tokens=600, window_tokens=200)
    assert other["shards"] < result["shards"]
    own = {"folder", "shards", "settings", "fingerprint"}
    assert {k: v for k, v in other.items() if k not in own} == {
        k: v for k, v in result.items() if k not in own
    }


def test_a_shard_may_be_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "EN"
    folder.mkdir()
    lines = "".join(record(f"{n}", text(n, 1 + n % 20)) + "\n" for n in range(600))
    (folder / "part.jsonl").write_text(lines, encoding="utf-8")
    shards = make(folder, tmp_path / "shards")
    assert len(ShardSet.open(shards)) == 1 and ShardSet.open(shards).shard(0).groups == 3
    whole = stats(shards)
    monkeypatch.setattr("data_prep.shards.stats.BATCH_GROUPS", 1)
    assert stats(shards) == whole
    stored = {document.id: document for document in ShardSet.open(shards).documents()}
    tokenizer = ShardSet.open(shards).tokenizer()
    for band in whole["samples"]["en"]:
        for one in band["sentences"]:
            assert one["text"] in tokenizer.decode(stored[one["id"]].tokens)


def test_damage_is_told_in_one_line(shards: Path, tmp_path: Path):
    def refused(change) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(shards, copy)
        change(copy)
        with pytest.raises(UserError) as error:
            stats(copy)
        shutil.rmtree(copy)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "quarantine.jsonl is missing" in refused(lambda copy: (copy / "quarantine.jsonl").unlink())
    assert "quarantine.jsonl is damaged" in refused(
        lambda copy: (copy / "quarantine.jsonl").write_text("{}\n", encoding="utf-8")
    )

    def exchange(copy: Path) -> None:
        entries = sorted(ShardSet.open(copy).manifest["shards"], key=lambda entry: entry["documents"])
        shutil.copy(copy / entries[0]["file"], copy / entries[-1]["file"])

    assert "does not agree" in refused(exchange)

    def miscount(copy: Path) -> None:
        index = np.load(copy / "shard-000000.index.npy")
        index["tokens"][0] += 1
        np.save(copy / "shard-000000.index.npy", index)

    assert "shard-000000.index.npy is damaged" in refused(miscount)


def test_text_for_people(result: dict):
    said = stats_text(result)
    assert "168 documents" in said and "2 × invalid JSON" in said and "█" in said
    assert f"64 × 64 tensors {100 * result['tensor_64x64']['padding']:.1f} %" in said
    assert "5 documents (3.0 %) repeat 4 texts" in said


# The page ----------------------------------------------------------------------------------------------

VOID = {"meta"}
ALLOWED = VOID | {
    *("html head title style body h1 h2 h3 p strong figure figcaption div span".split()),
    *("svg defs g path use text table tr th td ul li bdi code".split()),
}


class Page(HTMLParser):
    """Keeps tags, attributes and text; fails on a tag that is not closed in its turn."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_whole_and_escaped(result: dict):
    page = stats_page(result)
    parsed = Page(page)
    assert set(parsed.tags) <= ALLOWED
    assert parsed.tags.count("svg") == 5
    names = {name for name, _ in parsed.attributes}
    assert not names & {"src", "href", "onclick", "onerror"}
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page and "@import" not in page
    assert not [c for c in page if ord(c) < 32 and c != "\n" or 0x7F <= ord(c) < 0xA0 or c in "\u202e\uffff"]
    words = "".join(parsed.words)
    assert "<script>alert('1')</script> & \"</title></style>" in words  # as text
    assert "[U+202E]back[U+202C]" in words and "nul [U+0000] bell [U+0007]" in words
    assert '<b onclick="x">' in words and "en: <i>&amp;" in words


def test_page_holds_the_figures(result: dict):
    words = "".join(Page(stats_page(result)).words)
    assert f"{result['documents']:,} documents of 4 sub-corpora" in words
    assert f"{result['tokens']:,} tokens" in words
    for way in result["padding"].values():
        assert percent(way["padding"]) in words
    assert "invalid JSON" in words and "web/part.jsonl" in words and "missing id" in words
    for bands in result["samples"].values():
        for band in bands:
            for one in band["sentences"]:
                if one["text"].isprintable():
                    assert one["text"] in words


def test_charts_hold_the_figures(result: dict):
    """The heights of the bars and lines that the page draws are the shares of the result."""
    names = sorted(result["languages"], key=lambda name: -result["languages"][name]["tokens"])
    by_length, up_to = (chart.plots for chart in _lengths(result, names))
    for name, histogram, curve in zip(names, by_length.lines, up_to.lines, strict=True):
        group = result["languages"][name]
        for length, share in histogram.points:
            expected = 100 * group["histogram"][int(length)] / group["sentences"]
            assert share == pytest.approx(expected)
        assert curve.points[-1] == (LIMIT, pytest.approx(100))
    [sizes] = _document_sizes([(name, result["languages"][name]) for name in names])
    [axes] = figure([sizes.plots]).axes
    assert axes.get_ylim()[0] == 0
    for name, bars in zip(names, axes.containers, strict=True):
        group = result["languages"][name]
        heights = [bar.get_height() for bar in bars][: len(group["document_histogram"])]
        expected = [100 * count / group["documents"] for _, _, count in group["document_histogram"]]
        assert heights == pytest.approx(expected)


def test_page_names_damage_and_files_not_read(result: dict):
    other = result | {
        "damaged": [{"file": "EN/<a>.gz", "damage": "ends too early"}],
        "not_read": [f"more/{n}.zip" for n in range(30)],
        "rejected": {},
        "repaired": {},
        "rejected_files": [],
    }
    words = "".join(Page(stats_page(other)).words)
    assert "EN/<a>.gz" in words and "ends too early" in words
    assert "30 files not read" in words and "more/19.zip, …" in words
    assert "No record was rejected." in words and "No record was mended." in words


def test_many_languages_and_a_high_limit_fit_on_the_page(result: dict):
    languages = {f"l{n}": result["languages"]["en"] for n in range(9)}
    groups = [result["groups"][0] | {"language": f"l{n % 9}", "source": f"s{n}"} for n in range(300)]
    samples = {name: result["samples"]["en"] for name in languages}
    parsed = Page(stats_page(result | {"languages": languages, "groups": groups, "samples": samples}))
    words = "".join(parsed.words)
    assert "5 largest of 9 languages" in words and "100 more rows" in words and "4 more languages" in words
    long = json.loads(json.dumps(result))
    long["settings"]["max_tokens"] = 1000
    for group in (long, *long["languages"].values()):
        group["histogram"] += [0] * (1000 - LIMIT)
    assert "per 16 tokens" in "".join(Page(stats_page(long)).words)


def test_page_bytes_are_the_same_wherever_the_shards_lie(shards: Path, tmp_path: Path):
    shutil.copytree(shards, tmp_path / "shards")
    assert stats_page(stats(tmp_path / "shards")) == stats_page(stats(shards))
