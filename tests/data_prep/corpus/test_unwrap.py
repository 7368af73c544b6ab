"""Hard-wrapped lines are joined, and only those."""

from __future__ import annotations

import textwrap

import pytest

from data_prep.corpus.filters import Filters
from data_prep.corpus.unwrap import unwrap

PROSE = [
    "The harbour was quiet when the last boat came in, and no one on the pier saw its lamp. "
    "Later they all said that they had known it from the first moment.",
    "Only the keeper wrote it down; his book, which he kept for well-known reasons, still has it.",
    "No one asked.",
    "When the inspector came in spring he read the page twice, closed the book, and left without a word.",
]


@pytest.mark.parametrize("width", [45, 60, 72, 79, 100, 130])
def test_wrapped_prose_comes_back(width: int) -> None:
    wrapped = "\n\n".join(textwrap.fill(part, width, break_on_hyphens=False) for part in PROSE)
    assert unwrap(wrapped) == "\n\n".join(PROSE)
    assert unwrap("\n\n".join(PROSE)) == "\n\n".join(PROSE)


def test_chinese_lines_join_without_a_space() -> None:
    text = "海边的灯塔很安静没有人注意到最后一条船的灯已经灭了后来大家都说他们从一开始就知道" * 5
    wrapped = "\n".join(text[at : at + 44] for at in range(0, len(text), 44))
    assert unwrap(wrapped) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "One line.",
        "Roses are red,\nviolets are blue,\nsugar is sweet,\nand so are you.",
        "- "
        + "a list item of some length, as long as it gets"
        + "\n- "
        + "another list item of such a length!",
        "\n".join(f"{n}. {'An entry of the table of contents':.<60}{n}" for n in range(1, 9)),
        "\n".join(f"    indented code number {n} = some_function(of, arguments, {n})" for n in range(9)),
        "\n".join("A paragraph in one line, far longer than any editor wraps to. " * n for n in (3, 4, 5)),
    ],
)
def test_other_lines_stay(text: str) -> None:
    assert unwrap(text) == text


def test_the_rule_is_off_and_counted_when_on() -> None:
    wrapped = textwrap.fill(" ".join(PROSE), 70, break_on_hyphens=False)
    assert Filters().clean(wrapped) == (wrapped, [])
    assert Filters(unwrap=True).clean(wrapped) == (" ".join(PROSE), ["lines joined"])
    assert "unwrap" not in Filters().to_dict()  # as in the settings of older shards
    assert Filters.from_dict(Filters(unwrap=True).to_dict()) == Filters(unwrap=True)
