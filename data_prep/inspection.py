"""Looking at finished shards: `verify` trusts nothing, `show` prints.

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
