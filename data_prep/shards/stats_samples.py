"""Sample sentences of a shard set, by language and length; the same texts give the same samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from data_prep.shards.stats import Batch

BAND_STARTS = (1, 3, 9, 17, 33)  # samples are picked per band of lengths; later bands double
SAMPLES = 5  # sentences shown per band
CANDIDATES = 20  # kept per band, since sentences of several documents may have the same text


def bands(limit: int) -> list[tuple[int, int]]:
    """[first, last] lengths of the bands: 1–2, 3–8, 9–16, 17–32, 33–64, … below the limit, then the limit."""
    starts = list(BAND_STARTS)
    while starts[-1] < limit:
        starts.append(2 * starts[-1] - 1)
    starts = [*(start for start in starts if start < limit), limit]
    return [*zip(starts, [start - 1 for start in starts[1:]], strict=False), (limit, limit)]


class Samples:
    """For every language and band of lengths, the sentences with the lowest hash of (text, place in it).

    So the choice depends on the texts alone, not on their order, and needs no second reading.
    """

    def __init__(self, limit: int):
        self.bands = bands(limit)
        self._band_of = np.zeros(limit + 1, dtype=np.int64)
        for band, (first, last) in enumerate(self.bands):
            self._band_of[first : last + 1] = band
        # (language, band) → [(hash, shard, document, place)], ascending
        self._kept: dict[tuple[str, int], list[tuple[int, int, int, int]]] = {}

    def add(self, shard: int, batch: Batch) -> None:
        fresh = np.zeros(batch.sizes.size, dtype=bool)
        fresh[np.unique(batch.hashes, return_index=True)[1]] = True  # copies would give the same again
        documents = np.repeat(np.arange(batch.sizes.size), batch.sizes)
        places = batch.places()
        hashes = _mixed(batch.hashes[documents], places)
        languages = sorted({language for language, _ in batch.keys})
        numbers = np.array([languages.index(language) for language, _ in batch.keys], dtype=np.int64)
        cells = numbers[batch.codes][documents] * len(self.bands) + self._band_of[batch.lengths]
        (chosen,) = np.nonzero(fresh[documents])
        for cell in np.unique(cells[chosen]).tolist():
            mine = chosen[cells[chosen] == cell]
            if mine.size > CANDIDATES:
                mine = mine[np.argpartition(hashes[mine], CANDIDATES)[:CANDIDATES]]
            rows = (documents[mine] + batch.first).tolist()
            found = zip(hashes[mine].tolist(), rows, places[mine].tolist(), strict=True)
            key = languages[cell // len(self.bands)], cell % len(self.bands)
            known = {entry[0]: entry for entry in self._kept.get(key, [])}
            for value, document, place in found:
                known.setdefault(value, (value, shard, document, place))
            self._kept[key] = sorted(known.values())[:CANDIDATES]

    def decoded(self, shards: ShardSet, tokenizer: Tokenizer) -> dict[str, list[dict]]:
        """Language → bands with sentences: `from`, `to` (tokens), `sentences` (`tokens`, `text`, `id`)."""
        result: dict[str, list[dict]] = {}
        for language, band in sorted(self._kept):
            texts: dict[str, dict] = {}
            for _, shard, number, place in self._kept[language, band]:
                if len(texts) == SAMPLES:
                    break
                document = shards.shard(shard).document(number)
                start = int(document.sentence_lengths[:place].sum(dtype=np.int64))
                tokens = document.tokens[start : start + int(document.sentence_lengths[place])]
                text = tokenizer.decode(tokens)
                texts.setdefault(text, {"tokens": tokens.size, "text": text, "id": document.id})
            first, last = self.bands[band]
            entry = {"from": first, "to": last, "sentences": list(texts.values())}
            result.setdefault(language, []).append(entry)
        return result


def _mixed(seeds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """uint64 [S]: every bit depends on all bits of both (products wrap around)."""
    mixed = seeds + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
    for shift in (32, 29):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(0xDABA0B6EB09322E3)
    return mixed ^ (mixed >> np.uint64(32))
