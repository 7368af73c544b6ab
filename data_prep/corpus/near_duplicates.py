"""Near-duplicates by MinHash-LSH: sign every document, then find those that resemble an earlier one.

The similarity of two documents is the share s of words that an editor left as they were. Then s^2 of the
pairs of neighbouring words survive, and the Jaccard index of the sets of pairs is J = s^2 / (2 - s^2).
Signatures (by rensa, 128 values of 32 bits) estimate J; documents with an equal band are compared by whole
signatures. The first document stays, in the order of units and documents, so the result does not depend on
the number of workers. (Broder 1997; bands: Leskovec et al., Mining of Massive Datasets, 3.4.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_prep.common.extras import import_extra
from data_prep.corpus.words import words_of

VALUES = 128  # of a signature: the standard error of J is at most 0.044
SEED = 42
RECALL = 0.99  # of pairs with the similarity asked for, before their signatures are compared
BATCH_WORDS = 1 << 18
PARTS = 16  # of the documents, sorted one after another
# Signatures twice, for two orders of reading: [VALUES, documents] by band, [documents, VALUES] by document.
BANDS, SIGNATURES, IDS = "bands.bin", "signatures.bin", "ids.txt"
_ODD = np.uint64(0x9E3779B97F4A7C15)


def require() -> str:
    """rensa and its version. Raises `UserError` when it is not installed."""
    import_extra("rensa", "near-duplicates")
    return f"rensa {version('rensa')}"


def jaccard(similarity: float) -> float:
    """Of the sets of word pairs of two documents that have this share of their words in common."""
    return similarity**2 / (2 - similarity**2)


def band_rows(similarity: float) -> int:
    """The longest band, in values, with which `RECALL` of the pairs share at least one of their bands."""
    index = jaccard(similarity)
    return max(r for r in range(1, VALUES + 1) if r == 1 or 1 - (1 - index**r) ** (VALUES // r) >= RECALL)


class Signer:
    """Signs documents one by one, in batches, and keeps their ids."""

    def __init__(self) -> None:
        self._rensa = import_extra("rensa", "near-duplicates").RMinHash
        self._words: list[list[str]] = []
        self._waiting = 0
        self._made: list[np.ndarray] = []
        self._ids: list[str] = []

    def add(self, id: str, text: str) -> None:
        self._ids.append(json.dumps(id))
        self._words.append(words_of(text))
        self._waiting += len(self._words[-1])
        if self._waiting >= BATCH_WORDS:
            self._sign()

    def write(self, folder: Path) -> None:
        """Write the signatures, uint32 in two orders, and the ids."""
        self._sign()
        write_signatures(folder, np.concatenate(self._made))
        (folder / IDS).write_text("\n".join(self._ids), encoding="ascii")

    def _sign(self) -> None:
        hashed = self._rensa.hash_token_sets(self._words) if self._words else []
        pairs = [_pairs(np.asarray(hashes, np.uint64)) for hashes in hashed]
        starts = np.cumsum([0, *map(len, pairs)], dtype=np.uint64)
        flat = np.concatenate([np.empty(0, np.uint64), *pairs])
        rows = (
            self._rensa.digest_matrix_from_flat_token_hashes(flat, starts, VALUES, SEED).to_rows()
            if pairs
            else []
        )
        self._made.append(np.array(rows, np.uint32).reshape(-1, VALUES))
        self._words, self._waiting = [], 0


def write_signatures(folder: Path, signatures: np.ndarray) -> None:
    """Write uint32 [documents, VALUES] in two orders."""
    signatures.astype("<u4").tofile(folder / SIGNATURES)
    signatures.T.astype("<u4").tofile(folder / BANDS)


def _pairs(words: np.ndarray) -> np.ndarray:
    """uint64 hashes of neighbouring words; of the word itself when there is one."""
    if len(words) < 2:
        return words
    mixed = words[:-1] * _ODD
    return (mixed ^ (mixed >> np.uint64(31))) + words[1:]


def find(
    folders: list[Path], similarity: float, heartbeat: Callable[[], None] = lambda: None
) -> Iterator[dict[int, str]]:
    """For each unit's folder, in order: the numbers of documents that resemble an earlier one, and its id.

    The earlier document is one that stays. Holds some 30 bytes per document, and the ids of the earlier ones.
    """
    signatures = _Signatures(folders)
    first, starts = _first_alike(signatures, similarity, heartbeat), signatures.starts
    later = np.flatnonzero(first != np.arange(len(first)))
    first = first[later]
    wanted = np.unique(first)
    ids: list[str] = []  # of `wanted`
    for folder, (low, high), start in zip(folders, _ranges(wanted, starts), starts, strict=False):
        if low < high:
            lines = (folder / IDS).read_text(encoding="ascii").split("\n")
            ids += (lines[n] for n in (wanted[low:high] - start).tolist())
            heartbeat()
    for (low, high), start in zip(_ranges(later, starts), starts, strict=False):
        of = np.searchsorted(wanted, first[low:high]).tolist()
        numbers = (later[low:high] - start).tolist()
        yield {n: json.loads(ids[m]) for n, m in zip(numbers, of, strict=True)}


def _ranges(documents: np.ndarray, starts: np.ndarray) -> list[tuple[int, int]]:
    """For each unit: the range of `documents`, ascending, that is its own."""
    bounds = np.searchsorted(documents, starts).tolist()
    return list(zip(bounds, bounds[1:], strict=False))


def _first_alike(signatures: _Signatures, similarity: float, heartbeat: Callable[[], None]) -> np.ndarray:
    """int64 [documents]: the earliest document, among those that stay, that each one resembles; or itself."""
    least, rows = jaccard(similarity), band_rows(similarity)
    first = np.arange(signatures.total, dtype=np.int64)
    for band in range(VALUES // rows if signatures.total else 0):
        keys = signatures.band(band * rows, rows)
        # Parts of equal last bytes bound the memory of sorting. (A copy: a strided view is slow to scan.)
        parts = keys.astype(np.uint8) % PARTS
        for part in range(PARTS):
            documents = np.flatnonzero(parts == part)
            if len(documents) > 1:
                _compare(signatures, documents, keys[documents], first, least)
            heartbeat()
    _resolve(signatures, first, least)
    return first


def _compare(
    signatures: _Signatures, documents: np.ndarray, keys: np.ndarray, first: np.ndarray, least: float
) -> None:
    """Compare documents, ascending, that have equal keys; lowers `first` where they are alike."""
    order = np.argsort(keys)  # faster than a stable sort; most keys occur once
    same = np.diff(keys[order]) == 0
    order = order[np.append(same, False) | np.append(False, same)]
    order = order[np.lexsort((order, keys[order]))]
    documents, keys = documents[order], keys[order]
    new = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    group = np.repeat(documents[new], np.diff(np.append(new, len(keys))))  # the first with this key
    neighbours = documents[:-1][keys[1:] == keys[:-1]], documents[1:][keys[1:] == keys[:-1]]
    for earlier, later in ((group, documents), neighbours):
        closer = earlier < first[later]
        earlier, later = earlier[closer], later[closer]
        alike = signatures.alike(earlier, later, least)
        np.minimum.at(first, later[alike], earlier[alike])


def _resolve(signatures: _Signatures, first: np.ndarray, least: float) -> None:
    """Make every dropped document name one that stays, or keep it."""
    later_ones = np.flatnonzero(first != np.arange(len(first)))
    moved = later_ones[first[first[later_ones]] != first[later_ones]]
    expected = first[first[moved]]
    alike = signatures.alike(expected, moved, least)
    # One that stays does so to the end.
    for number, later in enumerate(moved):
        earlier = first[first[later]]
        if earlier != first[later]:
            same = alike[number]
            if earlier != expected[number]:
                same = signatures.alike(np.array([earlier]), np.array([later]), least)[0]
            first[later] = earlier if same else later


class _Signatures:
    """The signatures of all units' documents. Files are opened one at a time."""

    def __init__(self, folders: list[Path]):
        self.folders = folders
        counts = [(folder / SIGNATURES).stat().st_size // (4 * VALUES) for folder in folders]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.total = int(self.starts[-1])

    def band(self, start: int, rows: int) -> np.ndarray:
        """uint64 [documents]: a key of `rows` values of each signature."""
        keys = np.zeros(self.total, np.uint64)
        for folder, low, high in zip(self.folders, self.starts, self.starts[1:], strict=False):
            part, at = keys[low:high], int(4 * start * (high - low))
            values_of = np.fromfile(folder / BANDS, "<u4", count=rows * len(part), offset=at)
            for values in values_of.reshape(rows, -1):
                part ^= values
                part *= _ODD
                part ^= part >> np.uint64(29)
        return keys

    def alike(self, earlier: np.ndarray, later: np.ndarray, least: float) -> np.ndarray:
        """bool [pairs]: whether the signatures agree in at least the share `least` of their values."""
        result = np.empty(len(earlier), bool)
        order = np.argsort(earlier, kind="stable")  # so that a batch is from few files
        for start in range(0, len(earlier), BATCH_WORDS // VALUES):
            part = order[start : start + BATCH_WORDS // VALUES]
            one, two = self._rows(earlier[part]), self._rows(later[part])
            # A document without words has the same values as any other such document.
            result[part] = ((one == two).mean(axis=1) >= least) & ~(one == one[:, :1]).all(axis=1)
        return result

    def _rows(self, documents: np.ndarray) -> np.ndarray:
        """uint32 [n, VALUES]: the signatures of some documents."""
        found = np.empty((len(documents), VALUES), np.uint32)
        order = np.argsort(documents, kind="stable")
        units, begins = np.unique(
            np.searchsorted(self.starts, documents[order], side="right") - 1, return_index=True
        )
        for unit, begin, end in zip(units, begins, [*begins[1:], len(order)], strict=True):
            chosen = order[begin:end]
            stored = np.memmap(self.folders[unit] / SIGNATURES, "<u4", "r").reshape(-1, VALUES)
            found[chosen] = stored[documents[chosen] - self.starts[unit]]
        return found
