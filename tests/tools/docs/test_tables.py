"""Tables and charts of the docs: they are what docs/results says, and a check finds where they are not."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.common.charts import PALETTE
from data_prep.common.errors import UserError, run_main
from pipeline.research.scaling import fit_power
from tools.docs import tables as docs_tables
from tools.docs.tables import ROOT, refresh

SVG = "{http://www.w3.org/2000/svg}"


def test_the_docs_are_what_the_results_say() -> None:
    assert refresh(ROOT, check=True) == [], "run `make results`"


def row(name: str, seed: int, **figures: Any) -> dict[str, Any]:
    return {"name": name, "seed": seed, "overrides": {}, "vector_gain": None, "evaluation": {}, **figures}


VAE_LENGTHS = {"3": {"sentences": 30, "exact_match": 1.0}, "4": {"sentences": 10, "exact_match": 0.6}}
ROWS = [
    row("paper", 1, objective="sllm", bits_per_byte=1.830, vector_gain=0.05, tokens=1_000_000, seconds=99.0),
    row("paper", 2, objective="sllm", bits_per_byte=1.838, vector_gain=0.07, tokens=1_000_100, seconds=101.0),
    row("lm", 1, objective="lm", bits_per_byte=1.9, tokens=1_500_000, seconds=100.4),
    row("vae", 1, objective="vae", exact_match=0.9, evaluation={"exact_match_by_length": VAE_LENGTHS}),
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one page, one sweep's result, and an empty place for its table."""
    (tmp_path / "docs" / "results" / "experiments").mkdir(parents=True)
    (tmp_path / "README.md").write_text("Words.\n", encoding="utf-8")
    write(tmp_path, "experiments/small.json", {"about": "", "rows": ROWS})
    page(tmp_path, "sweep experiments/small.json")
    return tmp_path


def write(root: Path, file: str, result: dict[str, Any]) -> None:
    (root / "docs" / "results" / file).write_text(json.dumps(result), encoding="utf-8")


def page(root: Path, *tables: str) -> None:
    places = "\n\n".join(f"<!-- table: {table} -->\n<!-- end -->" for table in tables)
    (root / "docs" / "log.md").write_text(f"# Log\n\n{places}\n\nThe end.\n", encoding="utf-8")


def made(root: Path) -> str:
    refresh(root)
    assert refresh(root, check=True) == []
    return (root / "docs" / "log.md").read_text(encoding="utf-8")


def test_a_sweep_is_a_line_a_name_and_seeds_are_averaged(checkout: Path) -> None:
    text = made(checkout)
    assert text.startswith("# Log\n\n<!-- table: sweep experiments/small.json -->\n\n| run | seeds |")
    assert text.endswith("|\n\n<!-- end -->\n\nThe end.\n")
    lines = text.splitlines()
    assert "| run | seeds | bits per byte | vector gain | tokens (M) | seconds | exact match |" in lines
    assert "| paper | 2 | 1.834 (±0.004) | 0.060 (±0.010) | 1.00 | 100 (±1) | – |" in lines
    assert "| lm | 1 | 1.900 | – | 1.50 | 100 | – |" in lines
    assert "| vae | 1 | – | – | – | – | 90.0 % |" in lines
    page(checkout, "sweep experiments/small.json objective bits_per_byte")
    assert "| paper | 2 | sllm | 1.834 (±0.004) |" in made(checkout)


def test_what_a_sentence_vae_cost_has_a_column_where_it_says_something(checkout: Path) -> None:
    rows = [{**one, "tokens_with_vae": one.get("tokens"), "seconds_with_vae": 150.0} for one in ROWS]
    write(checkout, "experiments/small.json", {"rows": rows})
    head = next(line for line in made(checkout).splitlines() if line.startswith("| run |"))
    assert "with the SentenceVAE's (s)" in head
    assert "with the SentenceVAE's (M)" not in head  # the same numbers again


def test_a_sweep_tells_what_is_not_there_and_what_is_no_prediction(checkout: Path) -> None:
    vae = row("vae", 1, objective="vae", bits_per_byte=0.24)
    failed = {"rows": [*ROWS[:1], vae], "failed": {"deep-s1": "no memory"}, "missing": ["deep-s2"]}
    write(checkout, "experiments/small.json", failed)
    text = made(checkout)
    assert "| vae | 0.240 (rebuilding) |" in text
    assert "|\n\nWithout a result: deep-s1, deep-s2.\n\n<!-- end -->" in text
    write(checkout, "experiments/more.json", {"rows": [row("other", 1, objective="lm", bits_per_byte=2.0)]})
    page(checkout, "sweep experiments/small.json experiments/more.json bits_per_byte")
    assert "| paper | 1.830 |\n| vae | 0.240 (rebuilding) |\n| other | 2.000 |" in made(checkout)
    for file, text in (("small", "aa"), ("more", "bb")):
        one = row("other", 1, objective="lm", evaluation={"data_fingerprint": text})
        write(checkout, f"experiments/{file}.json", {"rows": [one]})
    with pytest.raises(UserError, match="measured on different texts"):
        refresh(checkout)
    for file, window in (("small", 256), ("more", 512)):
        one = row("other", 1, objective="lm", window_tokens=window)
        write(checkout, f"experiments/{file}.json", {"rows": [one]})
    with pytest.raises(UserError, match="different windows: add the column window_tokens"):
        refresh(checkout)


def test_robustness_is_a_line_for_each_variant_and_model(checkout: Path) -> None:
    sllm = {
        "model": "models/sllm",
        "bits_per_byte": 1.8,
        "bits_per_byte_interval": [1.75, 1.85],
        "change": 0.0,
    }
    sllm |= {
        "vector_gain": 0.09,
        "vector_gain_interval": None,
        "tokens_per_sentence": 9.44,
        "cut_by_limit": 0.5,
    }
    lm = {"model": "models/lm", "bits_per_byte": 2.0, "bits_per_byte_interval": None, "change": 0.1}
    variants = {"as it comes": [sllm, lm], "noise": [sllm | {"change": 0.25}, lm]}
    write(checkout, "experiments/rough.json", {"variants": variants, "skipped": {"mixed": "no text"}})
    page(checkout, "robustness experiments/rough.json")
    text = made(checkout)
    assert "| as it comes | sllm | 1.800 [1.750, 1.850] | | 0.090 | 9.4 | 50.0 % |" in text
    assert "| noise | sllm | 1.800 [1.750, 1.850] | +0.250 | 0.090 | 9.4 | 50.0 % |" in text
    assert "| | lm | 2.000 | +0.100 | – | – | – |" in text
    assert "- left out: mixed (no text)\n" in text


def test_a_scaling_fit_comes_with_its_chart(checkout: Path) -> None:
    sizes = [(1e5, 2.4), (3e5, 2.1), (1e6, 1.9), (3e6, 1.8)]
    xs, ys = (np.array(values) for values in zip(*sizes, strict=True))
    points = [{"run": f"m{x:.0f}", "x": x, "bits_per_byte": y} for x, y in sizes]
    fits = {"lm": {"points": points, "line": fit_power(xs, ys), "offset": None}}
    write(checkout, "experiments/law.json", {"x": "parameters", "fits": fits, "note": "of the fit"})
    page(checkout, "scaling experiments/law.json")
    text = made(checkout)
    assert f"| lm | A · x^-α | 4 | {fits['lm']['line']['alpha']:.4f} [" in text
    assert "- of the fit\n" in text
    assert "](results/experiments/law.svg)" in text
    drawn = xml.etree.ElementTree.parse(checkout / "docs/results/experiments/law.svg").getroot()
    assert len([dot for dot in drawn.iter(f"{SVG}use") if "opacity" not in dot.get("style")]) == 4
    names = [text.text for text in drawn.iter(f"{SVG}text")]
    assert f"lm: A · x^-{fits['lm']['line']['alpha']:.3f}" in names


def test_sentences_rebuilt_exactly_by_length(checkout: Path) -> None:
    page(checkout, "exact-by-length experiments/small.json")
    lines = made(checkout).splitlines()
    assert "| tokens | 1–4 | 5–8 | 9–16 | 17–32 | 33–64 | all |" in lines
    assert "| sentences | 40 | 0 | 0 | 0 | 0 | 40 |" in lines
    assert "| vae | 90.0 % | – | – | – | – | 90.0 % |" in lines


def test_each_language_has_its_columns(checkout: Path) -> None:
    zh, en = {"bits_per_byte": 2.5}, {"bits_per_byte": 1.5}
    rows = [
        row("lm", 1, objective="lm", evaluation={"by_language": {"zh": zh, "en": en}}),
        row("SLLM", 1, objective="sllm", evaluation={"by_language": {"zh": {**zh, "vector_gain": 0.25}}}),
        row("vae", 1, objective="vae", evaluation={"by_language": {"zh": zh}}),
    ]
    write(checkout, "languages.json", {"rows": rows})
    page(checkout, "by-language languages.json")
    text = made(checkout)
    assert "| run | en: bits per byte | en: vector gain | zh: bits per byte | zh: vector gain |" in text
    assert "| lm | 1.500 | – | 2.500 | – |\n| SLLM | – | – | 2.500 | 0.250 |\n\n" in text


def test_another_result_is_another_table_and_the_check_names_the_place(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made(checkout)
    changed = [{**one, "bits_per_byte": 1.7} if one["name"] == "lm" else one for one in ROWS]
    write(checkout, "experiments/small.json", {"rows": changed})
    monkeypatch.setattr("sys.argv", ["docs_tables", "--check", "--root", str(checkout)])
    assert run_main("docs_tables", docs_tables.main) == 1
    said = capsys.readouterr().out
    assert said == "docs/log.md:3: table sweep experiments/small.json differs from its results\n"
    assert (checkout / "docs" / "log.md").read_text(encoding="utf-8") == before
    assert "| lm | 1 | 1.700 |" in made(checkout)


def comparison_result() -> dict[str, Any]:
    curve = [{"step": n, "tokens": n * 1e6, "seconds": n * 60.0, "bits_per_byte": 3 - n / 2} for n in (1, 2)]
    speed = {"tokens_per_second": 50.0, "parameters": 10, "name": "m"}
    one = {
        "objective": "lm",
        "spent": {"tokens": 2e6, "seconds": 120.0, "operations": None},
        "spent_on_vae": None,
        "curve": curve,
        "evaluated": None,
        "gap_recovered": None,
        "generation": speed,
    }
    equal = {
        key: {"amount": amount, "runs": dict.fromkeys("ab", {"bits_per_byte": 2.0, "progress": 1.0})}
        for key, amount in (("seconds", 120.0), ("tokens", 2e6))
    }
    how = {"gpu": None, "cpu": "C", "threads": 1, "dtype": "fp32", "batch": 1, "context": 256}
    return {"runs": {"a": one, "b": one}, "equal": equal, "generation": how, "notes": ["a note"]}


def test_a_comparison_comes_with_its_charts(checkout: Path) -> None:
    write(checkout, "experiments/main.json", comparison_result())
    page(checkout, "comparison experiments/main.json")
    text = made(checkout)
    assert "| bits per byte at equal tokens: 2,000,000 | 2.0000 | 2.0000 |" in text
    assert "- a note\n" in text
    quality, speed = (checkout / f"docs/results/experiments/main-{name}.svg" for name in ("quality", "speed"))
    assert "](results/experiments/main-quality.svg)" in text
    drawn = xml.etree.ElementTree.parse(quality).getroot()
    names = [text.text for text in drawn.iter(f"{SVG}text")]
    assert names.count("bits per byte") == 2  # over time and over tokens
    assert {"hours of training steps", "million tokens", "a", "b"} <= set(names)
    hues = [path.get("style") for path in drawn.iter(f"{SVG}path") if path.get("style")]
    for light in (PALETTE["lm"][0], PALETTE["lm-2"][0]):  # two runs of one kind
        assert sum(f"stroke: {light}; stroke-width: 2" in style for style in hues) >= 2
    assert "new tokens per second" in speed.read_text()
    quality.write_text(quality.read_text().replace("tokens", "sentences"))
    speed.unlink()
    stray = quality.with_name("old.svg")
    stray.write_text("<svg/>")
    found = refresh(checkout, check=True)
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in found] == [
        "main-quality.svg",
        "main-speed.svg",
        "old.svg",
    ]
    assert not speed.exists()


def test_typed_rows_say_where_they_come_from(checkout: Path) -> None:
    rows = {"source": "typed", "columns": ["x", "CE"], "rows": [["a|b", "1.0"], ["c", ""]]}
    write(checkout, "experiments/typed.json", rows)
    page(checkout, "typed experiments/typed.json")
    assert "| x | CE |\n| --- | ---: |\n| a\\|b | 1.0 |\n| c | |\n" in made(checkout)
    write(checkout, "experiments/typed.json", {**rows, "rows": [["too short"]]})
    with pytest.raises(UserError, match="not all rows have as many cells"):
        refresh(checkout)
    del rows["source"]
    write(checkout, "experiments/typed.json", rows)
    with pytest.raises(UserError, match="does not say where its rows come from"):
        refresh(checkout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sweeep experiments/small.json", "there is no table `sweeep`; did you mean sweep?"),
        ("zzz", "there is no table `zzz`; there are by-language, "),
        ("sweep experiments/none.json", "docs/results/experiments/none.json is not there"),
        ("sweep", "name a FILE.json that has rows"),
        ("exact-by-length", r"cannot be made of these words and results \(TypeError"),
        ("sweep experiments/small.json colour", "no column colour; there are objective, "),
        (
            "comparison experiments/small.json",
            r"cannot be made of these words and results \(KeyError: 'runs'",
        ),
    ],
)
def test_what_cannot_be_made_is_one_clear_line(checkout: Path, words: str, message: str) -> None:
    page(checkout, words)
    with pytest.raises(UserError, match=f"^docs/log.md:3: .*{message}") as error:
        refresh(checkout)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("<!-- table: typed x -->\n", "docs/log.md:1: .*no <!-- end --> comes"),
        ("a\n<!-- end -->\n", "docs/log.md:2: .*no table begins before"),
        ("<!-- table: a -->\n<!-- table: b -->\n<!-- end -->\n", "docs/log.md:1: .*no <!-- end --> comes"),
    ],
)
def test_half_a_place_is_refused(checkout: Path, text: str, place: str) -> None:
    (checkout / "docs" / "log.md").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=place):
        refresh(checkout)
