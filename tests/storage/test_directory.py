"""The directory of a base: what is packed comes back."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import xxhash
from blocks import pack_rows

from storage.block import BLOCK_BYTES, DIRECTORY, pack_entries, unpack
from storage.directory import BlockEntry, Zones, pack
from storage.directory import unpack as entries_of
from storage.errors import Corrupt

ZONES = Zones(
    least_version=1,
    greatest_version=2**48 - 1,
    least_step=-(1 << 47),
    greatest_step=-3,
    least_frequency=5,
    greatest_frequency=2**32 - 1,
    least_norm=0.5,
    greatest_norm=3.0,
)
GOLDEN = (
    "0900000000000000 07000000 02000000 0a000000 ffffffff"
    "0100000000000000 ffffffffffff0000 000000000080ffff fdffffffffffffff"
    "0500000000000000 ffffffff00000000 0000003f 00004040"
    "f101000000000000"  # bits: rows 0 and 4 to 8 are live
    "0a00000000000000 07000000 02000000 18000000 01000000"
    "0100000000000000 ffffffffffff0000 000000000080ffff fdffffffffffffff"
    "0500000000000000 ffffffff00000000 0000003f 00004040"
    "0300000000000000"  # all rows but row 3 are live
)
OLD_GOLDEN = (  # format 2
    "0900000000000000 07000000 02000000 0a000000 ffffffff"
    "0100000000000000 ffffffffffff0000 000000000080ffff fdffffffffffffff"
    "0500000000000000 ffffffff00000000"
    "f101000000000000"  # bits: rows 0 and 4 to 8 are live
    "0a00000000000000 07000000 02000000 18000000 01000000"
    "0100000000000000 ffffffffffff0000 000000000080ffff fdffffffffffffff"
    "0500000000000000 ffffffff00000000"
    "0300000000000000"  # all rows but row 3 are live
)


def rebuilt(data: memoryview, version: int) -> bytes:
    """Return the same block with another format in its header."""
    changed = bytearray(data)
    struct.pack_into("<I", changed, 8, version)
    struct.pack_into("<Q", changed, 40, xxhash.xxh3_64_intdigest(changed[:40] + changed[48:]))
    return bytes(changed)


def entry(number: int, live: list[bool] | np.ndarray) -> BlockEntry:
    alive = np.array(live, np.bool_)
    return BlockEntry(number=number, table=7, width=2, count=len(alive), zones=ZONES, live=alive)


def facts(entry: BlockEntry) -> tuple[object, ...]:
    live = entry.live.tolist()
    return (entry.number, entry.table, entry.width, entry.count, entry.zones, live)


def test_the_format_of_the_directory_is_what_it_always_was() -> None:
    bits = [True, False, False, False, True, True, True, True, True, False]
    few = [i != 3 for i in range(24)]
    [block] = pack([entry(9, bits), entry(10, few)])
    read = unpack(block, "here")
    assert read.kind == DIRECTORY
    assert read.entries.tobytes().hex(" ", 8) == bytes.fromhex(GOLDEN).hex(" ", 8)
    golden = unpack(pack_entries(np.frombuffer(bytes.fromhex(GOLDEN), np.uint8)), "here")
    assert [facts(e) for e in entries_of(golden, "here")] == [
        facts(entry(9, bits)),
        facts(entry(10, few)),
    ]


def test_entries_of_an_older_release_have_no_norms() -> None:
    block = rebuilt(pack_entries(np.frombuffer(bytes.fromhex(OLD_GOLDEN), np.uint8)), 2)
    found = entries_of(unpack(block, "here"), "here")
    unknown = dataclasses.replace(ZONES, least_norm=0.0, greatest_norm=float("inf"))
    assert [each.zones for each in found] == [unknown, unknown]
    assert [(each.number, int(each.live.sum())) for each in found] == [(9, 6), (10, 23)]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, 58_250, 65_536])
def test_entries_come_back(count: int) -> None:
    random = np.random.default_rng(count)
    shares = [0, 0.001, 0.05, 0.07, 0.5, 1]
    entries = [entry(i, random.random(count) < share) for i, share in enumerate(shares)]
    entries.append(entry(2**63, np.arange(count) != count - 1))
    blocks = list(pack(entries))
    found = [e for block in blocks for e in entries_of(unpack(block, "here"), "here")]
    assert [facts(e) for e in found] == [facts(e) for e in entries]


@pytest.mark.slow
def test_many_entries_take_many_blocks() -> None:
    entries = [entry(i, np.arange(20_000) % 2 == 0) for i in range(2000)]
    blocks = list(pack(entries))
    assert len(blocks) == 3
    assert all(len(block) <= BLOCK_BYTES for block in blocks)
    found = [e for block in blocks for e in entries_of(unpack(block, "here"), "here")]
    assert [e.number for e in found] == list(range(2000))
    assert list(pack([])) == []


def test_a_block_whose_rows_are_all_live_takes_80_bytes() -> None:
    [block] = pack([entry(1, np.ones(60_000, bool))])
    assert len(block) == 64 + 80


@pytest.mark.parametrize("cut", range(1, 176))
def test_a_truncated_directory_is_damage(cut: int) -> None:
    data = np.frombuffer(bytes.fromhex(GOLDEN), np.uint8)[:-cut]
    if len(data) == 88:  # exactly one entry
        return
    with pytest.raises(Corrupt, match="here"):
        entries_of(unpack(pack_entries(data), "here"), "here")


@pytest.mark.parametrize(("at", "value"), [(80, 0xFF), (81, 4), (168, 24), (20, 1)])
def test_rows_that_the_block_does_not_have_are_damage(at: int, value: int) -> None:
    data = np.frombuffer(bytes.fromhex(GOLDEN), np.uint8).copy()
    data[at] = value
    if at == 20:
        data[20:24] = [3, 0, 0, 0]  # positions instead of bits
    if at == 80:
        data[81] = value
    with pytest.raises(Corrupt, match="lists a row"):
        entries_of(unpack(pack_entries(data), "here"), "here")


def test_zones_are_the_bounds_of_all_rows() -> None:
    keys = np.arange(3, dtype=np.uint64)
    versions, frequencies = keys + np.uint64(5), np.array([9, 2, 4], np.uint64)
    steps = np.array([0, -7, 3])
    data = pack_rows(1, keys, versions, steps, frequencies, np.array([[2], [-3], [1]], np.float32))
    assert Zones.of(unpack(data, "here")) == Zones(
        least_version=5,
        greatest_version=7,
        least_step=-7,
        greatest_step=3,
        least_frequency=2,
        greatest_frequency=9,
        least_norm=1.0,
        greatest_norm=3.0,
    )
