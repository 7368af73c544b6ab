"""What a shard set holds: counts and distributions, padding, duplicates, rejects, sample sentences.

`stats` gives one plain dictionary, `stats_text` its short form for a terminal, `stats_page.py` an HTML page.

All figures are exact, over every document. Work goes by some groups of a shard at a time, on whole arrays;
memory is their sentences, the counts, and 8 bytes a document to find duplicates.

Padding is what a batch computes beyond real tokens, as a share of all it computes. It is counted, in stored
order, for four ways of batching:

- `tensor_64x64`: one 64 × 64 tensor per document, as the published system makes them: sentences after the
  64th and tokens after the 64th of a sentence are dropped, the rest is filled up.
- `batch`: 64 sentences in a row, each filled up to the longest of them.
- `sorted_batch`: the same, after sorting pools of 100 such batches by length.
- `packed`: documents cut at sentence ends into windows of at most 1,024 tokens (greedy), each window put
  into the fullest of 64 open bins that has room for it (best fit); when none has, the fullest bin is closed
  and a new one opened. What closed bins lack of their budget is padding, the bins left open at the end
  included: in a small set those weigh most. This is how the trainer fills its bins, but for its shuffling.
"""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.page import render
from data_prep.shards.layout import QUARANTINE
from data_prep.shards.reader import Shard, ShardSet
from data_prep.shards.stats_samples import Samples
from data_prep.text.tokenizer import Tokenizer

SIDE = 64  # sentences a document and tokens a sentence in the published tensors; sentences in a batch
POOL = 100  # batches sorted together
BATCH_GROUPS = 16  # read at once: at most about 8 MB of a shard
OPEN_BINS = 64
WINDOW_TOKENS, BIN_TOKENS = 1024, 8192
MOST_COPIED = 5
REJECTED_FILES = 20
SNIPPET = 100  # characters
HISTOGRAM_STEP = 4  # tokens per line of the histogram


def stats(
    folder: str | Path,
    bin_tokens: int = BIN_TOKENS,
    window_tokens: int = WINDOW_TOKENS,
) -> dict:
    """The figures of the shard set in `folder`, ready for JSON.

    Args:
        bin_tokens, window_tokens: what `packed` padding is counted for.
    Returns: for all documents, and the same under `languages` and `sources` (by name) and in `groups` (by
        language and source): counts; `tokens_per_sentence`, `sentences_per_document`,
        `tokens_per_document` (mean, p5, median, p95, p99, max); `share_at_limit` (sentences of `max_tokens`:
        nearly all were split), `share_one_token`; `histogram` (sentences, item n = length n);
        `document_histogram` (rows [first, last, documents] of sentences), `tensor_64x64`. For all also
        `padding`, `duplicates`, `samples` and what the manifest says of the input.
    Raises: UserError when the folder is no shard set, holds no document, or has a missing or damaged file.
    """
    shards = ShardSet.open(folder)
    limit = shards.settings.max_tokens
    tallies: dict[tuple[str, str], _Tally] = {}
    padding = _Padding(limit, bin_tokens, window_tokens)
    samples = Samples(limit)
    hashes = np.empty(shards.manifest["totals"]["documents"], dtype=np.uint64)
    done = 0
    for i in range(len(shards)):
        for batch in _batches_of(shards.shard(i), limit, hashes.size - done):
            hashes[done : done + batch.sizes.size] = batch.hashes
            done += batch.sizes.size
            kept = batch.kept_in_tensor()
            lengths_by_code = batch.lengths_by_code()
            for code, key in enumerate(batch.keys):
                mine = batch.codes == code
                tally = tallies.setdefault(key, _Tally(limit))
                tally.add(batch, mine, lengths_by_code[code], int(kept[mine].sum()))
            padding.add(batch)
            samples.add(i, batch)
    if done != hashes.size:
        raise UserError(f"{shards.folder}: the manifest counts other documents; run `data-prep verify`")
    if not done:
        raise UserError(f"{shards.folder} holds no document to count")
    everything = _merged(tallies.values(), limit)
    manifest, tokenizer = shards.manifest, shards.tokenizer()
    return {
        "folder": str(folder),
        "shards": len(shards),
        "inputs": len(manifest["inputs"]),
        "fingerprint": shards.fingerprint,
        "settings": manifest["settings"],
        "tokenizer": {key: manifest["tokenizer"][key] for key in ("kind", "vocab_size", "fingerprint")},
        **everything.summary(),
        "languages": _by_name(tallies, 0, limit),
        "sources": _by_name(tallies, 1, limit),
        "groups": [
            {"language": key[0], "source": key[1], **tallies[key].summary()} for key in sorted(tallies)
        ],
        "padding": padding.summary(everything),
        "duplicates": _duplicates(shards, hashes, tokenizer),
        "rejected": manifest["rejected"],
        "rejected_files": _rejected_files(shards.folder / QUARANTINE),
        **{key: manifest[key] for key in ("repaired", "damaged", "not_read")},
        "marked": manifest.get("marked", {}),
        "samples": samples.decoded(shards, tokenizer),
    }


# Some groups as arrays ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Some groups of a shard: D documents, S sentences.

    first: place of the first document in the shard; lengths: int64 [S] tokens; sizes: int64 [D] sentences;
    tokens, bytes: int64 [D]; hashes: uint64 [D] of the texts; codes: int64 [D], places in `keys`, the
    (language, source) pairs of these documents.
    """

    first: int
    lengths: np.ndarray
    sizes: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    hashes: np.ndarray
    codes: np.ndarray
    keys: list[tuple[str, str]]

    @property
    def starts(self) -> np.ndarray:
        """int64 [D], the first sentence of each document."""
        return np.cumsum(self.sizes) - self.sizes

    def places(self) -> np.ndarray:
        """int64 [S], the place of each sentence in its document, from 0."""
        return np.arange(self.lengths.size) - np.repeat(self.starts, self.sizes)

    def kept_in_tensor(self) -> np.ndarray:
        """int64 [D], tokens of each document that a 64 × 64 tensor has room for."""
        kept = np.where(self.places() < SIDE, np.minimum(self.lengths, SIDE), 0)
        ends = np.concatenate([[0], np.cumsum(kept)])
        return ends[self.starts + self.sizes] - ends[self.starts]

    def lengths_by_code(self) -> np.ndarray:
        """int64 [keys, longest + 1], sentences by length."""
        width = int(self.lengths.max(initial=0)) + 1
        flat = np.repeat(self.codes, self.sizes) * width + self.lengths
        return np.bincount(flat, minlength=len(self.keys) * width).reshape(len(self.keys), width)


def _batches_of(shard: Shard, limit: int, expected: int) -> Iterator[Batch]:
    """A whole shard in order. Raises `UserError` where it disagrees with its index or has more documents than
    `expected`.
    """
    index = shard.index
    groups = shard.groups
    whole = index.size <= expected and int(index["group"].max(initial=0)) < max(groups, 1)
    for begin in range(0, groups, BATCH_GROUPS):
        end = min(begin + BATCH_GROUPS, groups)
        first, last = np.searchsorted(index["group"], [begin, end]).tolist()
        rows = index[first:last]
        keys: dict[tuple[str, str], int] = {}
        codes: list[int] = []
        lengths = [np.empty(0, np.int64)]
        for group in map(shard.group, range(begin, end)):
            lengths.append(group.sentence_lengths.astype(np.int64))
            codes += [keys.setdefault((fact["language"], fact["source"]), len(keys)) for fact in group.facts]
        all_lengths = np.concatenate(lengths)
        sizes, tokens, size = (rows[name].astype(np.int64) for name in ("sentences", "tokens", "bytes"))
        whole = whole and len(codes) == rows.size and all_lengths.size == sizes.sum()
        if not whole or all_lengths.sum() != tokens.sum() or all_lengths.max(initial=0) > limit:
            raise UserError(f"{shard.path} does not agree with its index or manifest; run `data-prep verify`")
        hashes, places = rows["text_hash"], np.array(codes, dtype=np.int64)
        yield Batch(first, all_lengths, sizes, tokens, size, hashes, places, list(keys))


# Counts ------------------------------------------------------------------------------------------------


class _Tally:
    """Counts of one kind of documents, as histograms: memory does not grow with the corpus."""

    def __init__(self, limit: int):
        self.limit = limit
        self.documents = self.tokens = self.bytes = self.kept = 0
        self.lengths = np.zeros(limit + 1, dtype=np.int64)
        self.sizes: Counter[int] = Counter()  # documents by number of sentences
        self.document_tokens: Counter[int] = Counter()

    def add(self, batch: Batch, mine: np.ndarray, lengths: np.ndarray, kept: int) -> None:
        """Documents of `batch` (`mine`: bool [D]), whose sentences by length are `lengths`."""
        self.documents += int(mine.sum())
        self.tokens += int(batch.tokens[mine].sum())
        self.bytes += int(batch.bytes[mine].sum())
        self.kept += kept
        self.lengths[: lengths.size] += lengths
        for counter, values in ((self.sizes, batch.sizes[mine]), (self.document_tokens, batch.tokens[mine])):
            found, counts = np.unique(values, return_counts=True)
            counter.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def merge(self, other: _Tally) -> None:
        for name in ("documents", "tokens", "bytes", "kept", "lengths"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.sizes.update(other.sizes)
        self.document_tokens.update(other.document_tokens)

    def summary(self) -> dict:
        sentences = int(self.lengths.sum())
        sizes, documents = _sorted(self.sizes)
        return {
            "documents": self.documents,
            "sentences": sentences,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": round(self.bytes / self.tokens, 4),
            "tokens_per_sentence": _distribution(np.arange(self.limit + 1), self.lengths),
            "sentences_per_document": _distribution(sizes, documents),
            "tokens_per_document": _distribution(*_sorted(self.document_tokens)),
            "share_at_limit": _share(int(self.lengths[self.limit]), sentences),
            "share_one_token": _share(int(self.lengths[1]), sentences),
            "histogram": self.lengths.tolist(),
            "document_histogram": _doubling(sizes, documents),
            "tensor_64x64": {
                "padding": _share(self.documents * SIDE * SIDE - self.kept, self.documents * SIDE * SIDE),
                "dropped": _share(self.tokens - self.kept, self.tokens),
            },
        }


def _merged(tallies: Iterable[_Tally], limit: int) -> _Tally:
    total = _Tally(limit)
    for tally in tallies:
        total.merge(tally)
    return total


def _by_name(tallies: dict[tuple[str, str], _Tally], place: int, limit: int) -> dict[str, dict]:
    """Summaries by language (`place` 0 of the keys) or by source (1)."""
    names = sorted({key[place] for key in tallies})
    parts = {name: [tally for key, tally in tallies.items() if key[place] == name] for name in names}
    return {name: _merged(parts[name], limit).summary() for name in names}


def _sorted(counter: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    """(values, counts), ascending."""
    pairs = np.array(sorted(counter.items()), dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6)


def _distribution(values: np.ndarray, counts: np.ndarray) -> dict:
    total = int(counts.sum())
    up_to = np.cumsum(counts)

    def quantile(percent: int) -> int:
        """The smallest value that at least `percent` of all do not exceed."""
        return int(values[np.searchsorted(up_to, -(-percent * total // 100))])

    return {
        "mean": round(float((values * counts).sum() / total), 4),
        "p5": quantile(5),
        "median": quantile(50),
        "p95": quantile(95),
        "p99": quantile(99),
        "max": int(values[np.flatnonzero(counts)[-1]]),
    }


def _doubling(values: np.ndarray, counts: np.ndarray) -> list[list[int]]:
    """Rows [first, last, count] for 1, 2–3, 4–7, … up to the largest value."""
    rows = []
    first = 1
    while first <= values[-1]:
        inside = (values >= first) & (values < 2 * first)
        rows.append([first, 2 * first - 1, int(counts[inside].sum())])
        first *= 2
    return rows


# Padding -----------------------------------------------------------------------------------------------


class _Padding:
    """Counts the cells that each way of batching computes; the module's docstring describes them."""

    def __init__(self, limit: int, bin_tokens: int, window_tokens: int):
        self.window = max(window_tokens, limit)  # the longest sentence must fit
        self.budget = max(bin_tokens, self.window)
        self.batch_cells = self.sorted_cells = self.windows = self.bins = 0
        self._waiting = np.empty(0, dtype=np.int64)  # lengths of sentences that fill no pool yet
        self._room: list[int] = []  # of the open bins, ascending

    def add(self, batch: Batch) -> None:
        lengths = np.concatenate([self._waiting, batch.lengths])
        whole = lengths.size - lengths.size % (SIDE * POOL)
        self._waiting = lengths[whole:]
        self._count(lengths[:whole])
        for tokens in _windows(batch, self.window):
            self._pack(tokens)

    def _count(self, lengths: np.ndarray) -> None:
        """Whole pools."""
        self.batch_cells += SIDE * int(lengths.reshape(-1, SIDE).max(axis=1, initial=0).sum())
        pools = np.sort(lengths.astype(np.uint16).reshape(-1, SIDE * POOL), axis=1)
        self.sorted_cells += SIDE * int(pools[:, SIDE - 1 :: SIDE].sum(dtype=np.int64))

    def _pack(self, tokens: int) -> None:
        self.windows += 1
        place = bisect_left(self._room, tokens)
        if place < len(self._room):
            left = self._room.pop(place) - tokens
        else:
            if len(self._room) == OPEN_BINS:
                self._room.pop(0)
            self.bins += 1
            left = self.budget - tokens
        if left:
            insort(self._room, left)

    def summary(self, everything: _Tally) -> dict:
        tokens = everything.tokens
        batch_cells = self.batch_cells + _filled_up(self._waiting)
        sorted_cells = self.sorted_cells + _filled_up(np.sort(self._waiting))
        tensor_cells = everything.documents * SIDE * SIDE

        def way(cells: int, real: int) -> dict:
            return {"padding": _share(cells - real, cells), "cells_per_token": round(cells / real, 4)}

        return {
            "tensor_64x64": way(tensor_cells, everything.kept)
            | {"dropped": _share(tokens - everything.kept, tokens)},
            "batch": way(batch_cells, tokens) | {"sentences": SIDE},
            "sorted_batch": way(sorted_cells, tokens) | {"sentences": SIDE, "batches_sorted": POOL},
            "packed": way(self.bins * self.budget, tokens)
            | {"bin_tokens": self.budget, "window_tokens": self.window}
            | {"windows": self.windows, "bins": self.bins},
        }


def _filled_up(lengths: np.ndarray) -> int:
    """Cells of batches in a row, each filled up to its longest sentence."""
    batches = (lengths[start : start + SIDE] for start in range(0, lengths.size, SIDE))
    return sum(len(batch) * int(batch.max()) for batch in batches)


def _windows(batch: Batch, window_tokens: int) -> Iterator[int]:
    """Tokens of every window, in stored order."""
    ends = np.cumsum(batch.lengths)
    begins = np.cumsum(batch.tokens) - batch.tokens
    for tokens, begin, sentence, size in zip(
        batch.tokens.tolist(), begins.tolist(), batch.starts.tolist(), batch.sizes.tolist(), strict=True
    ):
        if tokens <= window_tokens:
            yield tokens
            continue
        mine = (ends[sentence : sentence + size] - begin).tolist()
        done = 0
        while done < tokens:
            end = mine[bisect_left(mine, done + window_tokens + 1) - 1]
            yield end - done
            done = end


# Duplicates and rejects --------------------------------------------------------------------------------


def _duplicates(shards: ShardSet, hashes: np.ndarray, tokenizer: Tokenizer) -> dict:
    """Documents whose whole text is in the set already. Sorts `hashes` in place.

    Texts are told apart by 64-bit hashes: among 500 million documents the chance of even one false pair is
    below 1 %. Memory: the hashes, one byte a document, and what the copies need.
    """
    hashes.sort()
    copied, counts = np.unique(hashes[1:][hashes[1:] == hashes[:-1]], return_counts=True)
    copies = int(counts.sum())
    tokens = np.zeros(copied.size, dtype=np.int64)
    wanted = np.lexsort((copied, -counts))[:MOST_COPIED].tolist()
    first: dict[int, tuple[int, int]] = {}
    for i in range(len(shards) if copied.size else 0):
        index = shards.shard(i).index
        mine = index["text_hash"]
        places = np.minimum(np.searchsorted(copied, mine), copied.size - 1)
        (rows,) = np.nonzero(copied[places] == mine)
        tokens[places[rows]] = index["tokens"][rows]
        for place in wanted:
            if place not in first and (found := rows[places[rows] == place]).size:
                first[place] = i, int(found[0])
    most = []
    for place in wanted:
        i, n = first[place]
        document = shards.shard(i).document(n)
        # A token adds at least a part of a byte: four tokens a character always reach far enough.
        start = tokenizer.decode(document.tokens[: 4 * SNIPPET])[:SNIPPET]
        facts = {"id": document.id, "language": document.language, "source": document.source}
        most.append({"documents": int(counts[place]) + 1, **facts, "start": start})
    return {
        "texts": int(copied.size),
        "documents": copies,
        "share": _share(copies, hashes.size),
        "tokens": int((tokens * counts).sum()),
        "most_copied": most,
    }


def _rejected_files(quarantine: Path) -> list[dict]:
    """The files with the most rejected records: `file`, `records`, `reasons`. Memory: one row per file."""
    files: dict[str, Counter[str]] = {}
    try:
        with open(quarantine, encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                files.setdefault(record["file"], Counter())[record["reason"]] += 1
    except FileNotFoundError:
        raise UserError(f"{quarantine} is missing; restore it or make the shards again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{quarantine} is damaged; restore it or make the shards again") from error
    worst = sorted(files, key=lambda name: (-files[name].total(), name))[:REJECTED_FILES]
    return [
        {"file": name, "records": files[name].total(), "reasons": dict(sorted(files[name].items()))}
        for name in worst
    ]


# For people --------------------------------------------------------------------------------------------


def stats_text(result: dict) -> str:
    """`stats` for a terminal."""
    groups = [("all", result), *result["languages"].items()]
    groups += [(f"{group['language']} {group['source']}", group) for group in result["groups"]]
    counts = result["histogram"]
    last = max(length for length, count in enumerate(counts) if count)
    steps = [(n, sum(counts[n : n + HISTOGRAM_STEP])) for n in range(1, last + 1, HISTOGRAM_STEP)]
    values = {"all": result, "groups": groups, "steps": steps, "step": HISTOGRAM_STEP}
    values["longest"] = max(count for _, count in steps)
    return render(Path(__file__).with_name("stats.txt.jinja"), values, {"f": format, "percent": percent})


def percent(share: float) -> str:
    """A share as `12.3 %`, a small one as `0.012 %`."""
    if share == 0:
        return "0 %"
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:#.2g} %"
