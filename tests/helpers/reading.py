"""Inputs of data-prep as tests write and read them."""

from __future__ import annotations

import gzip
from pathlib import Path

import zstandard

from data_prep.corpus.documents import DocumentReader
from data_prep.corpus.filters import Filters
from data_prep.corpus.finding import find_inputs

GOOD = b'{"id": "a", "content": "One two. \\u4e8c"}'
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(path: Path, data: bytes, language: str = "auto", **rules) -> tuple[list, DocumentReader]:
    """Write `data` to a file; its documents and rejects, and the reader that gave them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    reader = DocumentReader(find_inputs([path])[0], language, Filters(**rules))
    return list(reader), reader
