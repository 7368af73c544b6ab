"""Starts of prompts that have been read: what a model keeps of each sentence, keyed by the text up to it."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch

Entry = tuple[torch.Tensor, ...]
MOST_BYTES = 256 << 20


class PrefixCache:
    """One entry a sentence, of one model; of more than `most_bytes` the entries used longest ago go.

    The first entry is that of an empty document. Use it for one model with the same weights only.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @staticmethod
    def keys(document: list[list[int]]) -> list[bytes]:
        """Of the empty document and of each sentence, with all before it."""
        keys = [b""]
        for sentence in document:
            tokens = np.asarray(sentence, dtype=np.int64).tobytes()
            keys.append(hashlib.blake2b(keys[-1] + tokens, digest_size=16).digest())
        return keys

    def find(self, keys: Iterable[bytes]) -> list[Entry]:
        """The entries of the first keys, up to the first that is not here."""
        found: list[tuple[bytes, Entry]] = []
        with self._lock:
            for key in keys:
                if (entry := self._entries.get(key)) is None:
                    break
                found.append((key, entry))
            # A sentence is of no use without those before it: it goes first.
            for key, _ in reversed(found):
                self._entries.move_to_end(key)
        return [entry for _, entry in found]

    def add(self, keys: Sequence[bytes], entries: Sequence[Entry]) -> None:
        """Entries of consecutive sentences of a document."""
        with self._lock:
            for key, entry in reversed(list(zip(keys, entries, strict=True))):
                if key in self._entries:
                    continue
                self._entries[key] = entry
                self.bytes += _size(entry)
            while self.bytes > self.most_bytes:
                self.bytes -= _size(self._entries.popitem(last=False)[1])


def _size(entry: Entry) -> int:
    return sum(part.nbytes for part in entry)
