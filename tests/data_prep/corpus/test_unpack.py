"""Unpacking as a stream: the same bytes as the libraries give, all that can be had of a damaged file, and no
more memory than a few chunks."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib

import pytest
import zstandard

from data_prep.corpus.unpack import OUT_BYTES, TarMembers, Unpacked


def prose(seed: int, words: int) -> bytes:
    chance = random.Random(seed)
    known = [bytes(chance.choices(b"etaoinshrdlu", k=chance.randint(1, 9))) for _ in range(3000)]
    return b" ".join(chance.choices(known, k=words))


def unpacked(data: bytes, packing: str, step: int = 1 << 20) -> tuple[bytes, str | None]:
    stream = Unpacked((data[n : n + step] for n in range(0, len(data), step)), packing)
    return b"".join(stream), stream.damage


@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
def test_whole_files(step: int):
    text = prose(1, 40_000)
    assert unpacked(gzip.compress(text) * 2, "gz", step) == (text * 2, None)
    assert unpacked(zstandard.ZstdCompressor().compress(text) * 2, "zst", step) == (text * 2, None)
    assert unpacked(text, "", step) == (text, None)


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_what_is_stored_is_used_up_after_damage(packing: str):
    stored = iter([b"neither of both", b"more", b"end"])
    stream = Unpacked(stored, packing)
    assert b"".join(stream) == b"" and stream.damage and list(stored) == []


def salvage(data: bytes) -> bytes:
    """What a gzip decoder that is fed byte by byte gives before it meets damage."""
    decoder = zlib.decompressobj(wbits=31)
    plain = []
    for n in range(len(data)):
        try:
            plain.append(decoder.decompress(data[n : n + 1]))
        except zlib.error:
            break
    return b"".join(plain)


def test_a_damaged_gzip_file_gives_every_byte_before_the_damage():
    text = prose(2, 40_000)
    whole = gzip.compress(text)
    chance = random.Random(2)
    damaged = 0
    for _ in range(40):
        at = chance.randrange(len(whole))
        data = bytearray(whole)
        data[at : at + 8] = chance.randbytes(8)
        for step in (5000, 1 << 20):
            plain, damage = unpacked(bytes(data), "gz", step)
            assert plain == salvage(data)
            damaged += damage is not None
    assert damaged > 70  # time stamps in the header may change without harm


def test_a_damaged_zstd_file_gives_every_block_before_the_damage():
    text = prose(3, 200_000)
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(text)
    for n in range(1, 20):
        at = len(whole) * n // 20
        plain, damage = unpacked(whole[:at], "zst")
        # A block holds 128 kB of text.
        assert damage == "the zstd file ends too early" and text.startswith(plain)
        assert len(plain) >= len(text) * n / 20 - 140_000
        data = bytearray(whole)
        data[at : at + 9] = bytes(9)
        plain, damage = unpacked(bytes(data), "zst")
        sure = max(0, len(text) * n // 20 - 140_000)
        assert damage.startswith("damaged zstd data") and plain[:sure] == text[:sure]


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_memory_is_bounded_whatever_a_file_claims(packing: str):
    if packing == "gz":
        packer = zlib.compressobj(wbits=31)
        data = b"".join([packer.compress(bytes(1 << 20)) for _ in range(300)]) + packer.flush()
    else:
        packer = zstandard.ZstdCompressor().compressobj()
        data = b"".join([packer.compress(bytes(1 << 20)) for _ in range(300)]) + packer.flush()
    assert len(data) < 1 << 20
    tracemalloc.start()
    stream = Unpacked([data], packing)
    assert sum(map(len, stream)) == 300 << 20 and stream.damage is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * OUT_BYTES


def test_an_archive_that_claims_sizes_without_end():
    header = bytearray(512)
    header[:7] = b"x.jsonl"
    header[124:136] = b"\x80" + b"\xff" * 11  # 2 to the power of 88, as a number that is not octal
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[148:156] = b"%06o\0 " % sum(header)
    archive = TarMembers([bytes(header), b"content"])
    assert [(member.name, b"".join(member.content)) for member in archive] == [("x.jsonl", b"content")]
    assert archive.damage == "the tar archive ends too early"
