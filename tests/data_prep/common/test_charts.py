"""The charts and the page template: one palette, names that meet no line, equal bytes, nothing foreign."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from helpers.html_page import Page

from data_prep.common import page
from data_prep.common.charts import (
    PAGE_WIDTH,
    PALETTE,
    STYLE,
    BarsAcross,
    Line,
    Lines,
    Mark,
    colours,
    dark_style,
    figure,
    svg,
)
from data_prep.common.errors import UserError
from pipeline.research.compare import compare
from pipeline.research.scaling import fit

SVG = "{http://www.w3.org/2000/svg}"
FALLING = [(float(n), 9.0 - n) for n in range(9)]
RISING = [(float(n), float(n)) for n in range(9)]


def texts(plot: Lines | BarsAcross, width: int = PAGE_WIDTH) -> list[str | None]:
    return [one.text for one in xml.etree.ElementTree.fromstring(svg([plot], "a", width)).iter(f"{SVG}text")]


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_each_kind_has_one_hue_that_can_be_seen_on_both_pages() -> None:
    assert colours(["sllm", "lm", "vae", "ngram"]) == [(kind, "-") for kind in ("sllm", "lm", "vae", "ngram")]
    many = colours(["sllm"] * 5)
    assert [name for name, _ in many] == ["sllm", "sllm-2", "sllm-3", "sllm", "sllm-2"]
    assert len(set(many)) == 5 and many[3][1] == "--"
    assert len({light for light, _ in PALETTE.values()}) == len(
        PALETTE
    )  # the style sheet exchanges them by value
    for name, (light, dark) in PALETTE.items():
        if name not in ("rule", "rest", "on"):
            assert contrast(light, "#fdfdfc") >= 2.9 and contrast(dark, "#14161a") >= 2.9, name
        if name in ("sllm", "lm", "vae", "ngram", "other-1", "other-4"):  # what has words on it
            assert all(contrast(*pair) >= 4 for pair in zip((light, dark), PALETTE["on"], strict=True)), name
        assert f'[style*="stroke: {light}"] {{ stroke: {dark} !important }}' in dark_style()
    # Colours of axes and grids too: a dark page exchanges no others.
    used = re.findall(r"color: ([0-9a-f]{6})", STYLE.read_text())
    assert set(used) == {PALETTE[name][0].removeprefix("#") for name in ("soft", "rule")}


def test_equal_plots_give_equal_bytes_without_anything_foreign() -> None:
    plot = Lines([Line("a <b> & $x$", FALLING, "sllm")], "x", "y", (Mark(3, "skip", "sllm", "nan <here>"),))
    text = svg([plot], "a <chart>")
    assert text == svg([plot], "a <chart>")
    xml.etree.ElementTree.fromstring(text)
    assert "a <b> & $x$" in texts(plot)
    assert "<title>nan &lt;here&gt;</title>" in text and 'aria-label="a &lt;chart&gt;"' in text
    assert not re.search(r"url\(|\d{4}-\d{2}-\d{2}|matplotlib", text)
    inside = svg([plot], "a", alone=False)
    assert "http" not in inside and "@media" not in inside and "@media" in text


def test_names_are_at_the_ends_of_lines_and_listed_where_they_would_meet_one() -> None:
    apart = figure([Lines([Line("up", RISING, "sllm"), Line("down", FALLING, "lm")], "x", "y")])
    [axes] = apart.axes
    assert not apart.legends and {"up", "down"} <= {text.get_text() for text in axes.texts}
    for text in axes.texts:
        assert text.xy == (8, 8) if text.get_text() == "up" else text.xy == (8, 1)
    # The short line ends where the long one passes.
    short = Line("a short one", [(0.0, 2.0), (3.0, 4.0)], "lm")
    meeting = figure([Lines([Line("long", [(0.0, 4.0), (9.0, 4.1)], "sllm"), short], "x", "y")])
    [legend] = meeting.legends
    assert [text.get_text() for text in legend.get_texts()] == ["long", "a short one"]
    assert not meeting.axes[0].texts
    # The legend is above the axes.
    box, below = legend.get_window_extent(), meeting.axes[0].get_window_extent()
    assert box.y0 > below.y1
    without = [Line("long", [(0.0, 4.0), (9.0, 4.1)], "sllm"), short]
    assert not figure([Lines(without, "x", "y", legend=False)]).legends


def test_axes_start_where_they_should_and_intervals_are_drawn() -> None:
    [axes] = figure([Lines([Line("a", FALLING, "sllm")], "x", "y", x_from=0, y_from=0)]).axes
    assert axes.get_xlim()[0] == 0 and axes.get_ylim()[0] == 0
    [axes] = figure(
        [Lines([Line("a", [(10, 0.0), (1000, 5)], "sllm")], "x", "y", log_x=True, log_y=True)]
    ).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert list(axes.get_lines()[0].get_xdata()) == [1000]  # nothing at or below zero on a logarithmic axis
    interval = [(y - 1, y + 1) for _, y in FALLING]
    for kind in ("line", "dots"):
        [axes] = figure([Lines([Line("a", FALLING, "sllm", kind, interval=interval)], "x", "y")]).axes
        [band] = axes.collections
        low, high = band.get_datalim(axes.transData).intervaly
        assert (low, high) == (0, 10)
    [axes] = figure([BarsAcross([("a", "3", [(1, "other-1"), (2, "rest")]), ("b", "2", [(2, "vae")])])]).axes
    assert [bar.get_width() for bar in axes.patches] == [1, 2, 2] and axes.get_xlim()[0] == 0
    assert axes.patches[1].get_x() == 1


def test_hostile_names_do_not_break_a_page() -> None:
    hostile = "<script>alert(1)</script> \"'&` ** [[x]] 句子 \u202e \0"
    plot = Lines([Line(page.visible(hostile), FALLING, "sllm")], "x", "y")
    blocks = [
        page.Heading(page.visible(hostile)),
        page.Text(page.visible(hostile), (page.visible(hostile),)),
        page.Table((page.visible(hostile),), [(page.visible(hostile),)]),
        page.Chart("chart", plot, page.Table(("a",), [("b",)])),
        page.Choice("by", [("a", "A")], [(page.visible(hostile), "sllm"), ("b", "lm")]),
        page.Sample("label", "given", "made"),
        page.Quotes("label", [hostile * 50], "zh"),
    ]
    text = page.to_html("title", blocks)
    found = Page(text)
    assert "script" not in found.tags and found.loads == []
    assert "script" in found.text and "[U+202E]" in found.text and "句子" in found.text
    assert "characters" in found.text  # a long sentence is cut, which the page reports
    assert not {"\0", "\u202e"} & set(text)


def test_a_template_becomes_blocks(tmp_path: Path) -> None:
    template = tmp_path / "a.md.jinja"
    template.write_text(
        "Some\ntext {{ x|twice }}.\n\n## Head\n\nIt:\n- a\n  b\n- c\n\n> small\n\n[[part]]\n\n"
        "A caption\n| a | |\n| --- | ---: |\n"
        "{% for x in (1, 'b|c') %}\n|   {{ x|cell }} | \\| |\n{% endfor %}\n"
    )
    part = page.Sample("a", "b", "c")
    blocks = page.from_template(template, {"x": 2}, {"part": [part]}, {"twice": lambda x: str(2 * x)})
    assert blocks == [
        page.Text("Some text 4."),
        page.Heading("Head"),
        page.Text("It:", ("a b", "c")),
        page.Text("small", note=True),
        part,
        page.Table(["a", ""], [["  1", "|"], ["  b|c", "|"]], "A caption", [0]),
    ]


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs matplotlib: .*sentence-llm\[report\]") as error:
        figure([Lines([Line("a", FALLING, "sllm")], "x", "y")])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"sentence-llm\[report\]"):  # before anything is read
        fit(["nowhere.json"], output=tmp_path / "a.svg")
    with pytest.raises(UserError, match=r"sentence-llm\[report\]"):
        compare(["nowhere", "else"], tmp_path / "a.html")
