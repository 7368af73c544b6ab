"""The shard format: writing it and reading it. The only module that knows how bytes lie in a shard.

A shard is `shard-NNNNNN.tar` with `shard-NNNNNN.index.npy`; a set of shards is a folder with `manifest.json`
and a copy of the tokenizer. In: documents as (tokens, sentence lengths). Out: the same, zero copy from the
memory-mapped tar (unpacked first where members are compressed), or through plain
`webdataset.WebDataset(...).decode()`. docs/shard-format.md describes every field.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.files import file_sha256, flush_and_rename, json_bytes, partial_name, write_atomically
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
TOKENIZER_FOLDER = "tokenizer"
# A group ends at 256 documents or with the document that fills its arrays: small enough to be unpacked and
# looked through in well under a millisecond, large enough for headers to be less than 1 %.
GROUP_DOCUMENTS = 256
GROUP_BYTES = 512_000
OPEN_SHARDS = 64  # memory-mapped at once, per process: each holds a file descriptor
OPEN_GROUPS = 4  # unpacked groups kept, per shard
COUNTS = ("documents", "sentences", "tokens", "bytes")
SHARD_ENDINGS = {"file": ".tar", "index": ".index.npy"}  # by the manifest's key
COMPRESSIONS = ("none", "zstd")
ZSTD_LEVEL = 3

# One row per document, in the order of the tar. `*_at` are byte offsets: in the tar file, or in the unpacked
# member where members are compressed. `group` and `row` say which members and which place in them hold the
# document. `text_hash` and `key_hash` are `hash64` of the text in UTF-8 and of the id; `checksum` is CRC-32
# of the stored tokens and sentence lengths.
INDEX_DTYPE = np.dtype(
    [
        ("tokens", "<u4"),
        ("sentences", "<u4"),
        ("bytes", "<u4"),
        ("group", "<u4"),
        ("row", "<u4"),
        ("tokens_at", "<u8"),
        ("sentences_at", "<u8"),
        ("text_hash", "<u8"),
        ("key_hash", "<u8"),
        ("checksum", "<u4"),
    ]
)
LENGTH_DTYPE = np.dtype("<u2")
MEMBER_KINDS = ("tokens.npy", "sentence_lengths.npy", "document_sizes.npy", "documents.json")
_MEMBER_NAME = re.compile(rf"(\d{{6,}})\.({'|'.join(map(re.escape, MEMBER_KINDS))})(\.zst)?")


@dataclass(frozen=True)
class Document:
    """One stored document: tokens uint16/uint32 [T]; sentence_lengths uint16 [S], sum T; bytes of text.

    text_hash: `hash64` of the text, the same under any tokenizer.
    """

    id: str
    language: str
    source: str
    tokens: np.ndarray
    sentence_lengths: np.ndarray
    bytes: int
    text_hash: int

    def sentences(self) -> list[np.ndarray]:
        """The S slices of `tokens`."""
        return np.split(self.tokens, np.cumsum(self.sentence_lengths[:-1], dtype=np.int64))


class Member(NamedTuple):
    """One member of a shard's tar: its name, where its data begins in the file, and how long they are."""

    name: str
    data_at: int
    size: int


class Group(NamedTuple):
    """One group of D documents: tokens uint16/uint32 [T], sentence_lengths uint16 [S], document_sizes uint32
    [D] (sentences in each), facts: D dictionaries with `id`, `language` and `source`."""

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_sizes: np.ndarray
    facts: list[dict]


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32 (little-endian)."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def hash64(data: bytes) -> int:
    """The first 8 bytes of BLAKE2b: for finding and spreading, not against an attacker."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class ShardWriter:
    """Writes one shard. Both files appear under their names only when complete. The same documents give the
    same bytes. Memory: one group of documents.

    compression: `none`, or `zstd` for every member by itself (the same bytes for one release of zstd).
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
        index = np.concatenate(self._rows) if self._rows else np.empty(0, INDEX_DTYPE)
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
        rows = np.zeros(len(group), INDEX_DTYPE)
        rows["tokens"] = [document.tokens.size for document in group]
        rows["sentences"] = [document.sentence_lengths.size for document in group]
        rows["bytes"] = [document.bytes for document in group]
        rows["text_hash"] = [document.text_hash for document in group]
        rows["key_hash"] = [hash64(document.id.encode("utf-8")) for document in group]
        rows["group"], rows["row"] = self._groups, np.arange(len(group))
        tokens = np.concatenate([document.tokens for document in group]).astype(self._dtype)
        lengths = np.concatenate([document.sentence_lengths for document in group]).astype(LENGTH_DTYPE)
        facts = [{"id": d.id, "language": d.language, "source": d.source} for d in group]
        tokens_at = self._add_array("tokens.npy", tokens)
        lengths_at = self._add_array("sentence_lengths.npy", lengths)
        self._add_array("document_sizes.npy", rows["sentences"])
        self._add_member("documents.json", json.dumps(facts, separators=(",", ":")).encode("ascii"))
        rows["tokens_at"] = tokens_at + _starts(rows["tokens"]) * self._dtype.itemsize
        rows["sentences_at"] = lengths_at + _starts(rows["sentences"]) * LENGTH_DTYPE.itemsize
        parts = (
            np.split(array, ends[:-1])
            for array, ends in ((tokens, np.cumsum(rows["tokens"])), (lengths, np.cumsum(rows["sentences"])))
        )
        rows["checksum"] = [_checksum(*pair) for pair in zip(*parts, strict=True)]
        self._rows.append(rows)
        self._groups += 1

    def _add_array(self, kind: str, array: np.ndarray) -> int:
        """Returns the offset of the array's first item: in the tar, or in its unpacked member."""
        data = npy_bytes(array)
        data_at = self._add_member(kind, data)
        return (0 if self._compress else data_at) + len(data) - array.nbytes

    def _add_member(self, kind: str, data: bytes) -> int:
        name = f"{self._groups:06d}.{kind}"
        if self._compress:
            name, data = f"{name}.zst", self._compress(data)
        member = tarfile.TarInfo(name)  # TarInfo's own defaults: mtime 0, uid 0, gid 0
        member.size, member.mode = len(data), 0o644
        data_at = self._tar.offset + tarfile.BLOCKSIZE  # short names: the header is one block
        self._tar.addfile(member, io.BytesIO(data))
        return data_at


class ShardSeries:
    """Writes documents into one shard after another: `STEM000.tar`, `STEM001.tar`, … with their indexes.

    stem: folder and beginning of the names; digits: of their numbers. A shard is full when its arrays have
    `shard_bytes` bytes or it holds `shard_documents` documents (0: no limit).

    After `close`: entries, the shards' manifest entries without file names; languages and sources, the counts
    (`COUNTS`) of all documents by language and by source.
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

    def add(self, document: Document) -> None:
        if self._writer is None:
            name = f"{self._stem.name}{len(self.entries):0{self._digits}d}"
            paths = [self._stem.with_name(name + ending) for ending in SHARD_ENDINGS.values()]
            self._writer = ShardWriter(*paths, self._dtype, self._compression)
        self._writer.add(document)
        _add_counts(self.languages, document.language, document)
        _add_counts(self.sources, document.source, document)
        full = self._writer.documents == self._shard_documents
        if full or self._writer.payload >= self._shard_bytes:
            self.close()

    def close(self) -> None:
        """Finish the last shard."""
        if self._writer is not None:
            self.entries.append(self._writer.close())
            self._writer = None


class Shard:
    """One shard, read by seek.

    index: structured array (`INDEX_DTYPE`), one row per document; checked against `index_sha256` where it is
    given. A document's tokens and sentence lengths are checked when either is first read. Raises `UserError`
    when a file is missing or damaged.
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
        # Fields by themselves: a field of a row costs many times as much.
        self._group, self._checksum = self.index["group"], self.index["checksum"]
        self._places = (
            (self.index["tokens_at"], self.index["tokens"], dtype),
            (self.index["sentences_at"], self.index["sentences"], LENGTH_DTYPE),
        )
        self._bytes = _map_file(tar_path)
        ends = self.index["sentences_at"] + 2 * self.index["sentences"]
        if not self._zstd and self.index.size and self._bytes.size < int(ends.max()):
            raise UserError(
                f"shard {tar_path} is cut short ({self._bytes.size} bytes); "
                "restore it or make the shards again"
            )
        self._all_members: list[Member] | None = None
        self._facts: tuple[int, list[dict]] = (-1, [])
        self._unpacked: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Documents."""
        return self.index.size

    def tokens(self, n: int) -> np.ndarray:
        """uint16/uint32 [T] tokens of document `n`; a read-only view of the file, if not compressed."""
        if not self._good[n]:
            self._check(n)
        return self._array(0, n)

    def sentence_lengths(self, n: int) -> np.ndarray:
        """uint16 [S], tokens in each sentence of document `n`; a read-only view likewise."""
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

        Neighbours are read at once: this is much faster than one by one. They add up to the documents'
        tokens; the checksum is looked at only when a document itself is read.
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
            self._facts = group, self._read(group, 3)
        facts = self._facts[1][int(row["row"])]
        return Document(
            id=facts["id"],
            language=facts["language"],
            source=facts["source"],
            tokens=self.tokens(n),
            sentence_lengths=self.sentence_lengths(n),
            bytes=int(row["bytes"]),
            text_hash=int(row["text_hash"]),
        )

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self._members()) // len(MEMBER_KINDS)

    def group(self, g: int) -> Group:
        """Group `g` as it is stored, whatever the index says. Raises `UserError` when it cannot be read."""
        return Group(*(self._read(g, kind) for kind in range(len(MEMBER_KINDS))))

    def _read(self, group: int, kind: int) -> np.ndarray | list[dict]:
        """A group's member: an array, or its facts. Raises `UserError` when it cannot be read."""
        data = self._member(group, kind)
        try:
            return _npy_array(data) if MEMBER_KINDS[kind].endswith(".npy") else json.loads(data)
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
        """Raises `UserError` when `folder` holds no manifest, a broken one, or one of another format."""
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
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise UserError(
                    f"{path} has format version {version}, newer than {FORMAT_VERSION}: update this package"
                )
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path} has format version {version!r}, not {FORMAT_VERSION}: make the shards again"
                )
            for entry in manifest["shards"]:
                for name in (entry["file"], entry["index"]):
                    if name != os.path.basename(name):
                        raise UserError(f"{path} names the file {name!r}, which is not a plain name")
            if data != json_bytes(seal_manifest(manifest)):
                raise UserError(
                    f"{path} is damaged (its checksum differs); restore it or make the shards again"
                )
            return cls(folder, manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a shard manifest ({type(error).__name__}: {error})") from error

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards. Raises `UserError` when the folder now holds another one, or
        files that have changed."""
        folder = self.folder / TOKENIZER_FOLDER
        for name, sha256 in self.manifest["tokenizer"]["files"].items():
            if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
                raise UserError(
                    f"{folder} is not the tokenizer that made these shards: {name} is another one, or missing"
                )
        return load_tokenizer(folder)

    def __len__(self) -> int:
        """Shards."""
        return len(self.manifest["shards"])

    def shard(self, i: int) -> Shard:
        """Shard `i`, memory-mapped; the last few used stay open."""
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
        """The first document whose id is `key`. Raises `UserError` when there is none.

        The first call reads all indexes and sorts them: 16 bytes of memory a document, kept; later calls take
        microseconds.
        """
        if self._keys is None:
            hashes = [self.shard(i).index["key_hash"] for i in range(len(self))]
            joined = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
            order = np.argsort(joined, kind="stable")
            self._keys = joined[order], order
        hashes, order = self._keys
        wanted = np.uint64(hash64(key.encode("utf-8")))
        for place in range(*(int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))):
            if (document := self.document(int(order[place]))).id == key:
                return document
        raise UserError(f"{self.folder} holds no document with the id {key!r}")


def seal_manifest(manifest: dict) -> dict:
    """The manifest with its own checksum: sha256 over `json_bytes` of all the rest."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return content | {"checksum": hashlib.sha256(json_bytes(content)).hexdigest()}


def read_index(path: Path, sha256: str | None = None) -> np.ndarray:
    """The index rows [documents], read-only. Raises `UserError` when the file is missing, damaged (its sha256
    is another one) or not an index."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"shard index {path} is missing; restore it or make the shards again") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(
            f"shard index {path} is damaged (its sha256 differs); restore it or make the shards again"
        )
    try:
        index = _npy_array(data)
    except ValueError as error:
        raise UserError(f"shard index {path} is damaged: {error}") from error
    if index.dtype != INDEX_DTYPE:
        raise UserError(f"shard index {path} has another layout than this format's")
    return index


def tar_members(path: Path) -> list[Member]:
    """Members of a shard, in order, whole groups. Raises `UserError` on damage, foreign names and links."""
    return _walk(_map_file(path), path)


def unpack_zstd(data: bytes) -> bytes:
    """One zstd frame, unpacked. Raises `ValueError` when it is damaged."""
    import zstandard

    try:
        return zstandard.ZstdDecompressor().decompress(data)
    except (zstandard.ZstdError, MemoryError) as error:  # a damaged frame may name any size
        raise ValueError(str(error) or "no memory for it") from error


def zstd_handler(key: str, data: bytes) -> object:
    """For webdataset: `WebDataset(...).decode(pre=[gzfilter, zstd_handler])` reads compressed shards too."""
    from webdataset.autodecode import Continue

    return Continue(key[: -len(".zst")], unpack_zstd(data)) if key.endswith(".zst") else None


def _zstd_compressor():
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress


def _map_file(path: Path) -> np.ndarray:
    try:
        # As a plain array: slices of a memmap object cost microseconds each, and readers make millions.
        data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        return data.view(np.ndarray)
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing; restore it or make the shards again") from None


def _walk(data: np.ndarray, path: Path) -> list[Member]:
    """Every member of a shard's tar. Reads no more than the headers, and trusts none of them."""
    members: list[Member] = []
    at, block = 0, tarfile.BLOCKSIZE
    zst: str | None = None
    while True:
        header = data[at : at + block].tobytes()
        if len(header) < block:
            raise UserError(f"shard {path} is cut short")
        if header == bytes(block):
            break
        try:
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise UserError(f"shard {path} is damaged at byte {at}: {error}") from error
        name = _MEMBER_NAME.fullmatch(entry.name)
        if name is None or not entry.isreg():
            raise UserError(f"shard {path} holds a foreign member {entry.name!r}")
        zst = (name.group(3) or "") if zst is None else zst
        group, kind = divmod(len(members), len(MEMBER_KINDS))
        expected = f"{group:06d}.{MEMBER_KINDS[kind]}{zst}"
        if entry.name != expected:
            raise UserError(f"shard {path} holds {entry.name} where {expected} should be")
        members.append(Member(entry.name, at + block, entry.size))
        at += block + -(-entry.size // block) * block
    if len(members) % len(MEMBER_KINDS):
        raise UserError(f"shard {path} is cut short: its last group is not whole")
    return members


def _npy_array(data: bytes) -> np.ndarray:
    """The array of an .npy file's bytes, read-only, not copied. Raises `ValueError` when they are damaged."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not an .npy file of version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or len(shape) != 1 or len(data) - stream.tell() != shape[0] * dtype.itemsize:
        raise ValueError("an array of another size or kind than its header says")
    return np.frombuffer(data, dtype, offset=stream.tell())


def _add_counts(sums: dict[str, dict[str, int]], key: str, document: Document) -> None:
    """Add a document to the counts (`COUNTS`) of its language, or source, or whatever `key` is."""
    row = sums.setdefault(key, dict.fromkeys(COUNTS, 0))
    sizes = (1, document.sentence_lengths.size, document.tokens.size, document.bytes)
    for name, size in zip(COUNTS, sizes, strict=True):
        row[name] += size


def index_totals(index: np.ndarray) -> dict[str, int]:
    """Documents, sentences, tokens and bytes of an index."""
    return {"documents": int(index.size)} | {
        name: int(index[name].sum(dtype=np.uint64)) for name in COUNTS[1:]
    }


def _checksum(tokens: np.ndarray, sentence_lengths: np.ndarray) -> int:
    return zlib.crc32(sentence_lengths, zlib.crc32(tokens))


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes, dtype=np.uint64) - sizes
