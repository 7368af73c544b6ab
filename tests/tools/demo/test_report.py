"""The demo's report says what its run files say, in Markdown and on one page that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.html_page import Page

from data_prep.common.charts import Line, Lines, figure, svg
from data_prep.common.errors import UserError
from tools.demo.report import build_report

PREDICTION = {
    "bytes": 40123,
    "tokens": 12345,
    "sentences": 1100,
    "documents": 20,
    "window_tokens": 512,
    "data_fingerprint": "ab" * 32,
}
RESULTS = {
    "vae": PREDICTION
    | {
        "kind": "vae",
        "bits_per_byte": 0.51239,
        "ppl": 3.4567,
        "exact_match": 0.4321,
        "exact_match_by_length": {
            "2": {"sentences": 300, "exact_match": 0.9},
            "7": {"sentences": 500, "exact_match": 0.4},
            "20": {"sentences": 300, "exact_match": 0.0},
        },
    },
    "sllm": PREDICTION
    | {
        "kind": "sllm",
        "bits_per_byte": 2.34567,
        "ppl": 98.765,
        "bits_per_byte_without_vectors": 2.37067,
        "vector_gain": 0.02503,
    },
    "lm": PREDICTION | {"kind": "lm", "bits_per_byte": 2.12349, "ppl": 76.543},
}
STATS = {
    "documents": 8,
    "sentences": 100,
    "tokens": 1250,
    "bytes": 4321,
    "tokens_per_sentence": {"mean": 12.5, "median": 9, "p95": 30, "max": 30},
    "histogram": [0, 0, 10, *[0] * 6, 70, *[0] * 20, 20],
}
TASKS = {
    name: {"acc,none": score, "acc_stderr,none": 0.025}
    for name, score in (("sllm_cloze", 0.055), ("sllm_next_sentence", 0.31), ("sllm_sentence_order", 0.6))
}
PROMPT = "The list"
SAMPLE = {
    "text": " <b>is</b> ```a``` & more | see http://example.org\n",
    "sentences": [" is", " more"],
    "stopped": "sentence limit",
}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A demo folder with hand-made run files: 50 steps per run, every figure known."""
    for number, (kind, result) in enumerate(RESULTS.items(), start=1):
        rows = [
            {
                "step": step,
                "tokens": 1000 * number * step,
                "loss": 6.0 / step + number,
                "bits_per_byte": 3.0,
                "seconds": 0.5,
                "data_wait_seconds": 0.01,
                "padding_share": 0.02 * number,
            }
            for step in range(1, 51)
        ]
        run = tmp_path / "runs" / kind
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluations = [{"step": 25, "bits_per_byte": 2.8765}, {"step": 50, "bits_per_byte": 2.6543}]
        (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
        write(tmp_path / "measured" / f"evaluate-{kind}.json", result)
        finding = {"check": "causal", "path": "masked", "passed": kind != "lm"}
        check = {"passed": kind != "lm", "checks": [finding | {"max_difference": 2.5e-7, "compared": 4321}]}
        write(tmp_path / "measured" / f"check-{kind}.json", check)
    for name in ("train", "validation"):
        write(tmp_path / "measured" / f"stats-{name}.json", STATS)
    write(tmp_path / "measured" / "samples.jsonl", {"prompt": PROMPT, "samples": [SAMPLE]})
    write(tmp_path / "measured" / "ngram.json", {"bits_per_byte": 2.2})
    for kind in ("sllm", "lm"):
        write(tmp_path / "measured" / f"tasks-{kind}" / "x" / "results_1.json", {"results": TASKS})
    write(tmp_path / "machine.json", {"processor": "Test <CPU>", "torch": "9.8.7"})
    for order, step in enumerate(("corpus", "vae")):
        stamp = {"step": step, "order": order, "seconds": 12.5 + order, "finished": "2026-01-01 00:00"}
        write(tmp_path / "stamps" / f"{step}.json", stamp)
    return tmp_path


def rows_of(markdown: str) -> dict[str, list[str]]:
    """First cell → the other cells, of every Markdown table row."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


LOADING = {"href", "src", "srcset", "action", "data", "poster", "style", "xlink:href"}


def test_figures_are_those_of_the_files(demo: Path) -> None:
    markdown, page = (path.read_text() for path in build_report(demo))
    for rows in (rows_of(markdown), Page(page).rows):
        assert rows["bits per byte"] == ["0.512", "2.346", "2.123"]
        assert rows["perplexity per token"] == ["3.46", "98.77", "76.54"]
        assert rows["bits per byte without sentence vectors"] == ["–", "2.371", "–"]
        assert rows["vector gain (bits per byte)"] == ["–", "0.0250", "–"]
        assert rows["sentences rebuilt exactly"] == ["43.2 %", "–", "–"]
        assert rows["tokens trained"] == ["50,000", "100,000", "150,000"]
        assert rows["steps"] == ["50", "50", "50"]
        assert rows["wall time of the steps (s)"] == ["25", "25", "25"]
        assert rows["tokens per second"] == ["2,000", "4,000", "6,000"]
        assert rows["padding computed"] == ["2.0 %", "4.0 %", "6.0 %"]
        assert rows["time waiting for data"] == ["2.0 %", "2.0 %", "2.0 %"]
        assert rows["checks"] == ["passed", "passed", "FAILED"]
        assert rows["100%"] == ["1.121", "2.121", "3.121"]  # mean of 6/49 and 6/50, plus the run's number
        assert rows["together"] == ["26.0", ""]
        assert rows["torch"] == ["9.8.7"]
        assert rows["train"] == ["8", "100", "1,250", "4,321", "12.5", "9", "30"]
        assert rows["9–16"] == ["70"]
        assert rows["5–8"] == ["500", "40.0 %"]
        assert rows["next sentence, of four"] == ["25.0 %", "31.0 % ± 2.5", "31.0 % ± 2.5"]
        assert rows["last word of a sentence"][0] == "–"
    for text in (markdown, Page(page).text):
        assert "5-gram" in text and "2.200" in text
    assert "2 of 3 models pass" in markdown
    assert "0.222 more" in markdown  # 2.34567 - 2.12349


def test_page_needs_nothing_from_elsewhere(demo: Path) -> None:
    page = Page(build_report(demo)[1].read_text())
    assert page.loads == []
    assert {"script", "link", "img", "iframe", "b"}.isdisjoint(page.tags)
    assert page.tags.count("svg") == 4
    assert "http://example.org" in page.text  # only as the sample's text
    assert "Test <CPU>" in page.text


def test_sample_is_shown_unchanged(demo: Path) -> None:
    markdown, page = (path.read_text() for path in build_report(demo))
    assert PROMPT + SAMPLE["text"] in Page(page).text
    # The sample holds three backticks, so its fence has four.
    body = re.search(r"^````text\n(.*?)\n````$", markdown, re.S | re.M).group(1)
    assert body.replace("⟦", "").replace("⟧", "") == PROMPT + SAMPLE["text"]


@pytest.mark.parametrize("gain, word", [(0.0004, "next to nothing"), (0.2, "something")])
def test_words_follow_the_vector_gain(demo: Path, gain: float, word: str) -> None:
    write(demo / "measured" / "evaluate-sllm.json", RESULTS["sllm"] | {"vector_gain": gain})
    assert word in build_report(demo)[0].read_text()


def test_words_follow_the_checks(demo: Path) -> None:
    assert "must not be trusted" in build_report(demo)[0].read_text()  # the token model's check failed
    path = demo / "measured" / "check-lm.json"
    write(path, json.loads(path.read_text()) | {"passed": True})
    assert "neither looks ahead" in build_report(demo)[0].read_text()


@pytest.mark.parametrize(
    "other, word",
    [
        ({"window_tokens": 1024}, "longest window (512 for the SLLM, 1024 for the token model)"),
        ({"data_fingerprint": "cd" * 32}, "text (abababababab for the SLLM, cdcdcdcdcdcd"),
        ({"tokens": 12344}, "number of tokens (12345 for the SLLM, 12344"),
    ],
)
def test_unlike_evaluations_are_not_compared(demo: Path, other: dict, word: str) -> None:
    markdown = build_report(demo)[0].read_text()
    assert "same 12,345 tokens of the same windows (at most 512 tokens each)" in markdown
    assert "scored on the same text, with everything counted" in markdown
    write(demo / "measured" / "evaluate-lm.json", RESULTS["lm"] | other)
    markdown = build_report(demo)[0].read_text()
    assert f"not scored on the same: {word}" in markdown
    assert "these two must not be compared" in markdown
    for claim in ("0.222 more", "same windows", "scored on the same text", "can be compared"):
        assert claim not in markdown


def take_equal_times(demo: Path) -> None:
    """SentenceVAE and SLLM take 12.5 seconds each, the token model 25."""
    for kind in ("vae", "sllm"):
        path = demo / "runs" / kind / "metrics.jsonl"
        path.write_text(path.read_text().replace('"seconds": 0.5', '"seconds": 0.25'))


def test_unequal_times_are_said(demo: Path) -> None:
    assert "must not be compared" in build_report(demo)[0].read_text()  # 25 + 25 s, and 25 s
    take_equal_times(demo)
    markdown = build_report(demo)[0].read_text()
    assert "must not be compared" not in markdown
    assert "after 25 seconds of training (its SentenceVAE's included) against 25" in " ".join(
        markdown.split()
    )
    assert "had seen 50,000 tokens before its own 100,000" in markdown


@pytest.mark.parametrize(
    ("sllm", "lm", "verdict"),
    [
        (2.34, 2.12, "0.220 more bits per byte than the token model"),
        (2.34, 2.12, "the token model is better at this size and time"),
        (2.12, 2.34, "the SLLM is better at this size and time"),
        (2.12, 2.11, "neither is better here"),
        (2.30, 2.29, "Neither beats a 5-gram"),
        (2.10, 2.09, "Both beat a 5-gram"),
        (2.10, 2.29, "The SLLM beats, the other does not beat, a 5-gram"),
    ],
)
def test_the_verdict_follows_the_figures(demo: Path, sllm: float, lm: float, verdict: str) -> None:
    take_equal_times(demo)
    for kind, bits in (("sllm", sllm), ("lm", lm)):
        write(demo / "measured" / f"evaluate-{kind}.json", RESULTS[kind] | {"bits_per_byte": bits})
    assert verdict in " ".join(build_report(demo)[0].read_text().split())


def test_skipped_step_does_not_break_the_curves(demo: Path) -> None:
    path = demo / "runs" / "sllm" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[10]["loss"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "nan" not in build_report(demo)[1].read_text()


def test_missing_file_is_named(demo: Path) -> None:
    (demo / "measured" / "check-lm.json").unlink()
    with pytest.raises(UserError, match="check-lm.json is missing"):
        build_report(demo)


@pytest.mark.parametrize("low, high", [(0, 1), (1.93, 2.41), (3, 40_000)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    [axes] = figure([Lines([Line("a", [(0, low), (1, high)], "sllm")], "x", "y")]).axes
    bottom, top = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
    assert 3 <= len(shown) <= 8 and all(float(f"{tick:.2g}") == pytest.approx(tick) for tick in shown)


def test_charts_draw_higher_values_higher() -> None:
    lines, bars = (
        Lines([Line("a", [(0, 1.0), (1, 2.0)], "sllm")], "x", "y"),
        Line("", [(1, 2), (2, 4)], "vae", "bars"),
    )
    text = svg([lines], "a")
    path = re.search(r'd="M ([\d.]+) ([\d.]+) *\nL ([\d.]+) ([\d.]+) *\n" [^>]*stroke-width: 2', text)
    first, second = float(path[2]), float(path[4])
    assert first > second  # SVG's y axis points down
    [axes] = figure([Lines([bars], "x", "y", y_from=0)]).axes
    boxes = [bar.get_window_extent() for bar in axes.patches]
    assert boxes[1].height == pytest.approx(2 * boxes[0].height)
    assert axes.get_ylim()[0] == 0
