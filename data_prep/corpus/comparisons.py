"""Finds documents that repeat or resemble an earlier one, from fingerprints of all units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path

from data_prep.corpus import duplicates

HASHES = "hashes.bin"


class Fingerprints:
    """Hashes and, where near-duplicates are wanted, signatures of documents, in order."""

    def __init__(self, near: bool):
        self._hashes = bytearray()
        self._signer = None
        if near:
            from data_prep.corpus.near_duplicates import Signer

            self._signer = Signer()

    def add(self, id: str, text: str) -> None:
        self._hashes += duplicates.hash128(text.encode("utf-8"))
        if self._signer:
            self._signer.add(id, text)

    def write(self, folder: Path) -> None:
        """Write the files that `find_earlier` reads."""
        duplicates.write_hashes(folder / HASHES, self._hashes)
        if self._signer:
            self._signer.write(folder)


def find_earlier(
    units: list[Path], seen: list[Path], exact: bool, near: float | None, heartbeat: Callable[[], None]
) -> Iterator[dict[int, str | None]]:
    """For each unit, in order: the documents that are dropped for an earlier one, by number. The value is the
    earlier one's id, or None where the text is the same.

    Args:
        units, seen: folders of `Fingerprints`; those of `seen` count as earlier, and are not dropped.
        exact: find documents with the same text.
        near: share of words from which documents count as the same.
    """
    alike: Iterator[dict[int, str]] = repeat({})
    if near is not None:
        from data_prep.corpus import near_duplicates

        alike = islice(near_duplicates.find(seen + units, near, heartbeat), len(seen), None)
    if not exact:
        yield from (dict(found) for found in islice(alike, len(units)))
        return
    same = duplicates.find([folder / HASHES for folder in units], heartbeat)
    for found, numbers in zip(alike, same, strict=False):
        yield found | dict.fromkeys(numbers.tolist())
