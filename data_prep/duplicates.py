"""Exact duplicates in two passes: hash every document of every unit, then find those that came before.

In: per unit, the hashes of its documents in order. Out: per unit, the numbers of the documents that repeat an
earlier one; the first in the order of units and documents stays. So the answer is the same at any number of
workers. Called by `sharding.py`.

The hash is 128 bits of BLAKE2b: among 10^9 documents two different ones meet with a probability below
10^-20. Memory of `find`: one bucket of hashes at a time (of 256 by their first byte, when there are many),
and 4 bytes for every duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4")])
BUCKETED_ABOVE = 4_000_000  # documents; below, one pass over all hashes is cheaper


def hash128(data: bytes) -> bytes:
    """16 bytes that stand for a text in UTF-8."""
    return hashlib.blake2b(data, digest_size=16).digest()


def write_hashes(path: Path, hashes: list[bytes]) -> None:
    """One unit's `hash128`s, in the order of its documents, as rows sorted by hash."""
    words = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2)
    rows = np.empty(len(words), HASH_DTYPE)
    rows["high"], rows["low"], rows["number"] = words[:, 0], words[:, 1], np.arange(len(words))
    np.save(path, rows[np.argsort(rows["high"], kind="stable")])


def find(files: list[Path]) -> Iterator[np.ndarray]:
    """For each unit's file, in order: uint32 [n], ascending, the documents that repeat an earlier one."""
    units = [np.load(path, mmap_mode="r") for path in files]
    bits = 8 if sum(rows.size for rows in units) > BUCKETED_ABOVE else 0
    found: list[list[np.ndarray]] = [[] for _ in units]
    for bucket in range(1 << bits):
        low, high = bucket << (64 - bits), ((bucket + 1) << (64 - bits)) - 1
        parts = []
        for rows in units:
            first = np.searchsorted(rows["high"], np.uint64(low), side="left")
            parts.append(np.array(rows[first : np.searchsorted(rows["high"], np.uint64(high), side="right")]))
        unit = np.repeat(np.arange(len(units), dtype=np.uint32), [part.size for part in parts])
        joined = np.concatenate(parts)
        order = np.lexsort((joined["number"], unit, joined["low"], joined["high"]))
        joined, unit = joined[order], unit[order]
        again = np.flatnonzero(
            (joined["high"][1:] == joined["high"][:-1]) & (joined["low"][1:] == joined["low"][:-1])
        )
        for n in np.unique(unit[again + 1]):
            found[n].append(joined["number"][again + 1][unit[again + 1] == n])
    for numbers in found:
        yield np.sort(np.concatenate(numbers)) if numbers else np.empty(0, "<u4")
