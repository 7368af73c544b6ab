"""Figures that are derived from a result file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exact_matches(by_length: Mapping[str, Any], low: int, high: int) -> tuple[int, float | None]:
    """(sentences, share of them rebuilt exactly; None without any) from one length in tokens to another."""
    ones = [one for length, one in by_length.items() if low <= int(length) <= high]
    sentences = sum(one["sentences"] for one in ones)
    right = sum(one["sentences"] * one["exact_match"] for one in ones)
    return sentences, right / sentences if sentences else None
