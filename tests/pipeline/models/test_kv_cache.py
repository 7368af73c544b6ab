"""The caches keep what was stored, and a new place sees its own row up to itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.models import kv_cache
from pipeline.models.kv_cache import CachedPrompt, CachedStep, KeyValueCache, StaticStep


def test_a_growing_cache_keeps_every_place() -> None:
    cache = KeyValueCache(rows=2, most=64, places=3)
    k, v = torch.randn(6, 2, 4), torch.randn(6, 2, 4)
    rows, starts, ends = np.arange(2), np.array([0, 3]), np.array([3, 6])
    for layer in (0, 1):
        cache.store(layer, rows, starts, ends, k + layer, v + layer)
    for places, ahead in ((4, None), (20, 0), (21, 5)):
        cache.reserve(places, ahead)
        for layer in (0, 1):
            keys, values = cache.layer(layer, k)
            assert keys.shape[2] >= places
            for stored, given in ((keys, k), (values, v)):
                found = stored[:, :, :3].transpose(1, 2).flatten(0, 1)
                assert torch.equal(found, given + layer)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """q [H, d] over k and v [places, H_kv, d], in float64."""
    groups = q.shape[0] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("hd,phd->hp", q.double(), k) * (scale or q.shape[1] ** -0.5)
    return torch.einsum("hp,phd->hd", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("short", [True, False])  # ragged rows in one block, or one call per row
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("some", [[0, 1, 2, 3], [1, 3], [1, 2], [2]])
def test_a_step_sees_its_own_row_up_to_itself(
    some: list[int], scale: float | None, short: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of other lengths, then steps of some rows; what is not stored yet is large."""
    monkeypatch.setattr(kv_cache, "SHORT_ROW", 128 if short else 0)
    torch.manual_seed(0)
    lengths, rows, layer = np.array([3, 1, 1, 5]), np.arange(4), 7
    cache = KeyValueCache(4, most=40, places=8)
    for stored in cache.layer(layer, torch.empty(1, 2, 8)):
        stored.fill_(1e4)
    q, (k, v) = torch.randn(10, 4, 8), torch.randn(2, 10, 2, 8)
    prompt = CachedPrompt(cache, rows, lengths, torch.device("cpu"), 0)
    found = prompt.attend(layer, q, k, v, scale)
    seen = [
        list(zip(k[a:b], v[a:b], strict=True)) for a, b in zip(prompt.starts, prompt.starts[1:], strict=False)
    ]
    for row, start in enumerate(prompt.starts[:-1]):
        for place in range(lengths[row]):
            keys, values = (torch.stack(x) for x in zip(*seen[row][: place + 1], strict=True))
            expected = by_hand(q[start + place], keys, values, scale)
            torch.testing.assert_close(found[start + place].double(), expected, atol=1e-5, rtol=1e-4)
    for _ in range(6):  # the storage grows in between
        q, (k, v) = torch.randn(len(some), 4, 8), torch.randn(2, len(some), 2, 8)
        step = CachedStep(cache, np.asarray(some), torch.device("cpu"))
        assert step.position_of_row.tolist() == [len(seen[row]) for row in some]
        found = step.attend(layer, q, k, v, scale, window)
        for n, row in enumerate(some):
            seen[row].append((k[n], v[n]))
            keys, values = (torch.stack(x) for x in zip(*seen[row][-(window or 99) :], strict=True))
            expected = by_hand(q[n], keys, values, scale)
            torch.testing.assert_close(found[n].double(), expected, atol=1e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [len(places) for places in seen]


@pytest.mark.parametrize("window", [None, 3])
def test_a_static_step_sees_what_a_step_sees(window: int | None) -> None:
    caches = [KeyValueCache(2, most=8, places=8) for _ in range(2)]
    for cache in caches:
        for stored in cache.layer(0, torch.empty(1, 2, 8)):
            stored.zero_()
    for place in range(6):
        q, (k, v) = torch.randn(2, 4, 8), torch.randn(2, 2, 2, 8)
        step = CachedStep(caches[0], np.arange(2), torch.device("cpu"))
        at = torch.full((2,), place)
        found = StaticStep(caches[1], at, at).attend(0, q, k, v, window=window)
        torch.testing.assert_close(found, step.attend(0, q, k, v, window=window))


def test_a_row_beyond_its_most_places_is_refused() -> None:
    cache = KeyValueCache(1, most=4)
    cache.reserve(4)
    with pytest.raises(ValueError, match="5 places, but the model has 4"):
        cache.reserve(5)
