"""Streamed text: whole characters, up to the first stop string, wherever the bytes are split."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.generation.results import TextStream

ALPHABET = "aab c.é他🙂"
STOPS = [(), ("c",), ("ab", "a."), ("é", "他", ". "), ("aa", "a", "aab"), ("b c", "c"), ("🙂a", "a🙂", "🙂")]


@pytest.mark.parametrize("stop", STOPS)
def test_the_stream_ends_at_the_first_stop_string_of_the_text_so_far(stop: tuple[str, ...]) -> None:
    rng, stopped = np.random.default_rng(6), 0
    for _ in range(150):
        text = "".join(rng.choice(list(ALPHABET), rng.integers(0, 25)))
        data = text.encode()
        ends = np.unique([0, *rng.integers(0, len(data) + 1, rng.integers(0, 9)), len(data)])
        stream, found = TextStream(stop), ""
        for start, end in zip(ends, ends[1:], strict=False):
            found += stream.push(data[start:end])
            so_far = data[:end].decode(errors="ignore")
            places = [at for one in stop if (at := so_far.find(one)) >= 0]
            assert stream.stopped == bool(places)
            if places:
                stopped += 1
                assert found == so_far[: min(places)]
                break
            # What is out cannot be taken back, and only what may become a stop string is held.
            held = so_far.removeprefix(found)
            assert so_far.startswith(found) and (not held or any(one.startswith(held) for one in stop))
        else:
            assert found + stream.push(b"", final=True) == text
    assert bool(stopped) == bool(stop)
