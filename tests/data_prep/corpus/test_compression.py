"""Packed files as verified members: the bytes that the libraries give, nothing of a member that fails, all
that can be had of it on request, and no more memory than a few chunks."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
import zstandard

from data_prep.corpus.compression import SALVAGED, UNVERIFIED, DamagedMember, Unpacked, find_damage

ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress
PACK = {"gz": gzip.compress, "zst": ZSTD, "xz": lzma.compress, "bz2": bz2.compress}
packings = pytest.mark.parametrize("packing", PACK)


def prose(seed: int, words: int) -> bytes:
    chance = random.Random(seed)
    known = [bytes(chance.choices(b"etaoinshrdlu", k=chance.randint(1, 9))) for _ in range(3000)]
    return b" ".join(chance.choices(known, k=words))


def chunks(data: bytes, step: int = 1 << 20) -> Iterator[bytes]:
    return (data[n : n + step] for n in range(0, len(data), step))


def damage_of(data: bytes, packing: str):
    return find_damage(lambda at: chunks(data[at:]), len(data), packing)


def verified(data: bytes, packing: str, salvage: bool = False) -> list[bytes]:
    """The text between gaps."""
    parts = [b""]
    stored = chunks(data)
    for chunk in Unpacked(stored, packing, damage=damage_of(data, packing), salvage=salvage):
        parts = [*parts, b""] if chunk is None else [*parts[:-1], parts[-1] + chunk]
    assert list(stored) == []  # a hash of the stored chunks is the file's
    return parts


@packings
@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
def test_whole_files(packing: str, step: int):
    text = prose(1, 20_000)
    data = PACK[packing](text) + PACK[packing](b"") + bytes(8) + PACK[packing](text) + bytes(512)
    stream = Unpacked(chunks(data, step), packing)
    assert b"".join(stream) == text * 2 and not stream.unverified
    assert damage_of(data, packing) == ()
    assert b"".join(Unpacked(chunks(text, step), "")) == text


@packings
def test_a_flipped_bit_costs_its_member(packing: str):
    texts = [prose(seed, 2_000) for seed in range(4)]
    members = [PACK[packing](text) for text in texts]
    whole = b"".join(members)
    chance = random.Random(2)
    starts = [sum(map(len, members[:n])) for n in range(5)]
    caught = 0
    for _ in range(150):
        torn = bytearray(whole)
        at = chance.randrange(len(whole))
        torn[at] ^= 1 << chance.randrange(8)
        hit = max(n for n in range(4) if starts[n] <= at)
        try:
            assert b"".join(Unpacked(chunks(bytes(torn)), packing)) == b"".join(texts)  # a name, a time stamp
            assert damage_of(bytes(torn), packing) == ()
        except DamagedMember:
            caught += 1
            (damage,) = damage_of(bytes(torn), packing)
            assert (damage.start, damage.end) == (starts[hit], starts[hit + 1])
            parts = verified(bytes(torn), packing)
            assert parts == [b"".join(texts[:hit]), b"".join(texts[hit + 1 :])]
    assert caught > 140


@packings
def test_two_damaged_members_are_two_damages(packing: str):
    members = [PACK[packing](prose(seed, 20_000)) for seed in range(5)]
    for n in (1, 2):
        half = len(members[n]) // 2
        members[n] = members[n][:half] + bytes(40) + members[n][half + 40 :]
    data = b"".join(members)
    starts = [sum(map(len, members[:n])) for n in range(5)]
    found = [(one.start, one.end) for one in damage_of(data, packing)]
    assert found == [tuple(starts[1:3]), tuple(starts[2:4])]
    assert len(verified(data, packing)) == 3


@packings
def test_files_that_end_early_or_late(packing: str):
    text = prose(4, 20_000)
    one = PACK[packing](text)
    for data, kept, said in (
        (one[: len(one) // 2], [b"", b""], "ends too early"),
        (one + one[:-3], [text, b""], "ends too early"),
        (one + b"trailing words", [text, b""], "bytes that are not"),
        (b"", [b"", b""], "the file is empty"),
        (b'{"content": "Plain."}\n', [b"", b""], "but plain text: give it the name"),
        (PACK["xz" if packing == "gz" else "gz"](text), [b"", b""], "data: give it the name"),
        (b"\0\1" + one[:100], [b"", b"", b""], "not "),
    ):
        with pytest.raises(DamagedMember, match=said):
            list(Unpacked(chunks(data), packing, "x"))
        assert verified(data, packing) == kept
        assert said in damage_of(data, packing)[0].reason


@packings
def test_a_member_that_reads_differently_the_second_time_is_an_error(packing: str):
    data = bytearray(PACK[packing](prose(5, 2_000)) * 2)
    data[len(data) * 3 // 4] ^= 1
    with pytest.raises(DamagedMember, match="but not when it was read before"):
        list(Unpacked(chunks(bytes(data)), packing, damage=()))


def test_members_without_a_checksum_are_marked():
    text = b"words " * 1000
    bare = zstandard.ZstdCompressor().compress(text)
    stream = Unpacked(chunks(ZSTD(text) + bare + ZSTD(text) + bare[:0]), "zst")
    assert [stream.mark for _ in stream] == [0, UNVERIFIED, 0] and stream.unverified == 1
    stream = Unpacked(chunks(lzma.compress(text, check=lzma.CHECK_NONE)), "xz")
    assert [stream.mark for _ in stream] == [UNVERIFIED] and stream.unverified == 1


def test_zstd_windows_of_two_gigabytes():
    frame = b"\x28\xb5\x2f\xfd\x00\xa8" + (5 << 3 | 1).to_bytes(3, "little") + b"words"
    assert zstandard.get_frame_parameters(frame).window_size == 1 << 31
    assert list(Unpacked([frame], "zst")) == [b"words"]


# Salvage ------------------------------------------------------------------------------------------------


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
    text = prose(2, 15_000)
    whole = gzip.compress(text)
    chance = random.Random(2)
    damaged = 0
    for _ in range(40):
        at = chance.randrange(len(whole))
        data = bytearray(whole)
        data[at : at + 8] = chance.randbytes(8)
        damage = damage_of(bytes(data), "gz")
        for step in (5000, 1 << 20):
            stream = Unpacked(chunks(bytes(data), step), "gz", damage=damage, salvage=True)
            parts = [(stream.mark, chunk) for chunk in stream]
            assert b"".join(chunk for _, chunk in parts if chunk) == salvage(data)
            damaged += bool(damage)
            assert {mark for mark, _ in parts} == ({SALVAGED} if damage else {0})
    assert damaged > 70  # time stamps in the header may change without harm


def test_a_damaged_zstd_file_gives_every_block_before_the_damage():
    text = prose(3, 200_000)
    whole = ZSTD(text)
    for n in range(1, 20):
        at = len(whole) * n // 20
        (plain, _) = verified(whole[:at], "zst", salvage=True)
        # A block holds 128 kB of text.
        assert text.startswith(plain) and len(plain) >= len(text) * n / 20 - 140_000
        data = bytearray(whole)
        data[at : at + 9] = bytes(9)
        (plain, _) = verified(bytes(data), "zst", salvage=True)
        sure = max(0, len(text) * n // 20 - 140_000)
        assert plain[:sure] == text[:sure]


@packings
def test_salvaged_and_verified_members_are_told_apart(packing: str):
    texts = [prose(seed, 30_000) for seed in range(3)]
    members = [PACK[packing](text) for text in texts]
    half = len(members[1]) * 3 // 4
    members[1] = members[1][:half] + bytes(40) + members[1][half + 40 :]
    data = b"".join(members)
    stream = Unpacked(chunks(data), packing, damage=damage_of(data, packing), salvage=True)
    found = {0: b"", SALVAGED: b""}
    for chunk in stream:
        found[stream.mark] += chunk or b""
    assert found[0] == texts[0] + texts[2]
    assert texts[1].startswith(found[SALVAGED][:1000])


# Memory -------------------------------------------------------------------------------------------------


@packings
def test_memory_is_bounded_whatever_a_file_claims(packing: str):
    packer = {
        "gz": lambda: zlib.compressobj(wbits=31),
        "zst": zstandard.ZstdCompressor(write_checksum=True).compressobj,
        "xz": lzma.LZMACompressor,
        "bz2": bz2.BZ2Compressor,
    }[packing]()
    data = b"".join([packer.compress(bytes(1 << 20)) for _ in range(80)]) + packer.flush()
    assert len(data) < 1 << 20
    tracemalloc.start()
    assert sum(map(len, Unpacked([data], packing))) == 80 << 20
    assert find_damage(lambda at: [data[at:]], len(data), packing) == ()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20
