"""Two documents are the same only if all 128 bits of their hashes are."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.corpus import duplicates
from data_prep.corpus.duplicates import find, hash128, write_hashes

A, B = b"\x11" * 8, b"\xee" * 8


@pytest.mark.parametrize("bucketed", [False, True])
def test_all_bits_decide(bucketed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if bucketed:
        monkeypatch.setattr(duplicates, "BUCKETED_ABOVE", 0)
    units = [[A + A, A + B, B + A, A + A], [B + B, A + B, b"\x11" * 7 + b"\x12" + A]]
    files = []
    for number, hashes in enumerate(units):
        files.append(tmp_path / f"{number}")
        write_hashes(files[-1], b"".join(hashes))
    assert [found.tolist() for found in find(files)] == [[3], [1]]


def test_a_hash_has_128_bits_and_all_of_the_text_decides() -> None:
    assert len(hash128(b"a")) == 16
    assert (
        len({hash128(text)[half] for text in (b"a", b"b", b"a ", b"") for half in (slice(8), slice(8, 16))})
        == 8
    )
