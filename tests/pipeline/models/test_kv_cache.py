"""The key/value cache keeps what was stored when it grows."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.models.kv_cache import KeyValueCache


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
