"""`sllm report`: the page says what the run directories' files say, of finished, broken and skipping runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.html_page import Page
from helpers.run_files import STEPS, make_run, write_lines

from data_prep.common.charts import figure, running_mean, thinned
from data_prep.common.errors import UserError
from pipeline.cli import main as cli
from pipeline.common.text import duration
from pipeline.reports.run_report import CURVES, curve_plot, differences, report, summarise
from pipeline.training.run_files import read_runs


def test_a_runs_summary_is_what_its_files_say(tmp_path: Path) -> None:
    [run] = read_runs([make_run(tmp_path / "one")])
    found = summarise(run)
    assert found["finished"] is False
    assert (found["steps"], found["tokens"]) == (40, 40_000)
    assert found["seconds"] == pytest.approx(20 + 2 + 5)  # steps, evaluations, saves
    assert found["seconds_from_first_start"] == pytest.approx(40)
    assert found["operations"] == 200_000_000_000
    assert found["loss_at_the_end"] == pytest.approx((6 / 39 + 6 / 40) / 2)
    assert (found["best_validation_bits_per_byte"], found["best_step"]) == (1.5, 30)
    assert found["tokens_per_second"] == pytest.approx(2010.5)
    assert found["padding_share"] == pytest.approx(0.02)
    assert found["data_wait_share"] == pytest.approx(0.01)
    assert found["save_share"] == pytest.approx(5 / 27)
    assert found["slow_ranks"] == 1
    assert (found["restarts"], found["lost_steps"], found["skipped_steps"]) == (1, 4, 1)
    assert (found["worlds"], found["zero_stages"], found["mfu"]) == ([2, 1], [3], None)
    # The end of step 31: thirty-one steps, two evaluations and both saves.
    assert run.place("time", 31) * 3600 == pytest.approx(31 * 0.5 + 2 + 5)
    assert run.place("operations", 2) == pytest.approx(0.01)


def test_the_page_shows_curves_marks_and_differences(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", optimizer={"lr": 0.5}, seed=2)]
    result = report(runs, tmp_path / "report.html")
    assert result["not_comparable"] == []
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.loads == [] and {"script", "link", "img"}.isdisjoint(page.tags)
    assert page.rows["steps"] == ["40", "40"]
    assert page.rows["best validation bits per byte"] == ["1.5000", "1.5000"]
    assert page.rows["standing still to save"] == ["18.52 %"] * 2
    assert page.rows["ranks"] == ["2 → 1"] * 2
    assert page.rows["optimizer.lr"] == ["–", "0.5"]
    assert page.rows["seed"] == ["–", "2"]
    assert "output_dir" not in page.rows and "the loss is <nan>" in page.text
    assert "Slowest rank by the median one" in page.text
    assert page.text.count("rank 1 (node7) takes 1.4 times the median rank's time") == 2
    assert "MFU (median)" not in page.rows and "Model FLOPs" not in page.text  # no run knows it
    for axis in ("steps", "tokens", "time", "operations"):
        loss = re.search(rf'by-{axis}">(<svg.*?</svg>)', text, re.S).group(1)
        assert loss.count('class="mark restart') == loss.count('class="mark skip') == 2
        assert loss.count('class="mark save') == 4
        assert "one: restart after step 20" in loss and "nan," not in loss
    read = read_runs(runs)
    for axis, last in (("steps", 40), ("tokens", 0.04), ("time", 27 / 3600), ("operations", 0.2)):
        plot = curve_plot(read, CURVES[0], axis, axis)
        points = [line.points for line in plot.lines]
        assert [len(line) for line in points] == [STEPS - 1] * 4  # without the skipped step
        assert points[0][0][1] == 6.0 and points[0][-1] == pytest.approx((last, 6 / 40))
        assert [line.kind for line in plot.lines] == ["faint", "line"] * 2
        # Two runs of one kind have one hue in two shades.
        assert [line.colour for line in plot.lines] == ["sllm", "sllm", "sllm-2", "sllm-2"]
        [axes] = figure([plot]).axes
        drawn = [line for line in axes.get_lines() if len(line.get_xdata()) == STEPS - 1]
        assert [list(zip(*line.get_data(), strict=True)) for line in drawn] == points
        assert axes.get_xlim()[0] == 0


def test_what_must_not_be_compared_is_said(tmp_path: Path) -> None:
    data = {"window_tokens": 128}
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", objective="vae", data=data)]
    objectives, samples = report(runs, tmp_path / "report.html")["not_comparable"]
    assert "different objectives" in objectives and "different samples" in samples
    assert "Not all figures can be compared" in (tmp_path / "report.html").read_text()


def test_runs_that_wrote_less_are_shown_with_what_there_is(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    row = {"step": 1, "tokens": 10, "loss": 2.0, "bits_per_byte": 1.0, "seconds": 1.0}
    row |= {"tokens_per_second": 10.0, "data_wait_seconds": 0.0, "grad_norm": 1.0}
    write_lines(old / "metrics.jsonl", [row])
    [found] = report([old], tmp_path / "report.html")["runs"]
    assert found["operations"] is None and found["finished"] is None and found["restarts"] == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "by-operations" not in (tmp_path / "report.html").read_text()
    assert page.rows["tokens"] == ["10"]
    report([make_run(tmp_path / "new"), old], tmp_path / "both.html")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")])
    assert [run.name for run in runs] == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_the_command_prints_json_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = make_run(tmp_path / "one"), tmp_path / "page.html"
    assert cli.main(["report", str(run), "--output", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["steps"] == 40 and output.is_file()
    assert cli.main(["report", str(run), "--output", str(output)]) == 0
    assert "40 steps, 40,000 tokens, 27 s" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no run directory: it has no metrics.jsonl"):
        report([tmp_path], output)
    with pytest.raises(UserError, match="a file in a folder that exists"):
        report([run], tmp_path / "no" / "page.html")
    (run / "metrics.jsonl").write_text('{"st')
    with pytest.raises(UserError, match="has no whole line"):
        report([run], output)


def test_long_curves_are_thinned_without_losing_a_spike() -> None:
    points = [(float(n), float(n % 7)) for n in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[54_322] = (54_322.0, -99.0)
    found = thinned(points)
    assert len(found) <= 960 and found == sorted(found) and set(found) <= set(points)
    assert {(54_321.0, 99.0), (54_322.0, -99.0), points[0], points[-1]} <= set(found)
    assert thinned(points[:900]) == points[:900]


def test_helpers() -> None:
    assert running_mean([1.0, 2.0, 3.0, 5.0], share=0.5) == [1.0, 1.5, 2.5, 4.0]
    assert [duration(s) for s in (2.5, 125, 7500)] == ["2.5 s", "2 min 05 s", "2 h 05 min"]
    assert differences([{"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": [1]}]) == [
        ("a.c", ["2", "3"]),
        ("d", ["–", "[1]"]),
    ]
