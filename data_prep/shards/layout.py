"""The shard format: names, types, members and index of a shard set (docs/shard-format.md)."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.common.errors import UserError
from data_prep.common.files import json_bytes
from data_prep.corpus.compression import MARKS

FORMAT_VERSION = 3
MARKED_VERSION = 4  # of a set with marked documents; readers take both
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
TOKENIZER_FOLDER = "tokenizer"
UNFINISHED = ".unfinished"
PLAN = "plan.json"  # in UNFINISHED

# A group ends at 256 documents or with the document that fills its arrays: small enough to unpack and search
# in under a millisecond, large enough that headers are less than 1 %.
GROUP_DOCUMENTS = 256
GROUP_BYTES = 512_000
COUNTS = ("documents", "sentences", "tokens", "bytes")
SHARD_ENDINGS = {"file": ".tar", "index": ".index.npy"}  # by the manifest's key
COMPRESSIONS = ("none", "zstd")
ZSTD_LEVEL = 3

# One row per document, in the order of the tar. `*_at` are byte offsets: in the tar file, or in the unpacked
# member where members are compressed. `group` and `row`: the members, and the place in them, of the document.
# `text_hash` and `key_hash`: `hash64` of the text in UTF-8 and of the id. `checksum`: CRC-32 of the stored
# tokens and sentence lengths.
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
# Of a shard with marked documents. `mark`: how far the text can be trusted (`MARKS`).
MARKED_DTYPE = np.dtype([*INDEX_DTYPE.descr, ("mark", "u1")])

LENGTH_DTYPE = np.dtype("<u2")
MEMBER_KINDS = ("tokens.npy", "sentence_lengths.npy", "document_sizes.npy", "documents.json")
_CHECKSUM = re.compile(rb'^ "checksum": "([0-9a-f]{64})",\n', re.MULTILINE)  # of `json_bytes`
_MEMBER_NAME = re.compile(rf"(\d{{6,}})\.({'|'.join(map(re.escape, MEMBER_KINDS))})(\.zst)?")


@dataclass(frozen=True)
class Document:
    """One stored document: tokens uint16/uint32 [T]; sentence_lengths uint16 [S], sum T; bytes of text.

    text_hash: `hash64` of the text, the same under any tokenizer. mark: how far the text can be trusted.
    confidence: that the language is right (0 to 1), where it was identified.
    """

    id: str
    language: str
    source: str
    tokens: np.ndarray
    sentence_lengths: np.ndarray
    bytes: int
    text_hash: int
    mark: int = 0
    confidence: float | None = None

    def facts(self) -> dict:
        """What `documents.json` holds."""
        found = {"id": self.id, "language": self.language, "source": self.source}
        return found if self.confidence is None else found | {"confidence": self.confidence}

    def sentences(self) -> list[np.ndarray]:
        """The S slices of `tokens`."""
        return np.split(self.tokens, np.cumsum(self.sentence_lengths[:-1], dtype=np.int64))


class Member(NamedTuple):
    """One member of a shard's tar: its name, and offset and size of its data in the file."""

    name: str
    data_at: int
    size: int


class Group(NamedTuple):
    """One group of D documents: tokens uint16/uint32 [T], sentence_lengths uint16 [S], document_sizes uint32
    [D] (sentences in each), facts: D dictionaries, `Document.facts`."""

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_sizes: np.ndarray
    facts: list[dict]


def shard_names(number: int) -> dict[str, str]:
    """File names of a shard by the manifest's key."""
    return {key: f"shard-{number:06d}{ending}" for key, ending in SHARD_ENDINGS.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32 (little-endian)."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def hash64(data: bytes) -> int:
    """The first 8 bytes of BLAKE2b: for look-up and splitting, not for security."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def seal_manifest(manifest: dict) -> dict:
    """The manifest with its checksum: sha256 over `json_bytes` of all other keys."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return content | {"checksum": hashlib.sha256(json_bytes(content)).hexdigest()}


def is_sealed(data: bytes) -> bool:
    """Whether these are the bytes of a manifest as it was sealed. (To encode it again takes ten times the
    memory.)"""
    found = _CHECKSUM.search(data)
    if found is None:
        return False
    digest = hashlib.sha256(data[: found.start()])
    digest.update(memoryview(data)[found.end() :])
    return digest.hexdigest().encode("ascii") == found[1]


def read_index(path: Path, sha256: str | None = None) -> np.ndarray:
    """The index rows [documents], read-only. Raises `UserError` when the file is missing, damaged (another
    sha256) or not an index."""
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
    if index.dtype not in (INDEX_DTYPE, MARKED_DTYPE):
        raise UserError(f"shard index {path} has another layout than this format's")
    return index


def tar_members(path: Path) -> list[Member]:
    """Members of a shard in complete groups. Raises `UserError` on damage, unknown names and links."""
    return _walk(_map_file(path), path)


def unpack_zstd(data: bytes) -> bytes:
    """One zstd frame, unpacked. Raises `ValueError` when it is damaged."""
    import zstandard

    try:
        return zstandard.ZstdDecompressor().decompress(data)
    except (zstandard.ZstdError, MemoryError) as error:  # a damaged frame may name any size
        raise ValueError(str(error) or "no memory for it") from error


def _map_file(path: Path) -> np.ndarray:
    try:
        # A plain array: slices of a memmap object cost microseconds each, and readers make millions.
        data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        return data.view(np.ndarray)
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing; restore it or make the shards again") from None


def _walk(data: np.ndarray, path: Path) -> list[Member]:
    """Every member of a shard's tar. Reads only the headers, and checks each."""
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


def index_totals(index: np.ndarray) -> dict[str, int]:
    """Documents, sentences, tokens and bytes of an index."""
    return {"documents": int(index.size)} | {
        name: int(index[name].sum(dtype=np.uint64)) for name in COUNTS[1:]
    }


def count_marks(index: np.ndarray) -> dict[str, int]:
    """Marked documents of an index by mark; empty when there are none."""
    marks = index["mark"] if index.dtype == MARKED_DTYPE else np.empty(0, np.uint8)
    counts = {name: int(np.count_nonzero(marks & bit)) for bit, name in MARKS.items()}
    return {name: count for name, count in counts.items() if count}


def _checksum(tokens: np.ndarray, sentence_lengths: np.ndarray) -> int:
    return zlib.crc32(sentence_lengths.data, zlib.crc32(tokens.data))


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of the array as an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes, dtype=np.uint64) - sizes


def fingerprint(*values: object) -> str:
    """sha256 (hex) over the JSON of `values`."""
    return hashlib.sha256(json_bytes(values)).hexdigest()
