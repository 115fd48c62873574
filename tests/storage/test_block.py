"""Blocks: what is packed comes back, and what was damaged does not."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import xxhash
from blocks import pack_rows, pack_tombstones, rows_to_fill
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage.block import (
    BLOCK_BYTES,
    CELLS,
    COUNTERS,
    DIRECTORY,
    ROWS,
    TOMBSTONES,
    Block,
    header_of,
    pack_cells,
    pack_counters,
    pack_entries,
    row_layout,
    rows_per_block,
    size_of,
    tombstones_per_block,
    unpack,
    verify,
)
from storage.errors import Corrupt, UnknownFormat

ROWS_GOLDEN = (
    "5053424c4f434b0a 03000000 02000000 0200000000000000 07000000 01000000"
    "0000000000000000 d6ed72edf416a55f 00000000000000000000000000000000"
    "0100000000000000 ffffffffffffffff"  # keys
    "0300000000000000 0400000000000000"  # versions
    "feffffffffffffff 0600000000000000"  # steps
    "0700000000000000 0800000000000000"  # frequencies
    "bd1b8f3f 00002040"  # norms
    "0000000000000000 0000000000000000 0000000000000000"  # the gap: rows begin at 192 in the file
    "0000000000000000 0000000000000000"
    "0000003f 000080bf 00000000 000020c0"  # rows
    "ff74d4af 00000000"  # sums
)
SECOND_ROWS_GOLDEN = (  # format 2
    "5053424c4f434b0a 02000000 02000000 0200000000000000 07000000 01000000"
    "0000000000000000 4a909ced317f45ec 00000000000000000000000000000000"
    "0100000000000000 ffffffffffffffff"  # keys
    "0300000000000000 0400000000000000"  # versions
    "feffffffffffffff 0600000000000000"  # steps
    "0700000000000000 0800000000000000"  # frequencies
    "0000000000000000 0000000000000000 0000000000000000"  # the gap: rows begin at 192 in the file
    "0000000000000000 0000000000000000 0000000000000000"
    "0000003f 000080bf 00000000 000020c0"  # rows
    "ed57b1e6 00000000"  # sums
)
OLD_ROWS_GOLDEN = (  # format 1
    "5053424c4f434b0a 01000000 02000000 0200000000000000 07000000 01000000"
    "0000000000000000 fdce9167a5080dbd 00000000000000000000000000000000"
    "0100000000000000 ffffffffffffffff"  # keys
    "0300000000000000 0400000000000000"  # versions
    "feffffffffffffff 0600000000000000"  # steps
    "0700000000000000 0800000000000000"  # frequencies
    "0000003f 000080bf 00000000 000020c0"  # rows
)
TOMBSTONES_GOLDEN = (
    "5053424c4f434b0a 01000000 00000000 0200000000000000 07000000 02000000"
    "0000000000000000 5f36a1f721d6e5da 00000000000000000000000000000000"
    "0100000000000000 ffffffffffffffff"  # keys
    "0300000000000000 0400000000000000"  # versions
    "01000000 05000000"  # causes
)
COUNTERS_GOLDEN = (
    "5053424c4f434b0a 01000000 00000000 0200000000000000 07000000 03000000"
    "0000000000000000 f042ee905f173b14 00000000000000000000000000000000"
    "0100000000000000 ffffffffffffffff"  # keys
    "0300000000000000 0400000000000000"  # versions
    "01000000 ffffffff"  # totals
)
DIRECTORY_GOLDEN = (
    "5053424c4f434b0a 03000000 00000000 0300000000000000 00000000 05000000"
    "0000000000000000 899f9c4b137010e2 00000000000000000000000000000000"
    "01ff02"
)
OLD_DIRECTORY_GOLDEN = (  # format 2
    "5053424c4f434b0a 02000000 00000000 0300000000000000 00000000 05000000"
    "0000000000000000 28d19b8c7f318bd4 00000000000000000000000000000000"
    "01ff02"
)
CELLS_GOLDEN = (
    "5053424c4f434b0a 01000000 00000000 0300000000000000 07000000 04000000"
    "0900000000000000 c6b6bf862aa42df6 00000000000000000000000000000000"
    "01ff02"
)


def u64(*numbers: int) -> NDArray[np.uint64]:
    return np.array(numbers, np.uint64)


def golden_rows() -> memoryview:
    rows = np.array([[0.5, -1], [0, -2.5]], np.float32)
    steps = np.array([-2, 6], np.int64)
    return pack_rows(7, u64(1, 2**64 - 1), u64(3, 4), steps, u64(7, 8), rows)


def old_rows(version: int, golden: str) -> memoryview:
    block = rows_to_fill(7, 2, 2, version)
    block.data[64:] = np.frombuffer(bytes.fromhex(golden), np.uint8)[64:]
    return block.seal()


def golden_directory() -> memoryview:
    return pack_entries(np.array([1, 255, 2], np.uint8))


def golden_counters() -> memoryview:
    totals = np.array([1, 2**32 - 1], np.uint32)
    return pack_counters(7, u64(1, 2**64 - 1), u64(3, 4), totals)


def golden_cells() -> memoryview:
    return pack_cells(7, 9, np.array([1, 255, 2], np.uint8))


def golden_tombstones() -> memoryview:
    causes = np.array([1, 5], np.uint32)
    return pack_tombstones(7, u64(1, 2**64 - 1), u64(3, 4), causes)


def contents(block: Block) -> tuple[Any, ...]:
    arrays = (block.keys, block.versions, block.steps, block.frequencies, block.rows, block.causes)
    arrays += block.totals, block.cells, block.entries
    return (block.table, block.kind, block.width, len(block), *(a.tolist() for a in arrays))


GOLDEN = {
    "rows": (golden_rows, ROWS_GOLDEN),
    "rows of format 2": (lambda: old_rows(2, SECOND_ROWS_GOLDEN), SECOND_ROWS_GOLDEN),
    "rows of format 1": (lambda: old_rows(1, OLD_ROWS_GOLDEN), OLD_ROWS_GOLDEN),
    "directory": (golden_directory, DIRECTORY_GOLDEN),
    "tombstones": (golden_tombstones, TOMBSTONES_GOLDEN),
    "counters": (golden_counters, COUNTERS_GOLDEN),
    "cells": (golden_cells, CELLS_GOLDEN),
}


# ---- the format


@pytest.mark.parametrize("name", GOLDEN)
def test_the_format_is_what_it_always_was(name: str) -> None:
    pack, golden = GOLDEN[name]
    assert bytes(pack()).hex(" ", 8) == bytes.fromhex(golden).hex(" ", 8)


def test_golden_bytes_read_back_as_what_was_packed() -> None:
    keys, versions = [1, 2**64 - 1], [3, 4]
    for golden in (ROWS_GOLDEN, SECOND_ROWS_GOLDEN, OLD_ROWS_GOLDEN):
        assert contents(unpack(bytes.fromhex(golden), "golden")) == (
            *(7, ROWS, 2, 2, keys, versions, [-2, 6], [7, 8], [[0.5, -1], [0, -2.5]]),
            *([], [], [], []),
        )
    assert contents(unpack(bytes.fromhex(TOMBSTONES_GOLDEN), "golden")) == (
        *(7, TOMBSTONES, 0, 2, keys, versions, [], [], [], [1, 5], [], [], []),
    )
    assert contents(unpack(bytes.fromhex(COUNTERS_GOLDEN), "golden")) == (
        *(7, COUNTERS, 0, 2, keys, versions, [], [], [], [], [1, 2**32 - 1], [], []),
    )
    for golden in (DIRECTORY_GOLDEN, OLD_DIRECTORY_GOLDEN):
        assert contents(unpack(bytes.fromhex(golden), "golden")) == (
            *(0, DIRECTORY, 0, 3, [], [], [], [], [], [], [], [], [1, 255, 2]),
        )
    cells = unpack(bytes.fromhex(CELLS_GOLDEN), "golden")
    assert contents(cells) == (7, CELLS, 0, 3, [], [], [], [], [], [], [], [1, 255, 2], [])
    assert cells.start == 9


def test_a_full_block_is_just_below_two_mebibytes() -> None:
    for width in (1, 8, 64, 3 * 8192):
        rows = rows_per_block(width)
        assert size_of(ROWS, width, rows) <= BLOCK_BYTES < size_of(ROWS, width, rows + 1)
    assert rows_per_block(1 << 20) == 1
    count = tombstones_per_block()
    assert size_of(TOMBSTONES, 0, count) <= BLOCK_BYTES < size_of(TOMBSTONES, 0, count + 1)


# ---- packing in place


@given(
    table=st.integers(0, 2**32 - 1),
    width=st.integers(1, 9),
    count=st.integers(0, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_come_back_bit_for_bit(table: int, width: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    block = Block.empty(table, width, count)
    parts = (block.keys, block.versions, block.steps, block.frequencies, block.rows)
    for part in parts:
        part.view(np.uint8)[...] = random.integers(0, 256, part.view(np.uint8).shape, np.uint8)
    data = block.seal()
    assert len(data) == size_of(ROWS, width, count)
    again = unpack(data, "here")
    assert (again.table, again.kind, again.width, len(again)) == (table, ROWS, width, count)
    read = (again.keys, again.versions, again.steps, again.frequencies, again.rows)
    assert [a.tobytes() for a in read] == [a.tobytes() for a in parts]
    assert [(a.dtype, a.shape) for a in read] == [(a.dtype, a.shape) for a in parts]
    assert len(again.causes) == 0


@pytest.mark.parametrize(
    "empty", [lambda b: Block.empty(1, 4, 10, b), lambda b: Block.tombstones(1, 10, b)]
)
def test_a_block_is_built_in_the_buffer_that_it_is_given(empty: Any) -> None:
    buffer = np.full(BLOCK_BYTES, 0xEE, np.uint8)
    for block in (empty(buffer), empty(buffer)):
        block.keys[:] = np.arange(10)
        data = block.seal()
        assert np.shares_memory(np.frombuffer(data, np.uint8), buffer)
        assert unpack(data, "here").keys.tolist() == list(range(10))
        assert (buffer[len(data) :] == 0xEE).all()


def test_sealing_again_covers_what_changed() -> None:
    block = Block.empty(1, 1, 1)
    for number in range(2):
        block.data[64:] = number
        assert unpack(block.seal(), "here").keys[0] == number * 0x0101010101010101


def test_reading_copies_nothing_if_the_bytes_are_aligned() -> None:
    data = golden_rows()
    block = unpack(data, "here")
    whole = np.frombuffer(data, np.uint8)
    assert all(np.shares_memory(a, whole) for a in (block.keys, block.steps, block.rows))


@pytest.mark.parametrize("shift", range(8))
def test_bytes_at_any_address_can_be_read(shift: int) -> None:
    data = bytes(shift) + bytes(golden_rows())
    block = unpack(memoryview(data)[shift:], "here")
    assert contents(block) == contents(unpack(golden_rows(), "here"))
    assert all(a.flags.aligned for a in (block.keys, block.versions, block.rows))


def test_the_arrays_of_read_only_bytes_are_read_only() -> None:
    block = unpack(bytes(golden_rows()), "here")
    with pytest.raises(ValueError, match="read-only"):
        block.rows[0, 0] = 1


# ---- damage


@pytest.mark.parametrize("name", GOLDEN)
def test_every_flipped_bit_is_found(name: str) -> None:
    data = bytearray(GOLDEN[name][0]())
    for byte in range(len(data)):
        for bit in range(8):
            data[byte] ^= 1 << bit
            with pytest.raises(Corrupt) as caught:
                verify(data, "block 5")
            assert caught.value.where == "block 5"
            data[byte] ^= 1 << bit
    verify(data, "block 5")


@pytest.mark.parametrize("name", GOLDEN)
def test_every_other_length_is_found(name: str) -> None:
    data = bytes(GOLDEN[name][0]())
    for size in range(len(data)):
        with pytest.raises(Corrupt):
            verify(data[:size], "block 5")
    with pytest.raises(Corrupt):
        verify(data + bytes(8), "block 5")


def resealed(offset: int, value: int, size: int = 4) -> bytearray:
    """A block with one field changed and a checksum that fits."""
    data = bytearray(golden_rows())
    data[offset : offset + size] = value.to_bytes(size, "little")
    struct.pack_into("<Q", data, 40, xxhash.xxh3_64_intdigest(data[:40] + data[48:]))
    return data


@pytest.mark.parametrize(
    ("offset", "value", "size", "what"),
    [
        (0, 0, 8, "begin"),
        (12, 3, 4, "of 208 bytes, got"),
        (16, 2**64 - 1, 8, "bytes, got"),
        (28, 6, 4, "kind 6"),
        (28, 2, 4, "kind 2 in format 3"),
    ],
)
def test_a_header_that_lies_is_found_though_its_checksum_fits(
    offset: int, value: int, size: int, what: str
) -> None:
    with pytest.raises(Corrupt, match=what):
        unpack(resealed(offset, value, size), "here")


def test_a_newer_format_is_not_called_damage() -> None:
    with pytest.raises(UnknownFormat) as caught:
        unpack(resealed(8, 4), "block 5")
    assert (caught.value.where, caught.value.found, caught.value.known) == ("block 5", 4, 3)


# ---- rows in place


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("width", [1, 3, 16, 24, 64, 192, 1024, 5000])
def test_rows_take_as_few_cache_lines_and_pages_of_the_file_as_possible(
    width: int, version: int
) -> None:
    size = 4 * width
    for count in (0, 1, 2, 17, rows_per_block(width)):
        layout = row_layout(width, count, version)
        start = layout.rows + 16
        assert start % 64 == 0
        columns = 64 + (32 if version == 2 else 36) * count
        assert 0 <= layout.rows - columns < 4096
        assert layout.norms == (0 if version == 2 else 64 + 32 * count)
        lines = {-(-((start + i * size) % 64 + size) // 64) for i in range(min(count, 64))}
        assert size % 64 or lines <= {size // 64}
        pages = {-(-((start + i * size) % 4096 + size) // 4096) for i in range(count)}
        assert 4096 % size or pages <= {1}
        assert layout.sums % 8 == 0
        assert layout.sums - (layout.rows + count * size) in (0, 4)
        assert layout.pieces == -(-(layout.sums + 16) // 4096)
        assert version == 2 or layout.size == size_of(ROWS, width, count)


def test_all_bytes_between_the_arrays_are_zero() -> None:
    buffer = np.full(BLOCK_BYTES, 0xEE, np.uint8)
    block = Block.empty(1, 3, 5, buffer)
    for array in (block.keys, block.versions, block.steps, block.frequencies, block.rows):
        array.view(np.uint8)[:] = 0xDD
    data = bytes(block.seal())
    assert data[64:].count(0xDD) == 5 * 32 + 5 * 12
    assert 0xEE not in data
    assert data == bytes(Block.empty(1, 3, 5, block.data.copy()).seal())


@pytest.mark.parametrize(("dim", "norms"), [(0, [13.0, 0.0]), (2, [5.0, 0.0]), (1, [3.0, 0.0])])
def test_a_block_has_the_norms_of_the_embeddings(dim: int, norms: list[float]) -> None:
    block = Block.empty(1, 3, 2)
    for part in (block.keys, block.versions, block.steps, block.frequencies):
        part[:] = 1
    block.rows[:] = [[3, -4, 12], [0, 0, 0]]
    data = block.seal(dim)
    assert unpack(data, "here").norms.tolist() == norms
    flipped = bytearray(data)
    flipped[row_layout(3, 2, 3).norms] ^= 1
    with pytest.raises(Corrupt, match="checksum"):
        unpack(flipped, "here")


def test_the_header_is_read_alone() -> None:
    for pack, golden in GOLDEN.values():
        header = header_of(bytes.fromhex(golden)[:64])
        assert header is not None
        block = unpack(pack(), "here")
        assert header == (block.format, block.width, len(block), block.table, block.kind)
        assert header.size == len(pack())
    assert header_of(bytes.fromhex(ROWS_GOLDEN)[:63]) is None
    assert header_of(bytes(64)) is None
    assert header_of(bytes(resealed(8, 4))) is None
