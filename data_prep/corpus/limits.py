"""When `data-prep shard` stops for the state of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.common.errors import UserError, counted
from data_prep.corpus.filters import ASKED_FOR

UNVERIFIED_TEXT = "its text has no checksum (`zstd --check` and `xz` write one)"
LEAST_RECORDS = 1000  # of a unit, before its share of rejected records can stop a run


class TooManyRejected(UserError):
    """More of the input is unusable than `Limits.max_rejected` allows."""


@dataclass(frozen=True)
class Limits:
    """A set that passes has the same bytes without them.

    Args:
        strict: stop at damaged input, and at text without a checksum in a packed file.
        max_rejected: largest share of rejected records, of a unit of `LEAST_RECORDS` and of the whole set.
    """

    strict: bool = False
    max_rejected: float = 1.0

    def refuse(self, damaged: Sequence[dict], inputs: Sequence[dict], rejected: Mapping[str, int]) -> None:
        """Raises `UserError` when the limits forbid a set with these entries of its manifest."""
        for one in damaged:
            self.refuse_damage(one["file"], one["damage"])
        for one in inputs:
            self.refuse_damage(one["file"], UNVERIFIED_TEXT if one.get("unverified") else None)
        self.refuse_rejected(rejected, sum(one["documents"] for one in inputs), "the input")

    def refuse_damage(self, file: str, problem: str | None) -> None:
        """Raises `UserError` when there is a problem and `strict` forbids it."""
        if self.strict and problem:
            raise UserError(f"{file}: {problem}; --strict stops there")

    def refuse_rejected(self, rejected: Mapping[str, int], documents: int, where: str) -> None:
        """Raises `TooManyRejected` when too many records are unusable, apart from those filtered out."""
        unusable = {reason: n for reason, n in rejected.items() if not reason.startswith(ASKED_FOR)}
        count, records = sum(unusable.values()), documents + sum(rejected.values())
        if count > self.max_rejected * records:
            reasons = ", ".join(f"{n:,} × {reason}" for reason, n in sorted(unusable.items()))
            raise TooManyRejected(
                f"{where}: {count:,} of {counted(records, 'record is', 'records are')} rejected "
                f"({reasons}), a larger share "
                f"than --max-rejected {self.max_rejected:g}; mend the input, or allow more"
            )
