"""Looking at finished shards: `verify` trusts nothing, `stats` counts, `show` prints.

In: a shard folder. Out: plain dictionaries (the `--json` results) and text for people. Called by
`data_prep/cli.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.shards import (
    LENGTH_DTYPE,
    MANIFEST,
    MEMBER_KINDS,
    QUARANTINE,
    TOKENIZER_FOLDER,
    Shard,
    ShardSet,
    file_sha256,
    index_totals,
    tar_members,
)

HISTOGRAM_WIDTH = 40  # characters
HISTOGRAM_STEP = 4  # tokens per line of the histogram

REMEDY = "restore it or make the shards again"


def verify(folder: str | Path) -> dict:
    """Check every file of a shard set: names, sha256, structure, and index against tar.

    Returns the counts of what was checked. Raises `UserError` naming the first file that is wrong.
    """
    shards = ShardSet.open(folder)
    folder = shards.folder
    _check_names(shards)
    if file_sha256(folder / QUARANTINE) != shards.manifest["quarantine_sha256"]:
        raise UserError(f"{folder / QUARANTINE} has changed since it was written; {REMEDY}")
    for name, sha256 in shards.manifest["tokenizer"]["files"].items():
        if file_sha256(folder / TOKENIZER_FOLDER / name) != sha256:
            raise UserError(f"{folder / TOKENIZER_FOLDER / name} has changed since it was written; {REMEDY}")
    byte_lengths = shards.tokenizer().byte_lengths
    totals = dict.fromkeys(shards.manifest["totals"], 0)
    for i, entry in enumerate(shards.manifest["shards"]):
        tar, index = folder / entry["file"], folder / entry["index"]
        members = tar_members(
            tar
        )  # first, since it can tell a file that was cut short from one that was altered
        for path, sha256 in ((tar, entry["sha256"]), (index, entry["index_sha256"])):
            if file_sha256(path) != sha256:
                raise UserError(f"{path} has changed since it was written (its sha256 differs); {REMEDY}")
        shard = shards.shard(i)
        _check_shard(shard, members, byte_lengths, shards.settings.max_tokens)
        for name, count in index_totals(shard.index).items():
            if count != entry[name]:
                raise UserError(f"{index} counts {count} {name}, the manifest {entry[name]}; {REMEDY}")
            totals[name] += count
    if totals != shards.manifest["totals"]:
        raise UserError(f"{folder / MANIFEST}: its totals are not the sums of its shards")
    return {"ok": True, "shards": len(shards), **totals, "fingerprint": shards.fingerprint}


def _check_names(shards: ShardSet) -> None:
    """Every file of the manifest is there, and no other."""
    expected = {MANIFEST, QUARANTINE}
    for entry in shards.manifest["shards"]:
        expected |= {entry["file"], entry["index"]}
    expected |= {f"{TOKENIZER_FOLDER}/{name}" for name in shards.manifest["tokenizer"]["files"]}
    found = {p.relative_to(shards.folder).as_posix() for p in shards.folder.rglob("*") if not p.is_dir()}
    for name in sorted(expected - found):
        raise UserError(f"{shards.folder / name} is missing; {REMEDY}")
    for name in sorted(found - expected):
        raise UserError(f"{shards.folder / name} does not belong to this shard set; move it away")


def _check_shard(shard: Shard, members: list, byte_lengths: np.ndarray, max_tokens: int) -> None:
    """The tar's arrays say what the index says, group by group."""

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise UserError(f"{shard.path}: {problem}; {REMEDY}")

    groups = len(members) // len(MEMBER_KINDS)
    index = shard.index
    require(groups == (int(index["group"].max()) + 1 if index.size else 0), "index and tar differ in groups")
    with open(shard.path, "rb") as stream:
        for group in range(groups):
            parts = []
            for member in members[group * len(MEMBER_KINDS) : (group + 1) * len(MEMBER_KINDS)]:
                stream.seek(member.data_at)
                parts.append(stream.read(member.size))
            try:
                tokens, lengths, sizes = (np.load(io.BytesIO(part), allow_pickle=False) for part in parts[:3])
                facts = json.loads(parts[3])
            except ValueError as error:
                raise UserError(f"{shard.path}: group {group} cannot be read ({error}); {REMEDY}") from error
            rows = np.flatnonzero(index["group"] == group)
            mine = index[rows]
            require(
                len(facts) == rows.size == sizes.size, f"group {group} differs in its number of documents"
            )
            require(
                (mine["row"] == np.arange(rows.size)).all(), f"group {group} is out of order in the index"
            )
            require((mine["sentences"] == sizes).all(), f"group {group} differs in sentences per document")
            require(lengths.dtype == LENGTH_DTYPE and lengths.size == sizes.sum(), "sentences are missing")
            require(
                tokens.size == lengths.sum(dtype=np.int64), "sentence lengths do not add up to the tokens"
            )
            require(
                bool(lengths.min() >= 1 and lengths.max() <= max_tokens), "a sentence is empty or too long"
            )
            require(bool(tokens.max() < byte_lengths.size), "a token id lies outside the vocabulary")
            spans = np.append(0, np.cumsum(mine["tokens"], dtype=np.int64))
            require(spans[-1] == tokens.size, f"group {group} differs in tokens per document")
            texts = np.append(0, np.cumsum(byte_lengths[tokens], dtype=np.int64))
            require(
                (np.diff(texts[spans]) == mine["bytes"]).all(), "tokens do not add up to the text's bytes"
            )
            for n, start, row in zip(rows, spans[:-1], mine, strict=True):
                same = np.array_equal(shard.tokens(n), tokens[start : start + row["tokens"]])
                require(same, f"the index points to the wrong place for document {n}")
            stored = np.concatenate([shard.sentence_lengths(n) for n in rows])
            require(np.array_equal(stored, lengths), "the index points to the wrong sentence lengths")


def stats(folder: str | Path) -> dict:
    """Counts and distributions of a shard set, in all and per language.

    Per group: documents, sentences, tokens, bytes, bytes_per_token, tokens_per_sentence (mean, median, p95,
    max), sentences_per_document (mean, median, p95, max), share_at_limit (sentences of exactly `max_tokens`,
    the longest allowed: nearly all were split), histogram (sentences by length, item n = length n).
    """
    shards = ShardSet.open(folder)
    limit = shards.settings.max_tokens
    tallies: dict[str, _Tally] = {}
    for document in shards.documents():
        tallies.setdefault(document.language, _Tally(limit)).add(
            document.sentence_lengths, document.tokens.size, document.bytes
        )
    everything = _Tally(limit)
    for tally in tallies.values():
        everything.merge(tally)
    return {
        "folder": str(folder),
        "shards": len(shards),
        "settings": shards.manifest["settings"],
        "tokenizer": {
            key: shards.manifest["tokenizer"][key] for key in ("kind", "vocab_size", "fingerprint")
        },
        **everything.summary(),
        "languages": {language: tallies[language].summary() for language in sorted(tallies)},
        "rejected": shards.manifest["rejected"],
        "repaired": shards.manifest["repaired"],
        "damaged": shards.manifest["damaged"],
    }


class _Tally:
    """Counts of one language, as histograms: memory does not grow with the corpus."""

    def __init__(self, limit: int):
        self.limit = limit
        self.documents = self.tokens = self.bytes = 0
        self.lengths = np.zeros(limit + 1, dtype=np.int64)
        self.sizes: dict[int, int] = {}

    def add(self, sentence_lengths: np.ndarray, tokens: int, size: int) -> None:
        self.documents += 1
        self.tokens += tokens
        self.bytes += size
        self.lengths += np.bincount(sentence_lengths, minlength=self.limit + 1)
        self.sizes[sentence_lengths.size] = self.sizes.get(sentence_lengths.size, 0) + 1

    def merge(self, other: _Tally) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.lengths += other.lengths
        for size, count in other.sizes.items():
            self.sizes[size] = self.sizes.get(size, 0) + count

    def summary(self) -> dict:
        sentences = int(self.lengths.sum())
        sizes = np.array(sorted(self.sizes), dtype=np.int64)
        counts = np.array([self.sizes[size] for size in sizes], dtype=np.int64)
        return {
            "documents": self.documents,
            "sentences": sentences,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": round(self.bytes / self.tokens, 4) if self.tokens else None,
            "tokens_per_sentence": _distribution(np.arange(self.limit + 1), self.lengths),
            "sentences_per_document": _distribution(sizes, counts),
            "share_at_limit": round(int(self.lengths[self.limit]) / sentences, 6) if sentences else None,
            "histogram": self.lengths.tolist(),
        }


def _distribution(values: np.ndarray, counts: np.ndarray) -> dict | None:
    total = int(counts.sum())
    if not total:
        return None
    up_to = np.cumsum(counts)

    def quantile(share: float) -> int:
        return int(values[np.searchsorted(up_to, share * total)])

    return {
        "mean": round(float((values * counts).sum() / total), 4),
        "median": quantile(0.5),
        "p95": quantile(0.95),
        "max": int(values[np.flatnonzero(counts)[-1]]),
    }


def stats_text(result: dict) -> str:
    """`stats` for people."""
    settings = result["settings"]
    lines = [
        f"{result['folder']}: {result['shards']} shards, segmenter {settings['segmenter']}, "
        f"at most {settings['max_tokens']} tokens a sentence, "
        f"{result['tokenizer']['kind']} tokenizer with {result['tokenizer']['vocab_size']:,} entries"
    ]
    for name, group in [("all", result), *result["languages"].items()]:
        lines.append(
            f"{name}: {group['documents']:,} documents, {group['sentences']:,} sentences, "
            f"{group['tokens']:,} tokens, {group['bytes']:,} bytes ({group['bytes_per_token']} bytes a token)"
        )
        for key in ("tokens_per_sentence", "sentences_per_document"):
            spread = group[key]
            lines.append(
                f"  {key.replace('_', ' ')}: mean {spread['mean']:.1f}, median {spread['median']}, "
                f"p95 {spread['p95']}, max {spread['max']}"
            )
        lines.append(f"  at the limit: {100 * group['share_at_limit']:.2f} % of the sentences")
    for what in ("rejected", "repaired"):
        said = ", ".join(f"{count:,} × {reason}" for reason, count in result[what].items()) or "none"
        lines.append(f"{what} records: {said}")
    lines += [f"damaged input: {item['file']}: {item['damage']}" for item in result["damaged"]]
    lines.append("sentences by length in tokens:")
    lines += _histogram_lines(result["histogram"])
    return "\n".join(lines)


def _histogram_lines(histogram: list[int]) -> Iterator[str]:
    last = max((length for length, count in enumerate(histogram) if count), default=0)
    steps = [sum(histogram[start : start + HISTOGRAM_STEP]) for start in range(1, last + 1, HISTOGRAM_STEP)]
    for number, count in enumerate(steps):
        start = 1 + number * HISTOGRAM_STEP
        bar = "█" * round(HISTOGRAM_WIDTH * count / max(steps))
        yield f"{start:5d}–{start + HISTOGRAM_STEP - 1:<5d} {count:12,} {bar}"


def show(folder: str | Path, count: int) -> Iterator[str]:
    """Lines that show the first `count` documents sentence by sentence, each as a JSON string."""
    shards = ShardSet.open(folder)
    tokenizer = shards.tokenizer()
    for number, document in enumerate(shards.documents()):
        if number >= count:
            return
        yield (
            f"── {json.dumps(document.id)} ({document.language}, {document.source}): "
            f"{document.sentence_lengths.size} sentences, "
            f"{document.tokens.size} tokens, {document.bytes} bytes"
        )
        for place, tokens in enumerate(document.sentences(), start=1):
            yield f"{place:5d} [{tokens.size:3d}] {json.dumps(tokenizer.decode(tokens), ensure_ascii=False)}"
