"""The contest of `sllm sweep` rows: SLLMs against token models at equal budgets, with all tries in sight.

The best run of each side and budget is chosen by validation text, seeds averaged; what is compared is its
loss on held-out text. Differences are of the same documents: documents and each side's seeds are drawn again
together. A try is a setting at a budget, whatever its seeds.

Equal time needs the rates of both sides (`sllm benchmark train --step --against`): within the time of the
token model ours has `rate` times the operations, and gains what its own fit says.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.common.charts import Line, Lines
from data_prep.common.errors import UserError
from data_prep.common.page import NOTHING, Table
from pipeline.common.text import with_interval
from pipeline.research.scaling import FEWEST, LEVEL, fit_power, power_draws

SIDES = ("sllm", "lm")
RESAMPLES, SEED = 2000, 1

Row = dict[str, Any]


def spent(row: Row) -> float:
    """Multiply-adds of a run's training, its SentenceVAE's included."""
    return float(row.get("needed_operations_with_vae") or row["needed_operations"])


def settle(rows: Iterable[Row], rates: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The contest's figures.

    Args:
        rows: of sweeps with budgets; those without one, and SentenceVAEs, are left out.
        rates: multiply-adds a second of a training step of both sides.
    Returns: `tries` and `fits` by side; `budgets`: each with the `best` of both sides and the `difference`
        on held-out text, ours minus theirs; `crossing` of the fits; `points`: all tries.
    Raises: UserError for rows that cannot be compared.
    """
    mine = [row for row in rows if row["objective"] in SIDES and row.get("budget")]
    if {row["objective"] for row in mine} != set(SIDES):
        raise UserError("a contest needs runs of objective sllm and of objective lm with `operations`")
    texts = {(json.dumps(row["evaluation"]["data_fingerprint"]), row["window_tokens"]) for row in mine}
    if len(texts) > 1:
        raise UserError(
            "these runs were measured on different texts or windows: bits per byte score them on one"
        )
    runs: dict[tuple[str, float, str], list[Row]] = {}
    for row in mine:
        same = runs.setdefault((row["objective"], row["budget"], _settings(row)), [])
        if row["seed"] not in {one["seed"] for one in same}:  # a setting may be in several sweeps
            same.append(row)
    budgets = sorted({budget for _, budget, _ in runs})
    best = {
        (side, budget): min(tried, key=_validation)
        for side, budget in itertools.product(SIDES, budgets)
        if (tried := [seeds for (s, b, _), seeds in runs.items() if (s, b) == (side, budget)])
    }
    fits = {
        side: _fit([row for (s, _), seeds in best.items() if s == side for row in seeds]) for side in SIDES
    }
    result: dict[str, Any] = {
        "tries": {side: sum(s == side for s, _, _ in runs) for side in SIDES},
        "fits": fits,
        "crossing": _crossing(fits),
        "rates": dict(rates) if rates else None,
        "points": [
            {
                "side": side,
                "name": seeds[0]["name"],
                "budget": budget,
                "operations": float(np.mean([spent(row) for row in seeds])),
                "new_token": (seeds[0].get("new_token") or {}).get("multiply_adds"),
                "bits_per_byte": _validation(seeds),
            }
            for (side, budget, _), seeds in runs.items()
        ],
        "budgets": [],
    }
    for budget in budgets:
        pair = {side: best[side, budget] for side in SIDES if (side, budget) in best}
        tries = {side: sum((s, b) == (side, budget) for s, b, _ in runs) for side in SIDES}
        entry: dict[str, Any] = {"operations": budget, "tries": tries}
        entry["best"] = {side: _summary(seeds) for side, seeds in pair.items()}
        if len(pair) == len(SIDES) and all(row.get("held_out") for seeds in pair.values() for row in seeds):
            entry["difference"] = paired_difference(pair["sllm"], pair["lm"])
            if rates and fits["sllm"]:
                entry["at_equal_time"] = _at_equal_time(entry, rates, fits["sllm"])
        result["budgets"].append(entry)
    return result


def _settings(row: Row) -> str:
    """What a run's recipe says but for its seed, length and places: equal ones at a budget are one try."""
    recipe = copy.deepcopy(row["recipe"])
    for key in ("seed", "output_dir", "log", "training"):
        recipe.pop(key, None)
    if vae := recipe["model"].get("vae"):
        vae.pop("path", None)
    return json.dumps([recipe, (row.get("after") or "").rsplit("-s", 1)[0]], sort_keys=True)


def _validation(seeds: Sequence[Row]) -> float:
    return float(np.mean([row["bits_per_byte"] for row in seeds]))


def _summary(seeds: Sequence[Row]) -> dict[str, Any]:
    first = seeds[0]
    held = [row["held_out"]["bits_per_byte"] for row in seeds if row.get("held_out")]
    gains = [row["shuffle_gain"] for row in seeds if row.get("shuffle_gain") is not None]
    return {
        "name": first["name"],
        "seeds": len(seeds),
        "bits_per_byte": _validation(seeds),
        "held_out": float(np.mean(held)) if held else None,
        "shuffle_gain": float(np.mean(gains)) if gains else None,
        "tokens": first["tokens"],
        "operations": spent(first),
        "new_token": first.get("new_token"),
    }


def paired_difference(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, Any]:
    """Bits per byte of ours minus theirs on held-out documents, with the 95 % interval: documents are drawn
    again, and the seeds of each side where it has several."""
    nats, sizes = [], []
    for seeds in (ours, theirs):
        found = [row["held_out"]["by_document"] for row in seeds]
        nats.append(np.array([one["nats"] for one in found]))
        sizes += [one["bytes"] for one in found]
    if any(one != sizes[0] for one in sizes):
        raise UserError("the held-out documents of these runs differ: score them on one text")
    bytes_D = np.array(sizes[0], dtype=float)
    rng, drawn = np.random.default_rng(SEED), np.empty(RESAMPLES)
    for n in range(RESAMPLES):
        documents = rng.integers(0, len(bytes_D), len(bytes_D))
        means = [
            nats_SD[rng.integers(0, len(nats_SD), len(nats_SD))][:, documents].mean(0) for nats_SD in nats
        ]
        drawn[n] = (means[0] - means[1]).sum() / bytes_D[documents].sum()
    bit, tail = math.log(2), (1 - LEVEL) / 2
    return {
        "value": float((nats[0].mean(0) - nats[1].mean(0)).sum() / bytes_D.sum() / bit),
        "value_interval": (np.quantile(drawn, [tail, 1 - tail]) / bit).tolist(),
        "documents": len(bytes_D),
        "seeds": [len(ours), len(theirs)],
    }


def _at_equal_time(entry: dict[str, Any], rates: Mapping[str, float], fit: dict[str, Any]) -> dict[str, Any]:
    """The difference when ours may train as long as the token model of this budget."""
    ratio = rates["sllm"] / rates["lm"]
    gained = entry["best"]["sllm"]["held_out"] * (ratio ** -fit["alpha"] - 1)
    difference = entry["difference"]
    shifted = [value + gained for value in difference["value_interval"]]
    return {"value": difference["value"] + gained, "value_interval": shifted, "rate": ratio}


# Fits -----------------------------------------------------------------------------------------------------


def _fit(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The power of training operations that the best runs of a side follow on held-out text; None for fewer
    than three budgets."""
    points = [(spent(row), row["held_out"]["bits_per_byte"]) for row in rows if row.get("held_out")]
    if len({row["budget"] for row in rows if row.get("held_out")}) < FEWEST:
        return None
    xs, ys = (np.array(values) for values in zip(*points, strict=True))
    return {**fit_power(xs, ys), "points": points}


def _crossing(fits: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """Training operations at which the lines of both sides meet, and its 95 % interval; `share` of the draws
    in which ours is the steeper one. None without both fits."""
    ours, theirs = (fits[side] for side in SIDES)
    if ours is None or theirs is None:
        return None
    lines = [
        power_draws(points[:, 0], points[:, 1], seed)
        for seed, points in enumerate((np.array(ours["points"]), np.array(theirs["points"])), start=SEED)
    ]
    slopes, heights = (lines[0][:, n] - lines[1][:, n] for n in range(2))
    tail = (1 - LEVEL) / 2
    with np.errstate(divide="ignore"):
        at = -heights / slopes / math.log(10)
    found = math.log(theirs["A"] / ours["A"]) / (theirs["alpha"] - ours["alpha"]) / math.log(10)
    return {
        "log10_operations": found,
        "log10_operations_interval": np.quantile(at, [tail, 1 - tail]).tolist(),
        "share": float((slopes < 0).mean()),
    }


# Tables and charts ----------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> Table:
    """A row a budget and side: the best run, of how many tries, and the differences."""
    rows = []
    for entry in result["budgets"]:
        for side in SIDES:
            best = entry["best"].get(side)
            if best is None:
                continue
            differences = (entry.get("difference"), entry.get("at_equal_time")) if side == "sllm" else ()
            cells = [with_interval(one, "value", 3) if one else NOTHING for one in differences] or ["", ""]
            new = (best["new_token"] or {}).get("multiply_adds")
            rows.append(
                (
                    f"{entry['operations'] / 1e12:.3g}",
                    best["name"],
                    str(entry["tries"][side]),
                    str(best["seeds"]),
                    f"{best['tokens'] / 1e6:.2f}",
                    f"{best['bits_per_byte']:.3f}",
                    NOTHING if best["held_out"] is None else f"{best['held_out']:.3f}",
                    NOTHING if best["shuffle_gain"] is None else f"{best['shuffle_gain']:.3f}",
                    NOTHING if new is None else f"{new / 1e6:.2f}",
                    *cells,
                )
            )
    header = ["budget (10¹²)", "best", "tries", "seeds", "tokens (M)", "bits per byte", "held out"]
    header += ["shuffle gain", "M multiply-adds a new token", "ours − theirs", "at equal time"]
    return Table(header, rows, left=(1,))


def notes(result: dict[str, Any]) -> list[str]:
    """The count of tries, the fits and where they meet, a sentence each."""
    tries = result["tries"]
    lines = [f"Tries (a setting at a budget each): {tries['sllm']} of SLLMs, {tries['lm']} of token models."]
    for side, fit in result["fits"].items():
        if fit:
            lines.append(f"{side}: bits per byte = {fit['A']:.4g} · x^-α, α {with_interval(fit, 'alpha')}.")
    if crossing := result["crossing"]:
        low, high = crossing["log10_operations_interval"]
        lines.append(
            f"The lines meet at 10^{crossing['log10_operations']:.1f} multiply-adds (10^{low:.1f} to "
            f"10^{high:.1f}); ours is the steeper one in {crossing['share']:.0%} of the draws. "
            "Outside the measured budgets this is an extrapolation of straight lines."
        )
    return lines


def plots(result: dict[str, Any]) -> list[Lines]:
    """Quality over training operations and over a new token's: all tries as points, and the best of each
    budget joined."""
    found = []
    axes = (("operations", "multiply-adds of training"), ("new_token", "multiply-adds of a new token"))
    for key, label in axes:
        lines = []
        for side in SIDES:
            mine = [point for point in result["points"] if point["side"] == side and point[key]]
            places = sorted((point[key], point["bits_per_byte"]) for point in mine)
            if places:
                lines.append(Line(f"{side}, {len(places)} tries", places, side, "points"))
                lines.append(Line("", _frontier(places), side))
        found.append(Lines(lines, label, "bits per byte (validation)", log_x=True))
    return found


def _frontier(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that nothing cheaper is as good as."""
    kept: list[tuple[float, float]] = []
    for place in places:
        if not kept or place[1] < kept[-1][1]:
            kept.append(place)
    return kept
