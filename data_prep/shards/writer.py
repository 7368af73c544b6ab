"""Writes documents into shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.common.files import file_sha256, flush_and_rename, partial_name, write_atomically
from data_prep.corpus.compression import MARKS
from data_prep.shards.layout import (
    COUNTS,
    GROUP_BYTES,
    GROUP_DOCUMENTS,
    INDEX_DTYPE,
    LENGTH_DTYPE,
    MARKED_DTYPE,
    SHARD_ENDINGS,
    ZSTD_LEVEL,
    Document,
    _checksum,
    _starts,
    hash64,
    index_totals,
    npy_bytes,
)


class ShardWriter:
    """Writes one shard. Both files appear only when complete, and the same documents give the same bytes.

    Holds one group of documents in memory. `compression`: `none`, or `zstd` for each member (the same bytes
    for one release of zstd).
    """

    def __init__(self, tar_path: Path, index_path: Path, dtype: np.dtype, compression: str = "none"):
        self._tar_path, self._index_path, self._dtype = tar_path, index_path, dtype
        self._compress = _zstd_compressor() if compression == "zstd" else None
        self._partial = partial_name(tar_path)
        self._tar = tarfile.open(self._partial, "w", format=tarfile.USTAR_FORMAT)
        self._group: list[Document] = []
        self._group_bytes = 0
        self._groups = 0
        self._rows: list[np.ndarray] = []
        self.documents = 0
        self.payload = 0  # bytes of the arrays written or waiting, before compression

    def add(self, document: Document) -> None:
        self._group.append(document)
        self.documents += 1
        size = document.tokens.size * self._dtype.itemsize + document.sentence_lengths.size * 2
        self.payload += size
        self._group_bytes += size
        if len(self._group) == GROUP_DOCUMENTS or self._group_bytes >= GROUP_BYTES:
            self._write_group()

    def close(self) -> dict:
        """Finish both files. Returns the shard's manifest entry without its file names."""
        if self._group:
            self._write_group()
        self._tar.close()
        index = np.concatenate(self._rows) if self._rows else np.empty(0, MARKED_DTYPE)
        if not index["mark"].any():
            marked, index = index, np.empty(index.size, INDEX_DTYPE)
            for name in index.dtype.names:
                index[name] = marked[name]
        write_atomically(self._index_path, npy_bytes(index))
        sha256, size = file_sha256(self._partial), self._partial.stat().st_size
        flush_and_rename(self._partial, self._tar_path)
        return {
            "size": size,
            "sha256": sha256,
            "index_sha256": file_sha256(self._index_path),
            **index_totals(index),
        }

    def _write_group(self) -> None:
        group, self._group, self._group_bytes = self._group, [], 0
        rows = np.zeros(len(group), MARKED_DTYPE)
        rows["mark"] = [document.mark for document in group]
        rows["tokens"] = [document.tokens.size for document in group]
        rows["sentences"] = [document.sentence_lengths.size for document in group]
        rows["bytes"] = [document.bytes for document in group]
        rows["text_hash"] = [document.text_hash for document in group]
        rows["key_hash"] = [hash64(document.id.encode("utf-8")) for document in group]
        rows["group"], rows["row"] = self._groups, np.arange(len(group))
        parts = [document.tokens for document in group]
        tokens = np.concatenate(parts, dtype=self._dtype, casting="unsafe")  # the ids fit
        lengths = np.concatenate([document.sentence_lengths for document in group]).astype(LENGTH_DTYPE)
        facts = [document.facts() for document in group]
        tokens_at = self._add_array("tokens.npy", tokens)
        lengths_at = self._add_array("sentence_lengths.npy", lengths)
        self._add_array("document_sizes.npy", rows["sentences"])
        self._add_member("documents.json", json.dumps(facts, separators=(",", ":")).encode("ascii"))
        rows["tokens_at"] = tokens_at + _starts(rows["tokens"]) * self._dtype.itemsize
        rows["sentences_at"] = lengths_at + _starts(rows["sentences"]) * LENGTH_DTYPE.itemsize
        pairs = (
            np.split(array, ends[:-1])
            for array, ends in ((tokens, np.cumsum(rows["tokens"])), (lengths, np.cumsum(rows["sentences"])))
        )
        rows["checksum"] = [_checksum(*pair) for pair in zip(*pairs, strict=True)]
        self._rows.append(rows)
        self._groups += 1

    def _add_array(self, kind: str, array: np.ndarray) -> int:
        """Returns the offset of the array's first item in the tar, or in its unpacked member."""
        data = npy_bytes(array)
        data_at = self._add_member(kind, data)
        return (0 if self._compress else data_at) + len(data) - array.nbytes

    def _add_member(self, kind: str, data: bytes) -> int:
        name = f"{self._groups:06d}.{kind}"
        if self._compress:
            name, data = f"{name}.zst", self._compress(data)
        member = tarfile.TarInfo(name)  # TarInfo's defaults: mtime 0, uid 0, gid 0
        member.size, member.mode = len(data), 0o644
        data_at = self._tar.offset + tarfile.BLOCKSIZE  # short names: the header is one block
        self._tar.addfile(member, io.BytesIO(data))
        return data_at


class ShardSeries:
    """Writes documents into one shard after another: `STEM000.tar`, `STEM001.tar`, … with their indexes.

    Args:
        stem: folder and prefix of the names.
        digits: of the shards' numbers.
        shard_bytes: bytes of arrays that fill a shard.
        shard_documents: documents that fill a shard; 0 for no limit.

    Attributes:
        entries: the shards' manifest entries without file names, after `close`.
        languages, sources: `COUNTS` of all documents by language and by source, after `close`.
        marked: documents by mark (`MARKS`).
    """

    def __init__(
        self,
        stem: Path,
        digits: int,
        dtype: np.dtype,
        compression: str,
        shard_bytes: int,
        shard_documents: int,
    ):
        self._stem, self._digits, self._dtype, self._compression = stem, digits, dtype, compression
        self._shard_bytes, self._shard_documents = shard_bytes, shard_documents
        self._writer: ShardWriter | None = None
        self.entries: list[dict] = []
        self.languages: dict[str, dict[str, int]] = {}
        self.sources: dict[str, dict[str, int]] = {}
        self.marked: Counter[str] = Counter()

    def add(self, document: Document) -> None:
        if self._writer is None:
            name = f"{self._stem.name}{len(self.entries):0{self._digits}d}"
            tar, index = (self._stem.with_name(name + ending) for ending in SHARD_ENDINGS.values())
            self._writer = ShardWriter(tar, index, self._dtype, self._compression)
        self._writer.add(document)
        _add_counts(self.languages, document.language, document)
        _add_counts(self.sources, document.source, document)
        if document.mark:
            self.marked.update(name for bit, name in MARKS.items() if document.mark & bit)
        full = self._writer.documents == self._shard_documents
        if full or self._writer.payload >= self._shard_bytes:
            self.close()

    def close(self) -> None:
        """Finish the last shard."""
        if self._writer is not None:
            self.entries.append(self._writer.close())
            self._writer = None


def _zstd_compressor() -> Callable[[bytes], bytes]:
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress


def _add_counts(sums: dict[str, dict[str, int]], key: str, document: Document) -> None:
    """Add a document to the `COUNTS` of `key`: its language or source."""
    row = sums.setdefault(key, dict.fromkeys(COUNTS, 0))
    sizes = (1, document.sentence_lengths.size, document.tokens.size, document.bytes)
    for name, size in zip(COUNTS, sizes, strict=True):
        row[name] += size
