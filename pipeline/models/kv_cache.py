"""Key/value caches for generation: one place per sentence in the backbone, one per symbol in the decoder.

`KeyValueCache` stores many rows (texts being generated), on CPUs and GPUs alike. Layouts say where a forward
pass writes and what it attends to. They replace the `SegmentLayout` of training:

CachedPrompt    whole sequences, packed: stored, and attended to as in training
CachedContext   context of new sentences: attended to as in training; the rows that they see are stored
CachedStep      one new place in each of some rows, which sees its own row up to itself
StaticStep      the same for the first rows of a cache; all shapes depend on the cache alone, so that a GPU
                can replay a step as one graph
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.common.errors import counted
from pipeline.data.segments import LANES, SegmentLayout, up_to_lanes
from pipeline.generation.upload import upload
from pipeline.models.attention import packed_attention, repeat_heads

FIRST_PLACES = 64  # room for new places when their number is not known
_attention = F.scaled_dot_product_attention
SHORT_ROW = 128  # up to this many places a CPU reads ragged rows in one call instead of one call per row
KEYS = 512  # that torch's kernel reads at a time
QUERIES = 64  # of one call: kernels divide the keys otherwise for 192 and more


class KeyValueCache:
    """Keys and values of every layer, [rows, heads, places, d_head] each.

    What one query head reads is contiguous: with heads inside places, attention to a row of 1,450 places
    takes 1.8 times as long. A layer's storage is allocated at its first key and grows up to `most` places a
    row; one more place takes what a `StaticStep` writes for a full row. What a row has not stored is zero, or
    from an earlier text: finite."""

    def __init__(self, rows: int, most: int, places: int = 0):
        self.rows, self.most = rows, most
        self.lengths = np.zeros(rows, dtype=np.int64)  # places used, of every row
        self.steady = False  # a row's attention has the same bits in any batch
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
            keys, values = (x.new_zeros(*x.shape[:2], self.stored_places, x.shape[3]) for x in pair)
            for new, old in zip((keys, values), pair, strict=True):
                new[:, :, :before] = old[:, :, :before]
            self._layers[layer] = keys, values

    @property
    def places(self) -> int:
        """Places of every row for which there is room."""
        return self._places

    @property
    def stored_places(self) -> int:
        """Places of every row in the storage."""
        return up_to_lanes(self._places + 1)

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, allocated for rows such as `like` [n, heads, d_head]."""
        found = self._layers.get(number)
        if found is None:
            shape = (self.rows, like.shape[1], self.stored_places, like.shape[2])
            found = self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return found

    def store(
        self, number: int, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, k: Tensor, v: Tensor
    ) -> None:
        """Packed rows [start, end) of k and v [T, H_kv, d_head] into the first places of each of `rows`."""
        self.store_at(number, self.targets(rows, starts, ends, k.device), k, v)

    def targets(
        self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, device: torch.device, first: Any = 0
    ) -> Tensor:
        """int64 [3, N]: packed rows, and the row and place of the cache that each goes to; `first`: place of
        each of `rows`' first."""
        counts = ends - starts
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        targets = np.stack([np.repeat(starts, counts) + place, np.repeat(rows, counts), place])
        targets[2] += np.repeat(np.broadcast_to(first, rows.shape), counts)
        return upload(targets, device)

    def taken(self, rows: Tensor, places: Tensor) -> Tensor:
        """Places of some rows (int64 [N] each), [N, layers, 2, H_kv, d_head]: what `restore` puts back."""
        pairs = [
            torch.stack([x[rows, :, places] for x in self._layers[layer]], 1)
            for layer in sorted(self._layers)
        ]
        return torch.stack(pairs, 1)

    def restore(self, rows: np.ndarray, lengths: np.ndarray, taken: Tensor) -> None:
        """The first `lengths` places of each of `rows`, one row after the other."""
        ends = np.cumsum(lengths)
        self.reserve(int(lengths.max()), FIRST_PLACES)
        targets = self.targets(rows, ends - lengths, ends, taken.device)
        for layer, pair in enumerate(taken.unbind(1)):
            self.store_at(layer, targets, *pair.unbind(1))

    def store_at(self, number: int, targets: Tensor, k: Tensor, v: Tensor) -> None:
        """k and v [T, H_kv, d_head] by `targets`, one call each."""
        source, rows, places = targets
        everything = len(source) == len(k)
        for stored, new in zip(self.layer(number, k), (k, v), strict=True):
            # The indexed dimensions are not adjacent, so torch puts them first, as they are in k and v.
            stored[rows, :, places] = new if everything else new.index_select(0, source)

    @property
    def bytes_per_place(self) -> int:
        """Bytes of one place of one row, all layers, by the storage itself."""
        tensors = [x for pair in self._layers.values() for x in pair]
        return sum(x.untyped_storage().nbytes() for x in tensors) // (self.rows * self.stored_places)

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return self.bytes_per_place * self.rows * self.stored_places


class RollingCache(KeyValueCache):
    """Keys and values of the last places of every row: at least `keep` of them, from `roll` on.

    dropped: int64 [rows], host: places that a row has had before those it holds."""

    def __init__(self, rows: int, keep: int):
        super().__init__(rows, most=2 * keep, places=2 * keep)
        self.keep = keep
        self.dropped = np.zeros(rows, dtype=np.int64)

    @property
    def positions(self) -> np.ndarray:
        """int64 [rows]: all places that each row has had."""
        return self.dropped + self.lengths

    def start(self, rows: np.ndarray, places: np.ndarray) -> None:
        """Start rows that have had `places` (int64 [n]), of which the last `keep` at most are stored."""
        self.lengths[rows] = np.minimum(places, self.keep)
        self.dropped[rows] = places - self.lengths[rows]

    def roll(self, rows: np.ndarray) -> None:
        """Make room for one more place in each of `rows`."""
        for row in rows[self.lengths[rows] == self.most]:
            for keys, values in self._layers.values():
                for stored in (keys, values):
                    stored[row, :, : self.keep] = stored[row, :, self.most - self.keep : self.most]
            self.dropped[row] += self.most - self.keep
            self.lengths[row] = self.keep


def attend_last(
    q: Tensor, stored: tuple[Tensor, Tensor], rows: Tensor, ends: Tensor, width: int, scale: float | None
) -> Tensor:
    """Queries [n, H_kv, queries, d_head] of `rows` attend to the last `width` places before `ends` → as q.
    By tensors on the device (int64 [n] each), for a graph."""
    places = ends[:, None] - width + torch.arange(width, device=q.device)
    # Indexed dimensions that are not adjacent come first: [n, width, H_kv, d_head].
    k, v = (x[rows[:, None], :, places.clamp_min(0)].transpose(1, 2) for x in stored)
    return _attention(q, k, v, (places >= 0)[:, None, None], scale=scale)


@lru_cache(maxsize=32)
def _strip(places: int, shown: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`shown` zeros between `places` times -inf on both sides."""
    with torch.inference_mode(False):  # later calls reuse it, maybe outside inference mode
        strip = torch.full((2 * places + shown,), -torch.inf, device=device, dtype=dtype)
        strip[places : places + shown] = 0
        return strip


def seen(ends: np.ndarray, window: int | None, first: int, width: int, like: Tensor) -> Tensor:
    """[n, 1, 1, width], to be added to scores: 0 at the last `window` places (None: all) before each of
    `ends`, else -inf. The first column is place `first`."""
    places = 1 << max(6, int(max(first + width, ends.max())).bit_length())
    shown = places if window is None else min(window, places)
    strip = _strip(places, shown, like.device, like.dtype)
    at = places + shown + first - ends
    if len(at) == 1:
        return strip[at[0] : at[0] + width][None, None, None]
    return strip.unfold(0, width, 1)[upload(at, like.device)][:, None, None]


def first_read(end: int, first: int) -> int:
    """The first place that is read for keys from `first` to before `end`."""
    return first // LANES * LANES if end <= KEYS else first // KEYS * KEYS


class Reading:
    """How queries of `rows` (int64 [n], ascending) read the last `window` places (None: all) before `ends`
    (int64 [n]) of a layer's storage; made once per step. In place, with rows between them that are not asked
    for, if that is less than a copy; on a CPU long rows one by one, without padding."""

    def __init__(self, rows: np.ndarray, ends: np.ndarray, window: int | None, like: Tensor):
        count, longest = len(rows), int(ends.max())
        self._first_row, self._span = int(rows[0]), int(rows[-1]) - int(rows[0]) + 1
        self._each: list[Reading] = []
        if window is None and count > 1 and longest > SHORT_ROW and like.device.type == "cpu":
            self._each = [Reading(rows[n : n + 1], ends[n : n + 1], None, like) for n in range(count)]
            return
        self._first = 0 if window is None else first_read(longest, max(0, int(ends.min()) - window))
        self._width = up_to_lanes(longest) - self._first
        self._copied: Tensor | None = None
        self._asked: Tensor | None = None
        if self._span > 2 * count:
            self._copied = upload(rows, like.device)
        elif self._span > count:
            self._asked = upload(rows - self._first_row, like.device)
            some, ends = ends, np.ones(self._span, dtype=np.int64)
            ends[rows - self._first_row] = some
        self._mask = seen(ends, window, self._first, self._width, like)

    def attend(self, q: Tensor, stored: tuple[Tensor, Tensor], scale: float | None) -> Tensor:
        """q [n, H_kv, queries, d_head] → the same."""
        if self._each:
            parts = zip(q.split(1), self._each, strict=True)
            return torch.cat([one.attend(part, stored, scale) for part, one in parts])
        k, v = (x.narrow(2, self._first, self._width) for x in stored)
        if self._copied is not None:
            return _attention(q, k[self._copied], v[self._copied], self._mask, scale=scale)
        k, v = (x.narrow(0, self._first_row, self._span) for x in (k, v))
        if self._asked is None:
            return _attention(q, k, v, self._mask, scale=scale)
        wide = q.new_zeros(self._span, *q.shape[1:])
        wide[self._asked] = q
        return _attention(wide, k, v, self._mask, scale=scale)[self._asked]


def attend_past(
    q: Tensor, k: Tensor, v: Tensor, past: int, scale: float | None, window: int | None
) -> Tensor:
    """Queries [T, H, d_head] behind `past` places attend to those and to their own past, in keys and values
    [H_kv, places, d_head] → as q. A query's bits do not depend on how many are read with it."""
    count, outs = len(q), []
    for start in range(0, count, QUERIES):
        part = q[start : start + QUERIES]
        rows, end = len(part), past + start + len(part)
        first = 0 if window is None else first_read(end, max(0, past + start + 1 - window))
        width = up_to_lanes(end) - first
        # Products of one to three queries add in another order.
        ends = np.minimum(np.arange(past + start + 1, past + start + 1 + -(-rows // 4) * 4), end)
        part = F.pad(part, (0, 0, 0, 0, 0, len(ends) - rows)).transpose(0, 1)[None]
        mask = seen(ends, window, first, width, q).transpose(0, 2)
        k_1, v_1 = (x.narrow(1, first, width) for x in (k, v))
        if q.shape[1] > len(k):
            k_1, v_1 = (x.repeat_interleave(q.shape[1] // len(k), 0) for x in (k_1, v_1))
        outs.append(_attention(part, k_1[None], v_1[None], mask, scale=scale)[0, :, :rows].transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class CachedPrompt(SegmentLayout):
    """One whole sequence for each of `rows`, back to back; it replaces what the rows held.

    ahead: places that will follow; room for them now saves a copy of the whole cache later. past: int64 [n],
    places of each row that are stored already and come before the sequence."""

    def __init__(
        self,
        cache: KeyValueCache,
        rows: np.ndarray,
        lengths: np.ndarray,
        device: torch.device,
        ahead: int,
        past: np.ndarray | None = None,
    ):
        super().__init__(lengths, device)
        self._cache, self._rows = cache, rows
        self._past = None if past is None or not past.any() else past
        ends = self.lengths if self._past is None else self._past + self.lengths
        cache.reserve(int(ends.max()), ahead)
        cache.lengths[rows] = ends
        first = 0 if self._past is None else self._past
        self.targets = cache.targets(rows, self.starts[:-1], self.starts[1:], device, first)

    @cached_property
    def position_of_row(self) -> Tensor:
        """int64 [T]: the place of every row in its sequence."""
        return self.targets[2]

    @property
    def at(self) -> Tensor:
        """The places as an index of a table by position."""
        return self.targets[2]

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
        self._cache.store_at(layer, self.targets, k, v)
        if self._past is None and not self._cache.steady:
            k, v = repeat_heads(k, v, q.shape[1])
            return packed_attention(q, k, v, self, causal=True, scale=scale, window=window)
        keys, values = self._cache.layer(layer, k)
        past = np.zeros_like(self._rows) if self._past is None else self._past
        parts = zip(self._rows.tolist(), past.tolist(), self.starts[:-1], self.starts[1:], strict=True)
        return torch.cat(
            [
                attend_past(q[start:end], keys[row], values[row], before, scale, window)
                for row, before, start, end in parts
            ]
        )


class CachedContext:
    """Context of new sentences in a sentence decoder: attends as in training, and stores the rows that the
    new sentences will see.

    attend: (q, k, v, …) [R, H, d_head] each → [R, H, d_head], the attention of training. kept: int64 [n, 2],
    for each of `rows` (int64 [n]) the packed rows [first, end) to store.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        rows: np.ndarray,
        kept: np.ndarray,
        attend: Callable[..., Tensor],
        device: torch.device,
    ):
        self._cache, self._attend = cache, attend
        counts = kept[:, 1] - kept[:, 0]
        cache.reserve(int(counts.max()), 0)
        cache.lengths[rows] = counts
        self._targets = cache.targets(rows, kept[:, 0], kept[:, 1], device)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """As CachedPrompt's."""
        self._cache.store_at(layer, self._targets, k, v)
        settings = {"scale": scale, "window": window}
        return self._attend(q, k, v, **{name: one for name, one in settings.items() if one is not None})


class CachedStep:
    """One more place in each of `rows` (int64 [n], ascending); made once per step, used by every layer.

    Rows are read in place under a mask; on a CPU, when long, one by one (no padding)."""

    def __init__(self, cache: KeyValueCache, rows: np.ndarray, device: torch.device):
        self._cache, self._rows, self._device = cache, rows, device
        self._ends = cache.lengths[rows] + 1
        self.longest = int(self._ends.max())
        cache.reserve(self.longest)
        cache.lengths[rows] = self._ends
        self._same = len(rows) == 1 or int(self._ends.min()) == self.longest
        self._first, self._rows_n = int(rows[0]), None if len(rows) == 1 else upload(rows, device)
        self._readings: dict[int | None, Reading] = {}

    @cached_property
    def position_of_row(self) -> Tensor:
        """int64 [n]: the new place of every row."""
        return upload(self._ends - 1, self._device)

    @property
    def at(self) -> slice | Tensor:
        """The new places as an index of a table by position."""
        return slice(self.longest - 1, self.longest) if self._same else self.position_of_row

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
        stored, shape, longest = self._cache.layer(layer, k), q.shape, self.longest
        # Query heads that share a key head become queries of that head, so keys are not repeated.
        q = q.reshape(shape[0], k.shape[1], -1, shape[2])
        for places, new in zip(stored, (k, v), strict=True):
            if self._rows_n is None:
                places.select(0, self._first).select(1, longest - 1).copy_(new[0])
            else:
                # The indexed dimensions are not adjacent, so torch puts them first: as k and v are.
                places[self._rows_n, :, self.position_of_row] = new
        if self._rows_n is None and not self._cache.steady:
            first = longest - window if window is not None and window < longest else 0
            keys, values = (x.narrow(0, self._first, 1).narrow(2, first, longest - first) for x in stored)
            return _attention(q, keys, values, scale=scale).reshape(shape)
        if (reading := self._readings.get(window)) is None:
            reading = self._readings[window] = Reading(self._rows, self._ends, window, q)
        return reading.attend(q, stored, scale).reshape(shape)


class StaticStep:
    """One more place in each of the first n rows of a cache, at `place_n` and of position `at` (int64 [n],
    on the device); the host counts the places.

    A row that takes no part writes behind its end, where its next place will be."""

    def __init__(self, cache: KeyValueCache, place_n: Tensor, at: Tensor):
        self._cache, self._place_n, self.at, self.longest = cache, place_n, at, cache.places
        self.position_of_row = at
        places = torch.arange(cache.stored_places, device=place_n.device)
        self._distance = place_n[:, None] - places  # [n, stored places]
        self._seen: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._seen:
            seen = self._distance >= 0
            if window is not None:
                seen &= self._distance < window
            self._seen[window] = seen[:, None, None]
        return self._seen[window]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """As CachedStep's. What a row has not stored is zero, or from an earlier text: finite."""
        keys, values = (x[: len(q)] for x in self._cache.layer(layer, k))
        index = self._place_n[:, None, None, None].expand(-1, k.shape[1], 1, k.shape[2])
        for places, new in ((keys, k), (values, v)):
            places.scatter_(2, index, new[:, :, None])
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])
        return _attention(grouped, keys, values, self._mask(window), scale=scale).reshape(q.shape)
