"""`sllm compare`: budgets with the SentenceVAE's share, curves read between evaluations, gaps, refusals."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import ranks, run_checks
from helpers.html_page import Page
from helpers.run_files import make_run, write_lines
from helpers.runs import arguments, records

from data_prep.common.errors import UserError
from pipeline.cli import main as cli
from pipeline.research.compare import compare, format_comparison

KEYS = ("tokens", "seconds", "operations")
LENGTHS = {"vae": 4, "sllm": 6, "lm": 14}  # steps


@pytest.fixture(scope="module")
def trained(pool: ranks.RankPool, recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs vae, sllm (which starts from it) and lm, and their exports in models/."""
    folder = tmp_path_factory.mktemp("compare")
    for objective, steps in LENGTHS.items():
        run = folder / objective
        extra = ["--training.max_steps", steps, "--training.eval_every", 2]
        if objective == "sllm":
            extra += ["--model.vae.path", folder / "models" / "vae"]
        assert pool.run(1, ranks.train, arguments(recipes, objective, "zero0", run, *extra)) == [0]
        assert pool.run(1, run_checks.export_error, str(run), str(folder / "models" / objective)) == [""]
    return folder


def command(folder: Path, output: Path, *more: object) -> list[str]:
    runs = [str(folder / name) for name in ("sllm", "lm")]
    fixed = ["compare", *runs, "--vae-run", f"sllm={folder / 'vae'}", "--output", str(output)]
    return [*fixed, *map(str, more)]


def by_hand(points: list[tuple[float, float]], budget: float) -> float | None:
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if x <= budget <= next_x:
            return y + (next_y - y) * (budget - x) / (next_x - x)
    return None


def curve(run: Path, key: str, before: float) -> list[tuple[float, float]]:
    """(spent, bits per byte) at every evaluation."""
    found = []
    for row in records(run, "evaluations"):
        steps = [one for one in records(run) if one["step"] <= row["step"]]
        spent = steps[-1]["tokens"] if key == "tokens" else sum(one[key] for one in steps)
        found.append((before + spent, row["bits_per_byte"]))
    return found


def test_real_runs_at_equal_budgets(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert cli.main(command(trained, page, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    vae = records(trained / "vae")
    for key in KEYS:
        cost = vae[-1]["tokens"] if key == "tokens" else sum(row[key] for row in vae)
        assert result["runs"]["sllm"]["spent_on_vae"][key] == pytest.approx(cost)
        curves = {"sllm": curve(trained / "sllm", key, cost), "lm": curve(trained / "lm", key, 0)}
        at = result["equal"][key]
        assert at["amount"] == pytest.approx(min(points[-1][0] for points in curves.values()))
        for name, points in curves.items():
            assert result["runs"][name]["spent"][key] == pytest.approx(points[-1][0])
            expected = by_hand(points, at["amount"] * (1 - 1e-12))
            found = at["runs"][name]
            assert (found is None) == (expected is None), (key, name)
            assert found is None or found["bits_per_byte"] == pytest.approx(expected)
    # Tokens and operations are the same on every machine: ten steps with the SentenceVAE's, out of fourteen.
    assert result["equal"]["tokens"]["runs"]["sllm"]["progress"] == 1
    assert 0.5 < result["equal"]["tokens"]["runs"]["lm"]["progress"] < 1
    assert any(note.startswith("equal tokens: lm is read before the end") for note in result["notes"])
    rows = Page(page.read_text()).rows
    assert rows["objective"] == ["sllm", "lm"]
    assert rows["tokens spent"] == [f"{result['runs'][name]['spent']['tokens']:,.0f}" for name in rows[""]]
    assert "new tokens per second" not in rows and "whole text: bits per byte" not in rows


def test_final_figures_gap_and_speed(
    trained: Path, recipes: Path, pool: ranks.RankPool, tmp_path: Path
) -> None:
    speed, page = tmp_path / "speed.json", tmp_path / "page.html"
    measure = ["benchmark", "generation", "--recipe", recipes / "sllm.yaml", "--against", recipes / "lm.yaml"]
    measure += ["--context", 8, 16, "--sentences", 2, "--sentence-tokens", 4, "--runs", 1, "--threads", 1]
    measure += ["--no-memory", "--output", speed]
    [(status, _)] = pool.run(1, ranks.sllm, [str(one) for one in measure])
    assert status == 0
    measured = json.loads(speed.read_text())
    measured["points"][0]["model"]["memory"] = {"before": 1, "peak": 2_500_000_000, "held": 1, "tokens": 1}
    speed.write_text(json.dumps(measured))

    models = [f"{name}={trained / 'models' / name}" for name in ("sllm", "lm")]
    speeds = [f"{name}={speed}" for name in ("sllm", "lm")]
    more = ["--model", *models, "--generation", *speeds, "--json"]
    [(status, out)] = pool.run(1, ranks.sllm, command(trained, page, *more))
    assert status == 0, status
    result = json.loads(out)
    ours, other = (result["runs"][name] for name in ("sllm", "lm"))
    [(_, alone)] = pool.run(
        1,
        ranks.sllm,
        ["evaluate", "--model", ours["evaluated"]["model"], "--data", ours["evaluated"]["data"], "--json"],
    )
    alone = json.loads(alone)
    for key in ("bits_per_byte", "vector_gain", "vector_gain_interval", "data_fingerprint", "parameters"):
        assert ours["evaluated"][key] == alone[key], key
    without, baseline = alone["bits_per_byte_without_vectors"], other["evaluated"]["bits_per_byte"]
    assert ours["gap_recovered"]["baseline"] == "lm" and other["gap_recovered"] is None
    if without > baseline:
        share = (without - alone["bits_per_byte"]) / (without - baseline)
        assert ours["gap_recovered"]["share"] == pytest.approx(share)
    else:
        assert ours["gap_recovered"]["share"] is None
        assert any("no gap, lm is no better" in note for note in result["notes"])
    assert result["generation"]["context"] == 8
    for name, side in (("sllm", "model"), ("lm", "against")):
        point = measured["points"][0][side]
        found = result["runs"][name]["generation"]
        assert found["tokens_per_second"] == point["tokens_per_second"]["median"]
        assert found["cached_bytes_per_token"] == point["cached_bytes_per_token"]
    assert (ours["generation"]["peak_bytes"], other["generation"]["peak_bytes"]) == (2_500_000_000, None)
    # The benchmark took OPT's vocabulary, the runs that of their shards.
    assert sum("parameters; the model trained here has" in note for note in result["notes"]) == 2
    text = page.read_text()
    rows = Page(text).rows
    assert rows["  memory at the peak (GB)"] == ["2.500", "–"]
    assert rows["  parameters"] == [f"{one['evaluated']['parameters']:,}" for one in (ours, other)]
    assert "Quality against generation speed" in text
    assert "whole text: bits per byte" in format_comparison(result)

    with pytest.raises(UserError, match="is an export of another run"):
        swapped = f"sllm={trained / 'models' / 'lm'}"
        compare([trained / "sllm", trained / "lm"], page, [f"sllm={trained / 'vae'}"], [swapped])
    measured["int8"] = True
    speed.write_text(json.dumps(measured))
    with pytest.raises(UserError, match="--int8"):
        compare([trained / "sllm", trained / "lm"], page, [f"sllm={trained / 'vae'}"], generation=speeds[:1])
    measured |= {"int8": False, "threads": 7}
    (tmp_path / "other.json").write_text(json.dumps(measured))
    measured["threads"] = 1
    speed.write_text(json.dumps(measured))
    with pytest.raises(UserError, match="other conditions than the file before: threads"):
        unlike = [speeds[0], f"lm={tmp_path / 'other.json'}"]
        compare([trained / "sllm", trained / "lm"], page, [f"sllm={trained / 'vae'}"], generation=unlike)


def test_what_cannot_be_compared_is_refused(trained: Path, tmp_path: Path) -> None:
    page, vae = tmp_path / "page.html", f"sllm={trained / 'vae'}"
    both = [trained / "sllm", trained / "lm"]
    for folders, vae_runs, words in (
        ([trained / "lm"], [], "two or more"),
        ([trained / "lm", trained / "lm"], [], "two or more different"),
        ([*both, trained / "vae"], [vae], "goes with its SLLM's"),
        (both, [], "name its run with --vae-run sllm=RUN_DIR"),
        (both, [vae, f"lm={trained / 'vae'}"], "this run starts from no SentenceVAE"),
        (both, [f"sllm={trained / 'lm'}"], "its objective is lm, not vae"),
        (both, [f"slm={trained / 'vae'}"], "no run is called slm; there are sllm, lm"),
        (both, [str(trained / "vae")], "must be NAME=PATH"),
        (both, [vae, vae], "given twice"),
    ):
        with pytest.raises(UserError, match=words):
            compare(folders, page, vae_runs)
    other = tmp_path / "lm"
    shutil.copytree(trained / "lm", other, ignore=shutil.ignore_patterns("checkpoints"))
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["training"]["eval_bins"] = 2
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="validated on different samples"):
        compare([trained / "sllm", other], page, [vae])
    with pytest.raises(UserError, match="its folder does not exist"):
        compare(both, tmp_path / "no" / "page.html", [vae])
    assert not page.exists()


def test_nothing_is_extrapolated(tmp_path: Path) -> None:
    """Known runs of 40 steps: 1,000 tokens, half a second, 5·10⁹ operations each; measured at 20 and 30."""
    sllm, vae = make_run(tmp_path / "sllm"), make_run(tmp_path / "vae", objective="vae")
    lm = make_run(tmp_path / "lm", objective="lm", init_from="elsewhere")
    evaluations = [
        {"step": step, "bits_per_byte": y} for step, y in ((10, 2.0), (20, 1.8), (25, 1.4), (28, None))
    ]
    write_lines(lm / "evaluations.jsonl", evaluations)
    page = tmp_path / "page.html"

    result = compare([sllm, lm], page)
    for key, amount in (("tokens", 25_000), ("seconds", 12.5), ("operations", 125e9)):
        at = result["equal"][key]
        assert at["amount"] == pytest.approx(amount)
        assert at["runs"]["sllm"] == pytest.approx({"bits_per_byte": 1.75, "progress": 0.5})
        assert at["runs"]["lm"] == pytest.approx({"bits_per_byte": 1.4, "progress": 0.5})
    assert "lm starts from elsewhere, whose training is not counted" in result["notes"]

    recipe = yaml.safe_load((sllm / "recipe.yaml").read_text()) | {"model": {"vae": {"path": "models/vae"}}}
    (sllm / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = compare([sllm, lm], page, [f"sllm={vae}"])
    assert result["runs"]["sllm"]["curve"][0]["seconds"] == pytest.approx(20 + 10)
    assert result["equal"]["tokens"] == {
        "amount": 25_000,
        "runs": {"sllm": None, "lm": pytest.approx({"bits_per_byte": 1.4, "progress": 0.5})},
    }
    assert any(note.startswith("equal tokens: sllm has no evaluation as early") for note in result["notes"])
    [row] = [row for row in format_comparison(result).splitlines() if "at equal time: 12.5 s" in row]
    assert row.split("12.5 s")[1].split(maxsplit=1) == ["–", "1.4000 (at 50% of its run)"]
