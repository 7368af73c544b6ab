"""Key/value caches for generation: one place per sentence in the backbone, one per symbol in the decoder.

`KeyValueCache` stores many rows (texts being generated). Three layouts say where a forward pass writes and
what it attends to. They replace the `SegmentLayout` of training, so the models' layers run unchanged:

CachedPrompt    whole sequences, packed: stored, and attended to as in training
CachedContext   context of new sentences: attended to as in training; the rows that they see are stored
CachedStep      one new place in each of some rows, which sees its own row up to itself
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.common.errors import counted
from pipeline.data.segments import SegmentLayout
from pipeline.models.attention import packed_attention, repeat_heads

FIRST_PLACES = 64  # room for new places when their number is not known
SHORT_ROW = 128  # up to this many places a CPU copies ragged rows into one block instead of one call per row


class KeyValueCache:
    """Keys and values of every layer, [rows, heads, places, d_head] each.

    What one query head reads is contiguous: with heads inside places, attention to a row of 1,450 places
    takes 1.8 times as long. A layer's storage is allocated at its first key and grows up to `most` places a
    row."""

    def __init__(self, rows: int, most: int, places: int = 0):
        self.rows, self.most = rows, most
        self.lengths = np.zeros(rows, dtype=np.int64)  # places used, of every row
        self._places = min(most, places)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, places: int, ahead: int | None = None) -> None:
        """Make room for `places` in every row and `ahead` more; if `ahead` is None, at least double the room.

        Raises: ValueError when `places` is above `most`."""
        if places > self.most:
            raise ValueError(
                f"a row of {counted(places, 'place')}, but the model has {counted(self.most, 'position')}"
            )
        if places <= self._places:
            return
        wanted = max(places, 2 * self._places) if ahead is None else places + ahead
        before, self._places = self._places, min(self.most, wanted)
        for layer, pair in self._layers.items():
            keys, values = (x.new_empty(*x.shape[:2], self._places, x.shape[3]) for x in pair)
            for new, old in zip((keys, values), pair, strict=True):
                new[:, :, :before] = old
            self._layers[layer] = keys, values

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, allocated for rows such as `like` [n, heads, d_head]."""
        if number not in self._layers:
            shape = (self.rows, like.shape[1], self._places, like.shape[2])
            self._layers[number] = (like.new_empty(shape), like.new_empty(shape))
        return self._layers[number]

    def store(
        self, number: int, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, k: Tensor, v: Tensor
    ) -> None:
        """Packed rows [start, end) of k and v [T, H_kv, d_head] into the first places of each of `rows`."""
        keys, values = self.layer(number, k)
        for row, start, end in zip(rows, starts, ends, strict=True):
            keys[row, :, : end - start] = k[start:end].transpose(0, 1)
            values[row, :, : end - start] = v[start:end].transpose(0, 1)

    @property
    def bytes_per_place(self) -> int:
        """Bytes of one place of one row, all layers, by the storage itself."""
        tensors = [x for pair in self._layers.values() for x in pair]
        return sum(x.untyped_storage().nbytes() for x in tensors) // (self.rows * self._places)

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return self.bytes_per_place * self.rows * self._places


class CachedPrompt(SegmentLayout):
    """One whole sequence for each of `rows`, back to back; it replaces what the rows held.

    ahead: places that will follow; room for them now saves a copy of the whole cache later."""

    def __init__(
        self, cache: KeyValueCache, rows: np.ndarray, lengths: np.ndarray, device: torch.device, ahead: int
    ):
        super().__init__(lengths, device)
        self._cache, self._rows = cache, rows
        cache.reserve(self.longest, ahead)
        cache.lengths[rows] = lengths

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """q [T, H, d_head], k and v [T, H_kv, d_head] → [T, H, d_head]."""
        self._cache.store(layer, self._rows, self.starts[:-1], self.starts[1:], k, v)
        k, v = repeat_heads(k, v, q.shape[1])
        return packed_attention(q, k, v, self, causal=True, scale=scale, window=window)


class CachedContext:
    """Context of new sentences in a sentence decoder: attends as in training, and stores the rows that the
    new sentences will see.

    attend: (q, k, v) [R, H, d_head] each → [R, H, d_head], the attention of training. kept: int64 [n, 2], for
    each of `rows` (int64 [n]) the packed rows [first, end) to store.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        rows: np.ndarray,
        kept: np.ndarray,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ):
        self._cache, self._rows, self._kept, self._attend = cache, rows, kept, attend
        counts = kept[:, 1] - kept[:, 0]
        cache.reserve(int(counts.max()), 0)
        cache.lengths[rows] = counts

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As CachedPrompt's."""
        self._cache.store(layer, self._rows, self._kept[:, 0], self._kept[:, 1], k, v)
        return self._attend(q, k, v)


class CachedStep:
    """One more place in each of `rows` (int64 [n], ascending); made once per step, used by every layer.

    Adjacent rows of one length are read in place. Others are attended to together under a mask (few kernels),
    or on a CPU, when long, one by one (no padding, no copy).
    """

    def __init__(self, cache: KeyValueCache, rows: np.ndarray, device: torch.device):
        self._cache, self._rows = cache, rows
        self.lengths = cache.lengths[rows]  # the new place of every row
        self.longest = int(self.lengths.max()) + 1
        cache.reserve(self.longest)
        cache.lengths[rows] += 1
        self.position_of_row = torch.from_numpy(self.lengths).to(device)  # int64 [n]
        first, last = int(rows[0]), int(rows[-1])
        together = last - first + 1 == len(rows) and int(self.lengths.min()) + 1 == self.longest
        self._block = slice(first, last + 1) if together else None
        if not together:
            self._rows_n = torch.from_numpy(rows).to(device)
            places = torch.arange(self.longest, device=device)
            self._mask = (places <= self.position_of_row[:, None])[:, None, None]  # [n, 1, 1, longest]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """q [n, H, d_head], k and v [n, H_kv, d_head] → [n, H, d_head]; with a window only its last places
        are seen."""
        keys, values = self._cache.layer(layer, k)
        window = min(window or self.longest, self.longest)
        shape = q.shape
        # Query heads that share a key head become queries of that head, so keys are not repeated.
        q = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
        if self._block is not None:
            keys[self._block, :, self.longest - 1] = k
            values[self._block, :, self.longest - 1] = v
            seen = slice(max(0, self.longest - window), self.longest)
            k, v = (x[self._block, :, seen] for x in (keys, values))
            return F.scaled_dot_product_attention(q, k, v, scale=scale).reshape(shape)
        # The indexed dimensions are not adjacent, so torch puts them first: [n, H_kv, d_head], as k and v
        # are.
        keys[self._rows_n, :, self.position_of_row] = k
        values[self._rows_n, :, self.position_of_row] = v
        if q.device.type == "cpu" and self.longest > SHORT_ROW:
            outs = []
            for n, (row, at) in enumerate(zip(self._rows, self.lengths, strict=True)):
                k, v = (x[row, None, :, max(0, at + 1 - window) : at + 1] for x in (keys, values))
                outs.append(F.scaled_dot_product_attention(q[n : n + 1], k, v, scale=scale))
            out = torch.cat(outs)
        else:
            out = self.attend_masked(q, keys, values, scale, window)
        return out.reshape(shape)

    def attend_masked(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None = None
    ) -> Tensor:
        """q [n, H_kv, queries, d_head] over ragged rows of the storage → as q."""
        k, v = (x[self._rows_n, :, : self.longest] for x in (keys, values))
        # Places behind a row's end may hold anything, even NaN, which neither a score of -inf nor a weight of
        # 0 removes.
        behind = ~self._mask[:, 0, 0, None, :, None].expand(-1, 1, -1, 1)
        k, v = k.masked_fill(behind, 0), v.masked_fill(behind, 0)
        mask = self._mask
        if window is not None and window < self.longest:
            places = torch.arange(self.longest, device=q.device)
            mask = mask & (places > self.position_of_row[:, None] - window)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
