"""`sllm scaling fit`: known laws come back, in intervals that hold them; what cannot be fitted is refused."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from helpers.run_files import make_run

from data_prep.common.charts import PALETTE
from data_prep.common.charts import figure as draw
from data_prep.common.errors import UserError
from pipeline.cli import main as cli
from pipeline.research.scaling import fit, fit_power, plot, read_points

SIZES = np.geomspace(1e5, 1e7, 6)


def noise(seed: int, count: int, share: float = 0.01) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, share, count))


def row(objective: str, x: float, y: float, seed: int = 1, **more: object) -> dict:
    return {
        "name": f"{objective}-{x:.0f}",
        "seed": seed,
        "after": None,
        "objective": objective,
        "parameters": int(x),
        "body_parameters": int(x) // 2,
        "seconds": x / 1e4,
        "operations": int(x) * 1000,
        "bits_per_byte": y,
        "window_tokens": 1024,
        "recipe": {"objective": objective, "model": {"vae": {}, "backbone": {}}},
        "evaluation": {"data_fingerprint": "ab"},
        **more,
    }


def write(folder: Path, rows: list[dict], name: str = "results.json") -> Path:
    (folder / name).write_text(json.dumps({"rows": rows}))
    return folder / name


def test_a_power_law_comes_back() -> None:
    exact = fit_power(SIZES, 5 * SIZES**-0.1)
    assert exact["A"] == pytest.approx(5) and exact["alpha"] == pytest.approx(0.1)
    assert exact["alpha_interval"] == pytest.approx([0.1, 0.1]) and exact["residual"] < 1e-12
    held = 0
    for seed in range(60):
        found = fit_power(SIZES, 5 * SIZES**-0.1 * noise(seed, 6))
        low, high = found["alpha_interval"]
        assert low < found["alpha"] < high
        held += low <= 0.1 <= high
    assert 50 <= held < 60  # nominally 57; six points' residuals are few


def test_an_offset_comes_back_and_without_one_the_line_is_the_same() -> None:
    exact = fit_power(SIZES, 0.8 + 40 * SIZES**-0.3, offset=True)
    assert (exact["E"], exact["A"], exact["alpha"]) == pytest.approx((0.8, 40, 0.3), rel=1e-3)
    for seed in range(5):
        found = fit_power(SIZES, (0.8 + 40 * SIZES**-0.3) * noise(seed, 6, 0.003), offset=True)
        for key, truth in (("E", 0.8), ("alpha", 0.3)):
            low, high = found[f"{key}_interval"]
            assert low <= truth <= high, (key, seed)
    plain = fit_power(SIZES, 5 * SIZES**-0.1, offset=True)
    assert plain["E"] == pytest.approx(0, abs=1e-6) and plain["alpha"] == pytest.approx(0.1)


def test_the_order_of_points_does_not_matter() -> None:
    y = 5 * SIZES**-0.1 * noise(1, 6)
    for offset in (False, True):
        assert fit_power(SIZES, y, offset) == fit_power(SIZES[::-1], y[::-1], offset)


def test_the_command_fits_both_kinds_and_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sllm = [row("sllm", x, 6 * x**-0.11 * noise(seed, 1)[0], seed) for x in SIZES[:4] for seed in (1, 2)]
    lm = [row("lm", x, 5 * x**-0.09) for x in SIZES[:3]]
    first, second = write(tmp_path, sllm), write(tmp_path, [*lm, row("vae", 1e5, 0.2)], "second.json")
    figure = tmp_path / "figure.svg"
    assert cli.main(["scaling", "fit", str(first), str(second), "--output", str(figure), "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert list(fits) == ["sllm", "lm"] and len(fits["sllm"]["points"]) == 8
    assert fits["lm"]["line"]["alpha"] == pytest.approx(0.09) and fits["lm"]["offset"] is None
    assert fits["sllm"]["offset"]["E"] >= 0
    svg = "{http://www.w3.org/2000/svg}"
    drawn = xml.etree.ElementTree.parse(figure).getroot()
    dots = [one for one in drawn.findall(f".//{svg}use") if "opacity" not in one.get("style")]  # no bands
    lines = [p for p in drawn.findall(f".//{svg}path") if "stroke-width: 2" in p.get("style", "")]
    assert len(dots) == 11 and len(lines) >= 3
    # On log-log axes a power law is straight: the token-level model's dots lie on one line.
    hue = PALETTE["lm"][0]
    places = [(float(d.get("x")), float(d.get("y"))) for d in dots if hue in d.get("style")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert y1 == pytest.approx(y0 + (y2 - y0) * (x1 - x0) / (x2 - x0), abs=0.2)
    result = fit([first, second])
    described = plot(result)
    assert [(one.colour, one.kind) for one in described.lines if one.kind == "points"] == [
        ("sllm", "points"),
        ("lm", "points"),
    ]
    # The band of the slope's interval is around the line.
    for line in described.lines:
        for (_, y), (low, high) in zip(line.points, line.interval or [], strict=False):
            assert low <= y <= high
    [axes] = draw([described]).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert cli.main(["scaling", "fit", str(second), "--x", "operations"]) == 0
    out = capsys.readouterr().out
    assert "x: operations" in out and "of the fit, not of the seeds" in out


def test_what_a_vae_has_cost_is_counted_or_the_run_refused(tmp_path: Path) -> None:
    recipe = {"objective": "sllm", "model": {"vae": {"path": "models/vae"}, "backbone": {}}}
    rows = [row("sllm", x, 2.0, after="vae-s1", recipe=recipe, seconds_with_vae=7 * x) for x in SIZES[:3]]
    assert [p.x for p in read_points([write(tmp_path, rows)], "seconds")] == pytest.approx(7 * SIZES[:3])
    assert [p.x for p in read_points([write(tmp_path, rows)], "parameters")] == [int(x) for x in SIZES[:3]]
    alone = write(tmp_path, [row("sllm", 1e5, 2.0, recipe=recipe)])
    with pytest.raises(UserError, match="starts from models/vae, whose cost is not counted"):
        read_points([alone], "seconds")
    assert len(read_points([alone], "parameters")) == 1


def test_run_directories_are_points(tmp_path: Path) -> None:
    """Known runs of 40 steps, half a second and 5·10⁹ operations each; the last evaluation is at step 30."""
    runs = [make_run(tmp_path / str(n), model={}, objective="lm") for n in range(3)]
    [point] = read_points(runs[:1], "operations")
    assert (point.x, point.bits_per_byte) == (pytest.approx(150e9), 1.5)
    with pytest.raises(UserError, match="lm: 1 different seconds, but a fit needs 3 or more"):
        fit(runs, "seconds")
    with pytest.raises(UserError, match="has no checkpoint"):
        fit(runs, "parameters")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lm: 2 different parameters, but a fit needs 3"):
        fit([write(tmp_path, [row("lm", x, 2.0, seed) for x in SIZES[:2] for seed in (1, 2)])])
    with pytest.raises(UserError, match="measured on different texts or windows"):
        fit([write(tmp_path, [row("lm", 1e5, 2.0), row("lm", 2e5, 2.0, window_tokens=512)])])
    with pytest.raises(UserError, match="nothing to fit"):
        fit([write(tmp_path, [row("vae", 1e5, 2.0)])])
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="is no result file of `sllm sweep` and no run directory"):
        fit([tmp_path / "other.json"])
    with pytest.raises(UserError, match="its folder does not exist"):
        fit([write(tmp_path, [])], output=tmp_path / "no" / "figure.svg")
