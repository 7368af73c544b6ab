"""Numbers as text for people."""

from __future__ import annotations

from typing import Any

from data_prep.common.page import NOTHING, Filters


def grouped(value: int) -> str:
    return f"{value:,}"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 3 h 07 min"""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def with_interval(figures: dict[str, Any], key: str, digits: int = 4) -> str:
    """`figures[key]` as a table cell, with its interval (`KEY_interval`) if there is one."""
    if figures.get(key) is None:
        return NOTHING
    ends = figures.get(f"{key}_interval")
    between = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""
    return f"{figures[key]:.{digits}f}{between}"


def millions(count: float) -> str:
    return f"{count / 1e6:.2f}M"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


# What templates of text for people use.
FILTERS: Filters = {
    "f": format,
    "percent": percent,
    "duration": duration,
    "millions": millions,
    "gigabytes": gigabytes,
    "with_interval": with_interval,
}
