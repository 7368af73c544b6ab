"""`sllm scaling fit`: bits per byte as a power of size or cost, for SLLMs and token-level models.

Points are rows of `sllm sweep` of objective sllm or lm, and run directories (their last validation). Each
objective gets two fits; all are drawn in one log-log chart.

    line:    bits per byte = A · x^(-alpha)        a straight line in log-log, as the paper draws its law
    offset:  bits per byte = E + A · x^(-alpha)    E: what no size takes away; from four sizes on

Least squares of log(bits per byte). Intervals are 95 % percentiles of a bootstrap of the residuals: they are
of the fit, not of the seeds. Nothing here is extrapolated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common import charts
from data_prep.common.charts import Line, Lines, svg
from data_prep.common.environment import require_folder
from data_prep.common.errors import UserError
from data_prep.common.extras import import_extra
from data_prep.common.files import write_atomically
from data_prep.common.page import Table, to_text
from pipeline.checkpoints import store
from pipeline.common.text import with_interval
from pipeline.training.run_files import read_runs, validation_sample

X = {
    "parameters": "parameters",
    "body_parameters": "parameters without embeddings and head",
    "operations": "multiply-adds of training, forward and backward",
    "seconds": "seconds of training",
}
OBJECTIVES = ("sllm", "lm")
FEWEST = 3  # different x for a line; one more for the offset
RESAMPLES, SEED, LEVEL = 1000, 1, 0.95
NOTE = (
    "intervals: 95 %, by resampling the residuals of the fit; they are of the fit, not of the seeds, and say "
    "nothing about sizes outside the measured range"
)


@dataclass(frozen=True)
class Point:
    """One run. text: on what it was measured; equal for figures that can be compared."""

    objective: str
    name: str
    x: float
    bits_per_byte: float
    text: str


# Fits -----------------------------------------------------------------------------------------------------


def fit_power(x_N: np.ndarray, y_N: np.ndarray, offset: bool = False) -> dict[str, Any]:
    """y = A · x^(-alpha), or with `offset` y = E + A · x^(-alpha).

    Returns: {"A", "alpha", "alpha_interval", "residual"}, with `offset` also "E" and "E_interval". The
    residual is the root mean square of log(y): about the points' relative distance from the curve.
    """
    # By x, then y: residuals are resampled by position, and the points' order must not matter.
    order = np.lexsort((y_N, x_N))
    x_N, y_N = (np.asarray(values, dtype=float)[order] for values in (x_N, y_N))
    log_x, log_y, solve = np.log(x_N), np.log(y_N), _with_offset if offset else _line
    start, slope, height = solve(log_x, y_N)
    fitted = np.log(start + np.exp(height + slope * log_x))
    drawn = np.array([solve(log_x, np.exp(one)) for one in _resampled(fitted, log_y, 2 + offset)])
    found = {
        "A": math.exp(height),
        "alpha": -slope,
        "alpha_interval": _interval(-drawn[:, 1]),
        "residual": float(np.sqrt(((log_y - fitted) ** 2).mean())),
    }
    return {"E": start, "E_interval": _interval(drawn[:, 0]), **found} if offset else found


def _line(log_x_N: np.ndarray, y_N: np.ndarray, offset: float = 0.0) -> tuple[float, float, float]:
    """(E, slope, height) at a fixed E, where log(y - E) is a line in log x; the weights make its squares
    those of log y."""
    above = y_N - offset
    slope, height = np.polyfit(log_x_N, np.log(above), 1, w=above / y_N)
    return offset, float(slope), float(height)


def _with_offset(log_x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float, float]:
    """(E, slope, height) of the least squares of log y."""
    minimize_scalar = import_extra("scipy.optimize", "research").minimize_scalar

    def loss(offset: float) -> float:
        _, slope, height = _line(log_x_N, y_N, offset)
        return float(((np.log(y_N) - np.log(offset + np.exp(height + slope * log_x_N))) ** 2).sum())

    high = float(y_N.min()) * (1 - 1e-4)
    found = minimize_scalar(loss, bounds=(0.0, high), method="bounded", options={"xatol": 1e-6 * high})
    # The search stays inside its bounds, and the minimum may be at one of them.
    return _line(log_x_N, y_N, min((0.0, float(found.x), high), key=loss))


def _resampled(fitted_N: np.ndarray, log_y_N: np.ndarray, free: int, seed: int = SEED) -> np.ndarray:
    """[RESAMPLES, N] of log y: the fit plus resampled residuals. They are widened for the `free` parameters
    of the fit, because residuals of a few points are smaller than the errors."""
    residuals, count = log_y_N - fitted_N, len(log_y_N)
    residuals = (residuals - residuals.mean()) * math.sqrt(count / max(1, count - free))
    rng = np.random.default_rng(seed)
    return fitted_N + residuals[rng.integers(0, count, (RESAMPLES, count))]


def power_draws(x_N: np.ndarray, y_N: np.ndarray, seed: int) -> np.ndarray:
    """[RESAMPLES, 2]: slope and height of the line in log x and log y, fitted to resampled residuals. Fits
    that are compared have seeds of their own: their errors are not the same."""
    order = np.lexsort((y_N, x_N))
    x_N, y_N = x_N[order], y_N[order]
    log_x, log_y = np.log(x_N), np.log(y_N)
    _, slope, height = _line(log_x, y_N)
    drawn = _resampled(height + slope * log_x, log_y, 2, seed)
    return np.array([_line(log_x, np.exp(one))[1:] for one in drawn])


def _interval(values: np.ndarray) -> list[float]:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


# Points ---------------------------------------------------------------------------------------------------


def read_points(paths: Sequence[str | Path], x: str) -> list[Point]:
    """The points of sweep result files and run directories. Raises: UserError for what is neither, and for a
    cost that is not known whole."""
    return [
        point for path in map(Path, paths) for point in (_of_run if path.is_dir() else _of_sweep)(path, x)
    ]


def _of_sweep(path: Path, x: str) -> list[Point]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no result file of `sllm sweep` and no run directory") from None
    points = []
    for row in rows:
        if row["objective"] in OBJECTIVES:
            name = f"{row['name']}-s{row['seed']}"
            where = f"{path}, run {name}"
            value = row.get(f"{x}_with_vae", row.get(x))
            _require_own_cost(row["recipe"], x, where, vae_counted=bool(row.get("after")))
            text = [row["evaluation"]["data_fingerprint"], row["window_tokens"]]
            points.append(_point(where, row["objective"], name, value, x, row["bits_per_byte"], text))
    return points


def _of_run(folder: Path, x: str) -> list[Point]:
    [run] = read_runs([folder])
    objective = run.recipe.get("objective")
    if objective not in OBJECTIVES:
        raise UserError(f"{folder}: its objective is {objective}, but only `sllm` and `lm` predict text")
    _require_own_cost(run.recipe, x, str(folder))
    measured = [row for row in run.evaluations if row.get("bits_per_byte") is not None]
    if not measured:
        raise UserError(f"{folder}: has no evaluation yet (data.validation, training.eval_every)")
    if x in ("parameters", "body_parameters"):
        value: float | None = _parameters(folder)[x]
    else:  # what was spent up to the evaluation
        spent = [row.get(x) for row in run.metrics if row["step"] <= measured[-1]["step"]]
        value = None if None in spent else sum(spent)
    bits = measured[-1]["bits_per_byte"]
    return [_point(str(folder), objective, run.name, value, x, bits, validation_sample(run))]


def _point(where: str, objective: str, name: str, value: Any, x: str, bits: float, text: list) -> Point:
    if not value or not bits or bits <= 0:
        raise UserError(f"{where}: says no {x if not value else 'bits per byte'}: leave it out")
    return Point(objective, name, float(value), float(bits), json.dumps(text))


def _require_own_cost(recipe: dict[str, Any], x: str, where: str, vae_counted: bool = False) -> None:
    parts = ("backbone",) if vae_counted or recipe["objective"] == "lm" else ("vae", "backbone")
    starts = [recipe.get("init_from"), *(recipe["model"].get(part, {}).get("path") for part in parts)]
    if x in ("operations", "seconds") and any(starts):
        raise UserError(
            f"{where}: starts from {next(filter(None, starts))}, whose cost is not counted: train both in "
            "one sweep (`after`), or take --x parameters"
        )


def _parameters(run_dir: Path) -> dict[str, int]:
    """Parameters of a run's model, built from its checkpoint's record without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pipeline.costs.inspect import body_parameters
    from pipeline.export.model_folder import model_from_config
    from pipeline.models.folders import parameter_count

    found = store.newest_whole(run_dir)
    if not found:
        raise UserError(f"{run_dir} has no checkpoint, which would say the model's size: take --x seconds")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_from_config(found[1])
    return {"parameters": parameter_count(model), "body_parameters": body_parameters(model)}


# The command ----------------------------------------------------------------------------------------------


def fit(
    paths: Sequence[str | Path], x: str = "parameters", output: str | Path | None = None
) -> dict[str, Any]:
    """Fit every objective that the inputs have, and draw them, where an `output` is given.

    Returns: {"x", "fits": by objective {"points", "line", "offset" or None}, "note", "output"}.
    Raises: UserError for fewer than three different x of an objective, or figures of different texts.
    """
    if output:
        require_folder(str(output))
        charts.require()
    points = read_points(paths, x)
    if not points:
        raise UserError(f"nothing to fit: no run of objective {' or '.join(OBJECTIVES)} here")
    for point in points:
        if point.text != points[0].text:
            raise UserError(
                f"{point.name} and {points[0].name} were measured on different texts or windows: bits per "
                "byte compare on one only"
            )
    fits = {}
    for objective in OBJECTIVES:
        mine = sorted((p for p in points if p.objective == objective), key=lambda p: (p.x, p.bits_per_byte))
        if not mine:
            continue
        different = len({point.x for point in mine})
        if different < FEWEST:
            raise UserError(f"{objective}: {different} different {x}, but a fit needs {FEWEST} or more")
        xs, ys = np.array([p.x for p in mine]), np.array([p.bits_per_byte for p in mine])
        fits[objective] = {
            "points": [{"run": p.name, "x": p.x, "bits_per_byte": p.bits_per_byte} for p in mine],
            "line": fit_power(xs, ys),
            "offset": fit_power(xs, ys, offset=True) if different > FEWEST else None,
        }
    result = {"x": x, "fits": fits, "note": NOTE, "output": str(output) if output else None}
    if output:
        write_atomically(Path(output), svg([plot(result)], "Bits per byte, and the fits").encode())
    return result


def plot(result: dict[str, Any]) -> Lines:
    """All points; for each objective the straight line, the band of its slope's interval around the middle of
    the points, and the curve with an offset."""
    lines = []
    for objective, found in result["fits"].items():
        points = [(one["x"], one["bits_per_byte"]) for one in found["points"]]
        xs = np.geomspace(points[0][0], points[-1][0], 60)
        line, offset = found["line"], found["offset"]
        ys = line["A"] * xs ** -line["alpha"]
        away = xs / np.exp(np.mean(np.log([x for x, _ in points])))
        low, high = (ys * away ** (line["alpha"] - alpha) for alpha in reversed(line["alpha_interval"]))
        band = list(zip(np.minimum(low, high).tolist(), np.maximum(low, high).tolist(), strict=True))
        name = f"{objective}: A · x^{-line['alpha']:.3f}"
        lines.append(Line(name, list(zip(xs.tolist(), ys.tolist(), strict=True)), objective, interval=band))
        if offset:
            ys = offset["E"] + offset["A"] * xs ** -offset["alpha"]
            name = f"{objective}: {offset['E']:.3f} + A · x^{-offset['alpha']:.3f}"
            lines.append(Line(name, list(zip(xs.tolist(), ys.tolist(), strict=True)), objective, dash="--"))
        lines.append(Line("", points, objective, "points"))
    return Lines(lines, X[result["x"]], "bits per byte", log_x=True, log_y=True)


def table(result: dict[str, Any]) -> Table:
    """All fits, a row each."""
    rows = []
    for objective, found in result["fits"].items():
        for kind, form in (("line", "A · x^-α"), ("offset", "E + A · x^-α")):
            if one := found[kind]:
                alpha, offset = (with_interval(one, key) for key in ("alpha", "E"))
                count = str(len(found["points"]))
                rows.append(
                    (objective, form, count, alpha, offset, f"{one['A']:.4g}", f"{one['residual']:.2%}")
                )
    header = (f"x: {result['x']}", "bits per byte", "points", "α", "E", "A", "residual")
    return Table(header, rows, left=(0, 1))


def format_fit(result: dict[str, Any]) -> str:
    """The result of `fit` as text."""
    lines = [to_text(table(result)), f"note: {result['note']}"]
    return "\n".join(lines + ([f"wrote {result['output']}"] if result["output"] else []))
