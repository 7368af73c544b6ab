"""docs/strategies.md: its tables are the estimates of `sllm inspect`.

`PYTHONPATH=tests:. python tests/tools/docs/test_strategies_page.py` rewrites the tables. A dry run of the
large models takes most of a minute, so the test computes the rows of two small ones only.
"""

from __future__ import annotations

import re

import pytest
from helpers.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "strategies.md"
RECIPES = ("svae-768-h1", "svae-1024-h1", "svae-2048-h1", "sllm-125m-h1", "sllm-350m-h1", "sllm-1.3b-h1")
WORLDS = (1, 8, 64)
GPUS = (24, 40, 80)  # GB
USABLE = 0.9  # of a GPU: the rest is CUDA's own, and holes between blocks
FILES = {"0": "zero0", "1": "zero1", "2": "zero2", "3": "zero3", "3-offload": "zero3-offload"}
BEGIN, END = "<!-- tables: written by tests/tools/docs/test_strategies_page.py -->", "<!-- end of tables -->"


CHECKED = ("svae-768-h1", "sllm-125m-h1")  # by the test


def estimates(recipes: tuple[str, ...]) -> dict[str, dict[tuple[str, int], int]]:
    """Bytes of one GPU by recipe, then by (ZeRO stage, GPUs)."""
    from pipeline.costs.inspect import inspect

    found = {}
    for recipe in recipes:
        rows = inspect(recipe, worlds=WORLDS)["memory_per_gpu"]
        found[recipe] = {(row["stage"], row["world"]): row["total"] for row in rows}
    return found


def choice(totals: dict[tuple[str, int], int], world: int, gpu: int) -> str:
    """The first strategy that fits, in the order of what it costs in traffic and time."""
    order = ("1", "3-offload") if world == 1 else ("1", "2", "3", "3-offload")
    for stage in order:
        if totals[stage, world] <= USABLE * gpu * 1e9:
            return f"`{FILES[stage]}`"
    return "none: smaller bins"


def tables(found: dict[str, dict[tuple[str, int], int]]) -> str:
    """The text between `BEGIN` and `END`."""
    heads = [f"{world} × {gpu} GB" for world in WORLDS for gpu in GPUS]
    lines = ["| recipe | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for recipe, totals in found.items():
        cells = [choice(totals, world, gpu) for world in WORLDS for gpu in GPUS]
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    keys = [("0", 1), *((stage, world) for stage in "123" for world in WORLDS if stage == "1" or world > 1)]
    keys += [("3-offload", world) for world in WORLDS if world > 1]
    shown = [(f"{FILES[stage]} × {world}", (stage, world)) for stage, world in keys]
    lines += ["", "GB of one GPU, by strategy and number of GPUs:", ""]
    lines += ["| recipe | " + " | ".join(head for head, _ in shown) + " |"]
    lines += ["| --- |" + " ---: |" * len(shown)]
    for recipe, totals in found.items():
        cells = [f"{totals[key] / 1e9:.1f}" for _, key in shown]
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with new tables."""
    middle = f"{BEGIN}\n\n{tables(estimates(RECIPES))}\n\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: middle, page, flags=re.S)


def test_the_page_says_what_inspect_estimates() -> None:
    lines = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()
    expected = tables(estimates(CHECKED)).splitlines()
    assert [line for line in expected if line not in lines] == [], "rewrite the page: see this module"
    for recipe in RECIPES:
        assert len([line for line in lines if line.startswith(f"| {recipe} |")]) == 2


def test_every_strategy_file_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for path in (PAGE.parent.parent / "ds_configs").glob("*.json"):
        assert f"`{path.stem}`" in page, path.name


@pytest.mark.parametrize(
    ("world", "gpu", "expected"), [(1, 24, "`zero3-offload`"), (8, 24, "`zero2`"), (8, 40, "`zero1`")]
)
def test_the_cheapest_strategy_that_fits_is_chosen(world: int, gpu: int, expected: str) -> None:
    totals = {("1", 1): 30, ("3-offload", 1): 10, ("1", 8): 22, ("2", 8): 21, ("3", 8): 15}
    assert choice({key: size * 10**9 for key, size in totals.items()}, world, gpu) == expected


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
