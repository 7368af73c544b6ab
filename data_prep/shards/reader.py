"""Reads shards and shard sets (docs/shard-format.md).

Documents are zero-copy views of the memory-mapped tar; compressed members are unpacked first. Shards can also
be read by plain `webdataset.WebDataset(...).decode()`.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import UserError, counted
from data_prep.common.files import file_sha256
from data_prep.common.remote import is_url
from data_prep.shards.layout import (
    FORMAT_VERSION,
    LENGTH_DTYPE,
    MANIFEST,
    MARKED_VERSION,
    MEMBER_KINDS,
    QUARANTINE,
    TOKENIZER_FOLDER,
    Document,
    Group,
    Member,
    _checksum,
    _map_file,
    _npy_array,
    _walk,
    hash64,
    is_sealed,
    read_index,
    token_dtype,
    unpack_zstd,
)
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

OPEN_SHARDS = 64  # memory-mapped at once, per process: each holds a file descriptor
OPEN_GROUPS = 4  # unpacked groups kept, per shard


class Shard:
    """One shard, read by seek.

    index: structured array (`INDEX_DTYPE`), one row per document; checked against `index_sha256` if given. A
    document's arrays are checked at the first read. Raises `UserError` when a file is missing or damaged.
    """

    def __init__(
        self,
        tar_path: Path,
        index_path: Path,
        dtype: np.dtype,
        compression: str = "none",
        index_sha256: str | None = None,
    ):
        self.path, self._dtype, self._zstd = tar_path, dtype, compression == "zstd"
        self.index = read_index(index_path, index_sha256)
        self._good = bytearray(self.index.size)  # 1: the document has been checked
        # Fields are kept separately: access to a field of a row is many times slower.
        self._group, self._checksum = self.index["group"], self.index["checksum"]
        self._places = (
            (self.index["tokens_at"], self.index["tokens"], dtype),
            (self.index["sentences_at"], self.index["sentences"], LENGTH_DTYPE),
        )
        self._bytes = _map_file(tar_path)
        ends = self.index["sentences_at"] + 2 * self.index["sentences"]
        if not self._zstd and self.index.size and self._bytes.size < int(ends.max()):
            raise UserError(
                f"shard {tar_path} is cut short ({counted(self._bytes.size, 'byte')}); "
                "restore it or make the shards again"
            )
        self._all_members: list[Member] | None = None
        self._facts: tuple[int, list[dict]] = (-1, [])
        self._unpacked: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Documents."""
        return self.index.size

    def tokens(self, n: int) -> np.ndarray:
        """uint16/uint32 [T] tokens of document `n`; a read-only view of the file unless compressed."""
        if not self._good[n]:
            self._check(n)
        return self._array(0, n)

    def sentence_lengths(self, n: int) -> np.ndarray:
        """uint16 [S], tokens in each sentence of document `n`; a read-only view unless compressed."""
        if not self._good[n]:
            self._check(n)
        return self._array(1, n)

    def _array(self, kind: int, n: int) -> np.ndarray:
        at, count, dtype = self._places[kind]
        return self._view(kind, self._group.item(n), at.item(n), count.item(n), dtype)

    def _check(self, n: int) -> None:
        if _checksum(self._array(0, n), self._array(1, n)) != self._checksum.item(n):
            raise self._damaged(n)
        self._good[n] = 1

    def _damaged(self, n: int) -> UserError:
        return UserError(
            f"shard {self.path}: document {n} is damaged; restore the shard or make it again "
            "(`data-prep verify` says of what)"
        )

    def sentence_lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """uint16 [N]: the sentence lengths of several documents (int [D], ascending), back to back.

        Adjacent documents are read together, which is much faster. The sums are compared with the documents'
        tokens; the checksum is compared only when a document itself is read.
        """
        rows = self.index[documents]
        ends = rows["sentences_at"] + LENGTH_DTYPE.itemsize * rows["sentences"].astype(np.uint64)
        apart = (rows["group"][1:] != rows["group"][:-1]) | (rows["sentences_at"][1:] != ends[:-1])
        firsts = np.concatenate([[0], np.flatnonzero(apart) + 1]) if rows.size else np.empty(0, np.int64)
        counts = np.add.reduceat(rows["sentences"], firsts, dtype=np.int64) if rows.size else firsts
        groups, starts = rows["group"][firsts], rows["sentences_at"][firsts]
        runs = zip(groups.tolist(), starts.tolist(), counts.tolist(), strict=True)
        parts = [self._view(1, group, at, count, LENGTH_DTYPE) for group, at, count in runs]
        if not parts:
            return np.empty(0, LENGTH_DTYPE)
        lengths = np.concatenate(parts)
        starts = np.cumsum(rows["sentences"], dtype=np.int64) - rows["sentences"]
        wrong = np.add.reduceat(lengths, starts, dtype=np.int64) != rows["tokens"]
        if wrong.any():
            raise self._damaged(int(documents[wrong][0]))
        return lengths

    def document(self, n: int) -> Document:
        row = self.index[n]
        group = int(row["group"])
        if self._facts[0] != group:
            self._facts = group, self._read_facts(group)
        facts = self._facts[1][int(row["row"])]
        return Document(
            id=facts["id"],
            language=facts["language"],
            source=facts["source"],
            tokens=self.tokens(n),
            sentence_lengths=self.sentence_lengths(n),
            bytes=int(row["bytes"]),
            text_hash=int(row["text_hash"]),
            mark=int(row["mark"]) if "mark" in row.dtype.names else 0,
            confidence=facts.get("confidence"),
        )

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self._members()) // len(MEMBER_KINDS)

    def group(self, g: int) -> Group:
        """Group `g` as stored, without the index. Raises `UserError` when it cannot be read."""
        tokens, lengths, sizes = (self._read_array(g, kind) for kind in range(3))
        return Group(tokens, lengths, sizes, self._read_facts(g))

    def _read_array(self, group: int, kind: int) -> np.ndarray:
        return self._parse(group, _npy_array, kind)

    def _read_facts(self, group: int) -> list[dict]:
        return self._parse(group, json.loads, 3)

    def _parse(self, group: int, parse: Callable[[bytes], Any], kind: int) -> Any:
        """A group's member, parsed. Raises `UserError` when it cannot be read."""
        data = self._member(group, kind)
        try:
            return parse(data)
        except ValueError as error:
            raise UserError(f"shard {self.path}: group {group} is damaged: {error}") from error

    def _view(self, kind: int, group: int, at: int, count: int, dtype: np.dtype) -> np.ndarray:
        if not self._zstd:
            return self._bytes[at : at + count * dtype.itemsize].view(dtype)
        if (group, kind) not in self._unpacked:
            self._unpacked[group, kind] = np.frombuffer(self._member(group, kind), np.uint8)
            if len(self._unpacked) > 2 * OPEN_GROUPS:
                self._unpacked.popitem(last=False)
        return self._unpacked[group, kind][at : at + count * dtype.itemsize].view(dtype)

    def _member(self, group: int, kind: int) -> bytes:
        """The bytes of a group's member, unpacked."""
        members, n = self._members(), group * len(MEMBER_KINDS) + kind
        if n >= len(members):
            raise UserError(f"shard {self.path} is cut short: its index names group {group}")
        member = members[n]
        data = self._bytes[member.data_at : member.data_at + member.size].tobytes()
        if not self._zstd:
            return data
        try:
            return unpack_zstd(data)
        except ValueError as error:
            raise UserError(f"shard {self.path}: {member.name} is damaged: {error}") from error

    def _members(self) -> list[Member]:
        if self._all_members is None:
            self._all_members = _walk(self._bytes, self.path)
        return self._all_members


class ShardSet:
    """A folder of shards with its manifest."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder = folder
        self.manifest = manifest
        settings = manifest["settings"]
        self.settings = SentenceSettings(
            segmenter=settings["segmenter"],
            language=settings["language"],
            max_tokens=settings["max_tokens"],
            min_tokens=settings["min_tokens"],
        )
        self.fingerprint: str = manifest["fingerprint"]
        self.dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
        self.compression: str = settings["compression"]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._first = np.cumsum([0] + [entry["documents"] for entry in manifest["shards"]], dtype=np.int64)
        self._keys: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open a folder, or the copy on this machine of the set behind a URL.

        Raises `UserError` when the manifest is missing, damaged, or of another format.
        """
        if is_url(str(folder)):
            from data_prep.shards.stage import local_copy  # it opens sets itself

            folder = local_copy(str(folder))
        folder = Path(folder)
        path = folder / MANIFEST
        if not folder.is_dir():
            raise UserError(f"shard folder {folder} does not exist")
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {MANIFEST}: not a shard folder, or `data-prep shard` has not finished"
            )
        try:
            data = path.read_bytes()
            manifest = json.loads(data)
            version = manifest["format_version"]
            if isinstance(version, int) and version > MARKED_VERSION:
                raise UserError(
                    f"{path} has format version {version}, newer than {MARKED_VERSION}: update this package"
                )
            if version not in (FORMAT_VERSION, MARKED_VERSION):
                raise UserError(
                    f"{path} has format version {version!r}, not {FORMAT_VERSION}: make the shards again"
                )
            for entry in manifest["shards"]:
                for name in (entry["file"], entry["index"]):
                    if name != os.path.basename(name):
                        raise UserError(f"{path} names the file {name!r}, which is not a plain name")
            if not is_sealed(data):
                raise UserError(
                    f"{path} is damaged (its checksum differs); restore it or make the shards again"
                )
            return cls(folder, manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a shard manifest ({type(error).__name__}: {error})") from error

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards. Raises `UserError` when files are missing or changed."""
        folder = self.folder / TOKENIZER_FOLDER
        for name, sha256 in self.manifest["tokenizer"]["files"].items():
            if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
                raise UserError(
                    f"{folder} is not the tokenizer that made these shards: {name} is another one, or missing"
                )
        return load_tokenizer(folder)

    def files(self) -> dict[str, str]:
        """sha256 of every file of the set except the manifest, by its path in the folder."""
        files = {QUARANTINE: self.manifest["quarantine_sha256"]}
        for name, sha256 in self.manifest["tokenizer"]["files"].items():
            files[f"{TOKENIZER_FOLDER}/{name}"] = sha256
        for entry in self.manifest["shards"]:
            files |= {entry["file"]: entry["sha256"], entry["index"]: entry["index_sha256"]}
        return files

    def __len__(self) -> int:
        """Shards."""
        return len(self.manifest["shards"])

    def shard(self, i: int) -> Shard:
        """Shard `i`, memory-mapped; the most recently used stay open."""
        if i not in self._open:
            entry = self.manifest["shards"][i]
            paths = self.folder / entry["file"], self.folder / entry["index"]
            self._open[i] = Shard(*paths, self.dtype, self.compression, entry["index_sha256"])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(i)
        return self._open[i]

    def documents(self) -> Iterator[Document]:
        """Every document, in stored order."""
        for i in range(len(self)):
            shard = self.shard(i)
            for n in range(len(shard)):
                yield shard.document(n)

    def document(self, number: int) -> Document:
        """Document `number` of the whole set, from 0. Raises `UserError` when there is none."""
        total = int(self._first[-1])
        if not 0 <= number < total:
            raise UserError(f"{self.folder} has documents 0 to {total - 1}, not {number}")
        i = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.shard(i).document(number - int(self._first[i]))

    def find(self, key: str) -> Document:
        """The first document whose id is `key`. Raises `UserError` when there is none."""
        return next(self.find_all(key))

    def find_all(self, key: str) -> Iterator[Document]:
        """The documents whose id is `key`: inputs may use one more than once. Raises `UserError` for none.

        The first call reads and sorts all indexes (16 bytes of memory per document); later calls take
        microseconds.
        """
        if self._keys is None:
            parts = [self.shard(i).index["key_hash"] for i in range(len(self))]
            joined = np.concatenate(parts) if parts else np.empty(0, np.uint64)
            order = np.argsort(joined, kind="stable")
            self._keys = joined[order], order
        hashes, order = self._keys
        wanted = np.uint64(hash64(key.encode("utf-8")))
        missing = True
        for place in range(*(int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))):
            if (document := self.document(int(order[place]))).id == key:
                missing = False
                yield document
        if missing:
            raise UserError(f"{self.folder} holds no document with the id {key!r}")


def zstd_handler(key: str, data: bytes) -> object:
    """For webdataset: `WebDataset(...).decode(pre=[gzfilter, zstd_handler])` reads compressed shards too."""
    from webdataset.autodecode import Continue

    return Continue(key[: -len(".zst")], unpack_zstd(data)) if key.endswith(".zst") else None
