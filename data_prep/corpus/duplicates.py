"""Exact duplicates in two passes: hash every document, then find those that occur earlier.

The first document in the order of units and documents stays, so the result does not depend on the number of
workers. The hash is 128 bits of BLAKE2b: a collision among 10^9 documents has a probability below 10^-20.
`find` holds one bucket of hashes (of 256, when there are many), and 8 bytes per duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4")])
BUCKETED_ABOVE = 4_000_000  # documents; below, one pass over all hashes is cheaper


def hash128(data: bytes) -> bytes:
    """The 16-byte hash of a text in UTF-8."""
    return hashlib.blake2b(data, digest_size=16).digest()


def write_hashes(path: Path, hashes: bytes | bytearray) -> None:
    """One unit's `hash128`s, joined in the order of its documents, as rows (HASH_DTYPE) sorted by hash."""
    words = np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)
    rows = np.empty(len(words), HASH_DTYPE)
    rows["high"], rows["low"], rows["number"] = words[:, 0], words[:, 1], np.arange(len(words))
    rows[np.argsort(rows["high"], kind="stable")].tofile(path)


def find(files: list[Path], heartbeat: Callable[[], None] = lambda: None) -> Iterator[np.ndarray]:
    """For each unit's file, in order: uint32 [n], ascending, the documents that repeat an earlier one.

    `heartbeat()` is called regularly. Files are closed at once: there may be more than a process may open.
    """
    bounds = _bucket_bounds(files, heartbeat)
    buckets = bounds.shape[1] - 1
    found = []
    for bucket in range(buckets):
        parts = [_rows(path, *bounds[n, bucket : bucket + 2]) for n, path in enumerate(files)]
        unit = np.repeat(np.arange(len(files), dtype=np.uint32), [part.size for part in parts])
        joined = np.concatenate(parts)
        # Stable, of sorted runs in the order of units: equal hashes stay in the order of documents.
        order = np.argsort(joined["high"], kind="stable")
        joined, unit = joined[order], unit[order]
        same = joined["high"][1:] == joined["high"][:-1]
        if (joined["low"][1:][same] != joined["low"][:-1][same]).any():  # half of two hashes is equal
            order = np.lexsort((joined["low"], joined["high"]))
            joined, unit = joined[order], unit[order]
            same = (joined["high"][1:] == joined["high"][:-1]) & (joined["low"][1:] == joined["low"][:-1])
        again = np.flatnonzero(same) + 1
        found.append(np.stack([unit[again], joined["number"][again]]))
        heartbeat()
    unit, number = np.concatenate(found, axis=1)
    order = np.lexsort((number, unit))
    starts = np.searchsorted(unit[order], np.arange(len(files) + 1))
    for n in range(len(files)):
        yield number[order[starts[n] : starts[n + 1]]]


def _bucket_bounds(files: list[Path], heartbeat: Callable[[], None]) -> np.ndarray:
    """int64 [files, buckets + 1]: start of each bucket's rows in each file."""
    sizes = [path.stat().st_size // HASH_DTYPE.itemsize for path in files]
    if sum(sizes) <= BUCKETED_ABOVE:
        return np.array([[0, size] for size in sizes], dtype=np.int64)
    marks = np.arange(1, 256, dtype=np.uint64) << np.uint64(56)
    bounds = np.zeros((len(files), 257), dtype=np.int64)
    for n, (path, size) in enumerate(zip(files, sizes, strict=True)):
        bounds[n, 1:-1] = np.searchsorted(_rows(path, 0, size)["high"], marks)
        bounds[n, -1] = size
        heartbeat()
    return bounds


def _rows(path: Path, start: int, end: int) -> np.ndarray:
    at = int(start) * HASH_DTYPE.itemsize
    return np.fromfile(path, HASH_DTYPE, count=int(end) - int(start), offset=at)
