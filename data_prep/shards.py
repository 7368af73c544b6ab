"""The shard format: writing it and reading it. The only module that knows how bytes lie in a shard.

A shard is `shard-NNNNNN.tar` with `shard-NNNNNN.index.npy`; a set of shards is a folder with `manifest.json`
and a copy of the tokenizer. In: documents as (tokens, sentence lengths). Out: the same, zero copy from the
memory-mapped tar, or through plain `webdataset.WebDataset(...).decode()`. docs/shard-format.md describes
every field.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.sentences import SentenceSettings
from data_prep.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
TOKENIZER_FOLDER = "tokenizer"
GROUP_DOCUMENTS = 256
OPEN_SHARDS = 64  # memory-mapped at once, per process: each holds a file descriptor
COUNTS = ("documents", "sentences", "tokens", "bytes")

# One row per document, in the order of the tar. `*_at` are byte offsets in the tar file; `group` and `row`
# say which member and which place in it hold the document.
INDEX_DTYPE = np.dtype(
    [
        ("tokens", "<u4"),
        ("sentences", "<u4"),
        ("bytes", "<u4"),
        ("tokens_at", "<u8"),
        ("sentences_at", "<u8"),
        ("group", "<u4"),
        ("row", "<u4"),
    ]
)
LENGTH_DTYPE = np.dtype("<u2")
MEMBER_NAME = re.compile(r"(\d{6})\.(tokens\.npy|sentence_lengths\.npy|document_sizes\.npy|documents\.json)")
MEMBER_KINDS = ("tokens.npy", "sentence_lengths.npy", "document_sizes.npy", "documents.json")


@dataclass(frozen=True)
class Document:
    """One stored document: tokens uint16/uint32 [T]; sentence_lengths uint16 [S], sum T; bytes of text."""

    id: str
    language: str
    source: str
    tokens: np.ndarray
    sentence_lengths: np.ndarray
    bytes: int

    def sentences(self) -> list[np.ndarray]:
        """The S slices of `tokens`."""
        return np.split(self.tokens, np.cumsum(self.sentence_lengths[:-1], dtype=np.int64))


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32 (little-endian)."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes one shard. Both files appear under their names only when complete. The same documents give the
    same bytes. Memory: one group of 256 documents.
    """

    def __init__(self, tar_path: Path, index_path: Path, dtype: np.dtype):
        self._tar_path, self._index_path, self._dtype = tar_path, index_path, dtype
        self._partial = tar_path.with_name(tar_path.name + ".partial")
        self._tar = tarfile.open(self._partial, "w", format=tarfile.USTAR_FORMAT)
        self._group: list[Document] = []
        self._groups = 0
        self._rows: list[np.ndarray] = []
        self.documents = 0
        self.payload = 0  # bytes of the arrays written or waiting

    def add(self, document: Document) -> None:
        self._group.append(document)
        self.documents += 1
        self.payload += document.tokens.size * self._dtype.itemsize + document.sentence_lengths.size * 2
        if len(self._group) == GROUP_DOCUMENTS:
            self._write_group()

    def close(self) -> dict:
        """Finish both files. Returns the shard's manifest entry without its file names."""
        if self._group:
            self._write_group()
        self._tar.close()
        index = np.concatenate(self._rows) if self._rows else np.empty(0, INDEX_DTYPE)
        write_atomically(self._index_path, npy_bytes(index))
        _sync_and_rename(self._partial, self._tar_path)
        return {
            "sha256": file_sha256(self._tar_path),
            "index_sha256": file_sha256(self._index_path),
            **index_totals(index),
        }

    def _write_group(self) -> None:
        group, self._group = self._group, []
        rows = np.zeros(len(group), INDEX_DTYPE)
        rows["tokens"] = [document.tokens.size for document in group]
        rows["sentences"] = [document.sentence_lengths.size for document in group]
        rows["bytes"] = [document.bytes for document in group]
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
        self._rows.append(rows)
        self._groups += 1

    def _add_array(self, kind: str, array: np.ndarray) -> int:
        """Returns the offset of the array's first item in the tar."""
        data = npy_bytes(array)
        return self._add_member(kind, data) + len(data) - array.nbytes

    def _add_member(self, kind: str, data: bytes) -> int:
        member = tarfile.TarInfo(
            f"{self._groups:06d}.{kind}"
        )  # TarInfo's own defaults: mtime 0, uid 0, gid 0
        member.size, member.mode = len(data), 0o644
        data_at = self._tar.offset + tarfile.BLOCKSIZE  # short names: the header is one block
        self._tar.addfile(member, io.BytesIO(data))
        return data_at


class Shard:
    """One shard, read by seek.

    index: structured array (`INDEX_DTYPE`), one row per document. Raises `UserError` when a file is missing
    or damaged.
    """

    def __init__(self, tar_path: Path, index_path: Path, dtype: np.dtype):
        self.path, self._dtype = tar_path, dtype
        self.index = read_index(index_path)
        if not tar_path.is_file():
            raise UserError(f"shard {tar_path} is missing; restore it or make the shards again")
        size = tar_path.stat().st_size
        if self.index.size and size < int((self.index["sentences_at"] + 2 * self.index["sentences"]).max()):
            raise UserError(
                f"shard {tar_path} is cut short ({size} bytes); restore it or make the shards again"
            )
        self._bytes = np.memmap(tar_path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        self._groups: list[tarfile.TarInfo] | None = None
        self._facts: tuple[int, list[dict]] = (-1, [])

    def __len__(self) -> int:
        """Documents."""
        return self.index.size

    def tokens(self, n: int) -> np.ndarray:
        """uint16/uint32 [T] tokens of document `n`; a read-only view of the file."""
        row = self.index[n]
        return self._view(int(row["tokens_at"]), int(row["tokens"]), self._dtype)

    def sentence_lengths(self, n: int) -> np.ndarray:
        """uint16 [S], tokens in each sentence of document `n`; a read-only view of the file."""
        row = self.index[n]
        return self._view(int(row["sentences_at"]), int(row["sentences"]), LENGTH_DTYPE)

    def document(self, n: int) -> Document:
        row = self.index[n]
        facts = self._group_facts(int(row["group"]))[int(row["row"])]
        return Document(
            id=facts["id"],
            language=facts["language"],
            source=facts["source"],
            tokens=self.tokens(n),
            sentence_lengths=self.sentence_lengths(n),
            bytes=int(row["bytes"]),
        )

    def _view(self, at: int, count: int, dtype: np.dtype) -> np.ndarray:
        return self._bytes[at : at + count * dtype.itemsize].view(dtype)

    def _group_facts(self, group: int) -> list[dict]:
        if self._facts[0] != group:
            if self._groups is None:
                self._groups = [m for m in tar_members(self.path) if m.name.endswith(".documents.json")]
            member = self._groups[group]
            data = self._bytes[member.offset_data : member.offset_data + member.size].tobytes()
            self._facts = group, json.loads(data)
        return self._facts[1]


class ShardSet:
    """A folder of shards with its manifest."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder = folder
        self.manifest = manifest
        self.settings = SentenceSettings(
            segmenter=manifest["settings"]["segmenter"],
            language=manifest["settings"]["language"],
            max_tokens=manifest["settings"]["max_tokens"],
        )
        self.fingerprint: str = manifest["fingerprint"]
        self.dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
        self._open: OrderedDict[int, Shard] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Raises `UserError` when `folder` holds no manifest, a broken one, or one of a newer format."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not folder.is_dir():
            raise UserError(f"shard folder {folder} does not exist")
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {MANIFEST}: not a shard folder, or `data-prep shard` has not finished"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version = manifest["format_version"]
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise UserError(
                    f"{path} has format version {version}, newer than {FORMAT_VERSION}: update this package"
                )
            if version != FORMAT_VERSION:
                raise UserError(f"{path} has the unknown format version {version!r}; make the shards again")
            for entry in manifest["shards"]:
                for name in (entry["file"], entry["index"]):
                    if name != os.path.basename(name):
                        raise UserError(f"{path} names the file {name!r}, which is not a plain name")
            return cls(folder, manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a shard manifest ({type(error).__name__}: {error})") from error

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards. Raises `UserError` when the folder now holds another one."""
        tokenizer = load_tokenizer(self.folder / TOKENIZER_FOLDER)
        if tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise UserError(f"{self.folder / TOKENIZER_FOLDER} is not the tokenizer that made these shards")
        return tokenizer

    def __len__(self) -> int:
        """Shards."""
        return len(self.manifest["shards"])

    def shard(self, i: int) -> Shard:
        """Shard `i`, memory-mapped; the last few used stay open."""
        if i not in self._open:
            entry = self.manifest["shards"][i]
            self._open[i] = Shard(self.folder / entry["file"], self.folder / entry["index"], self.dtype)
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


def read_index(path: Path) -> np.ndarray:
    """The index rows [documents]. Raises `UserError` when the file is missing, damaged or not an index."""
    try:
        index = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"shard index {path} is missing; restore it or make the shards again") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"shard index {path} is damaged: {error}") from error
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise UserError(f"shard index {path} has another layout than this format's")
    return index


def tar_members(path: Path) -> list[tarfile.TarInfo]:
    """Members of a shard, in order, whole groups. Raises `UserError` on damage, foreign names and links."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            ended = tar.fileobj.seek(0, os.SEEK_END) >= tar.offset
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing; restore it or make the shards again") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"shard {path} is cut short or damaged: {error}") from error
    if not ended:
        raise UserError(f"shard {path} is cut short")
    for n, member in enumerate(members):
        if not MEMBER_NAME.fullmatch(member.name) or not member.isreg():
            raise UserError(f"shard {path} holds a foreign member {member.name!r}")
        expected = f"{n // len(MEMBER_KINDS):06d}.{MEMBER_KINDS[n % len(MEMBER_KINDS)]}"
        if member.name != expected:
            raise UserError(f"shard {path} holds {member.name} where {expected} should be")
    if len(members) % len(MEMBER_KINDS):
        raise UserError(f"shard {path} is cut short: its last group is not whole")
    return members


def index_totals(index: np.ndarray) -> dict[str, int]:
    """Documents, sentences, tokens and bytes of an index."""
    return {"documents": int(index.size)} | {
        name: int(index[name].sum(dtype=np.uint64)) for name in COUNTS[1:]
    }


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is complete or absent, also after a crash."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    _sync_and_rename(partial, path)


def json_bytes(value: object) -> bytes:
    """JSON as all our files hold it: sorted keys, indented, ASCII, so that equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode("ascii")


def _sync_and_rename(partial: Path, path: Path) -> None:
    with open(partial, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes, dtype=np.uint64) - sizes
