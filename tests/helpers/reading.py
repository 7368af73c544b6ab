"""Inputs of data-prep as tests write and read them."""

from __future__ import annotations

import gzip
from pathlib import Path

import zstandard

from data_prep.corpus.compression import DamagedMember
from data_prep.corpus.documents import DocumentReader
from data_prep.corpus.filters import Filters
from data_prep.corpus.finding import find_inputs
from data_prep.corpus.verified import find_damage

GOOD = b'{"id": "a", "content": "One two. \\u4e8c"}'
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": ZSTD}


def read(
    path: Path, data: bytes, language: str = "auto", salvage: bool = False, **rules
) -> tuple[list, DocumentReader]:
    """Write `data` to a file; its documents and rejects without damaged members, and the reader that gave
    them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    (file,) = find_inputs([path])
    try:
        return list(reader := DocumentReader(file, language, Filters(**rules))), reader
    except DamagedMember:
        damage = find_damage(reader.piece)
        return list(reader := DocumentReader(file, language, Filters(**rules), damage, salvage)), reader
