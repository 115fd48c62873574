"""The tier of blocks: rows and metadata come from the file bit for bit, and damage is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shelves import DIM, WIDTH, Shelf, bits_of, block_of, meta_of, places_of

from storage.base import Base
from storage.block import FORMATS, ROWS, row_layout, rows_per_block
from storage.directory import Zones
from storage.errors import Corrupt
from storage.index import locations_of
from storage.kernels import ABSENT
from storage.slots import EVERY, FREQUENCY, KEY, VERSION
from storage.tiers.lmdb import Blocks

# ---- contents


def test_rows_and_metadata_are_those_of_the_block_bit_for_bit(shelf: Shelf) -> None:
    shelf.shelve(*(block_of(seed, count) for seed, count in enumerate([1, 2, 63, 64, 65, 5000])))
    shelf.check()
    shelf.check()  # now everything is verified
    assert (shelf.blocks.rows, shelf.blocks.live_rows) == (5195, 5195)


@pytest.mark.parametrize("width", [1, 2, 16, 64, 1000, 1024, 3000])
def test_rows_of_any_width_are_read(width: int, memory: Path) -> None:
    shelf = Shelf(memory, width, min(DIM, width))
    count = min(rows_per_block(width), 5000)
    for block in (block_of(1, count, width), block_of(2, count - 1, width, form=1)):
        [extent] = shelf.shelve(block)
        out = np.empty((len(block), width), np.float32)
        places = np.arange(len(block)) | extent << 16
        shelf.blocks.gather(places, out)
        assert (out.view(np.uint32) == block.rows.view(np.uint32)).all()
        assert (shelf.blocks.meta(places) == meta_of(block)).all()
    shelf.close()


def test_a_full_block_of_the_narrowest_rows_fits(memory: Path) -> None:
    shelf = Shelf(memory, 1, 1)
    block = block_of(1, rows_per_block(1), 1)
    [extent] = shelf.shelve(block)
    assert shelf.blocks.keys(extent).tolist() == block.keys.tolist()
    last = places_of(extent, len(block) - 1)
    assert shelf.blocks.meta(last).tolist() == meta_of(block)[-1:].tolist()
    shelf.close()


def test_absent_places_leave_rows_unchanged(shelf: Shelf) -> None:
    block = block_of(1, 100)
    [extent] = shelf.shelve(block)
    out = np.full((40, DIM), 8, np.float32)
    places = np.full(40, ABSENT)
    places[::3] = np.arange(14) | extent << 16
    shelf.blocks.gather(places, out)
    assert bits_of(out[::3]) == bits_of(block.rows[:14, :DIM])
    assert (out[places < 0] == 8).all()


def test_locations_name_the_tier_the_extent_and_the_position(shelf: Shelf) -> None:
    extents = shelf.shelve(block_of(1), block_of(2))
    found = shelf.blocks.locations(extents[1], np.array([0, 699]))
    assert found.tolist() == [3 << 56 | extents[1] << 16, 3 << 56 | extents[1] << 16 | 699]
    assert found.tolist() == locations_of(places_of(extents[1], 0, 699), Blocks.code).tolist()


def test_blocks_of_format_1_are_verified_as_a_whole_when_they_are_added(shelf: Shelf) -> None:
    intact, damaged = shelf.put(block_of(1, form=1), block_of(2, form=1))
    assert intact
    extent = shelf.add(intact)
    assert not shelf.blocks.unverified(places_of(extent, *range(700)))
    shelf.check()
    offset = shelf.base.offset(damaged)
    assert offset is not None
    with open(shelf.file.path, "r+b") as file:
        file.seek(offset + 10_000)
        file.write(b"damage")
    with pytest.raises(Corrupt, match=f"block {damaged}"):
        shelf.add(damaged)
    assert [number for _, number in shelf.blocks.extents()] == [intact]


def test_a_block_that_is_not_what_the_caller_says_is_refused(shelf: Shelf) -> None:
    block = block_of(1)
    [number] = shelf.put(block)
    offset = shelf.base.offset(number)
    assert offset is not None
    for wrong in ((offset, 699), (offset + 8, 700), (0, 700)):
        with pytest.raises(Corrupt, match="kind, width and rows"):
            shelf.blocks.add(number, *wrong, Zones.of(block), True)
    assert list(shelf.blocks.extents()) == []


# ---- damage


REGIONS = {
    "first key": lambda layout: 64,
    "keys": lambda layout: 64 + 8 * 650,
    "versions": lambda layout: 64 + 8 * 700 + 8 * 650,
    "steps": lambda layout: 64 + 16 * 700 + 8 * 650,
    "frequencies": lambda layout: 64 + 24 * 700 + 8 * 650,
    "rows": lambda layout: layout.rows + 4 * WIDTH * 650,
    "last row": lambda layout: layout.rows + 4 * WIDTH * 699,
    "sum of the last row": lambda layout: layout.sums + 4 * layout.pieces - 1,
}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_noticed_when_it_is_touched(shelf: Shelf, region: str, bit: int) -> None:
    [first, extent] = shelf.shelve(block_of(1), block_of(2))
    layout = row_layout(WIDTH, 700, FORMATS[ROWS])
    shelf.damage(extent, REGIONS[region](layout), bit)
    everything = places_of(extent, *range(700))
    touch: list[Callable[[], Any]]
    if "row" in region:
        out = np.empty((700, WIDTH), np.float32)
        touch = [lambda: shelf.blocks.gather(everything, out), lambda: shelf.blocks.rows_of(extent)]
    else:
        touch = [lambda: shelf.blocks.meta(everything), lambda: shelf.blocks.columns(extent)]
    for read in (*touch, *touch):  # damage is not remembered as verified
        with pytest.raises(
            Corrupt, match="block 2 of table '', with 700 live rows: the sum of a piece"
        ):
            read()
    shelf.check_block(first, shelf.kept[1])  # the other block is as good as ever
    shelf.damage(extent, REGIONS[region](layout), bit)  # flip it back
    shelf.check()


def test_every_byte_of_a_small_block_is_verified_by_some_read(memory: Path) -> None:
    layout = row_layout(3, 4, FORMATS[ROWS])
    shelf = Shelf(memory, 3, 3)
    block = block_of(1, 4, 3)
    [number] = shelf.put(block)
    for at in range(64, layout.sums + 4 * layout.pieces):
        offset = shelf.base.offset(number)
        assert offset is not None
        extent = shelf.blocks.add(number, offset, 4, Zones.of(block), False)
        shelf.damage(extent, at, at % 8)
        with pytest.raises(Corrupt):
            shelf.blocks.gather(places_of(extent, 0), np.empty((1, 3), np.float32))
        shelf.damage(extent, at, at % 8)
        shelf.blocks.remove(extent)
    shelf.close()


def test_only_damaged_pieces_are_refused(shelf: Shelf) -> None:
    block = block_of(1, 5000)
    [extent] = shelf.shelve(block)
    layout = row_layout(WIDTH, 5000, FORMATS[ROWS])
    shelf.damage(extent, layout.rows + 4 * WIDTH * 2500)
    bad = 0
    for position in range(0, 5000, 20):
        out = np.empty((1, WIDTH), np.float32)
        try:
            shelf.blocks.gather(places_of(extent, position), out)
            assert bits_of(out) == bits_of(block.rows[position : position + 1])
        except Corrupt:
            bad += 1
    assert 1 <= bad <= 9  # 4 KiB of rows of 28 bytes


def test_what_was_verified_or_written_here_is_not_verified_again(shelf: Shelf) -> None:
    [number] = shelf.put(block_of(1))
    extent = shelf.add(number, verified=True)
    assert not shelf.blocks.unverified(places_of(extent, *range(700)))
    shelf.damage(extent, 64)
    assert shelf.blocks.keys(extent)[0] != shelf.kept[number].keys[0]


# ---- bits


def test_bits_follow_a_model(shelf: Shelf) -> None:
    random = np.random.default_rng(1)
    counts = (70, 700, 64)
    extents = shelf.shelve(*(block_of(i, count) for i, count in enumerate(counts)))
    live = {e: np.ones(n, bool) for e, n in zip(extents, counts, strict=True)}
    cached = {e: np.zeros(n, bool) for e, n in zip(extents, counts, strict=True)}
    for _ in range(300):
        e = extents[random.integers(3)]
        some = random.choice(len(live[e]), random.integers(0, 20), replace=False)
        match random.integers(5):
            case 0:
                shelf.blocks.revive(e, some, True)
                live[e][some] = cached[e][some] = True
            case 1:
                shelf.blocks.revive(e, some, False)
                live[e][some], cached[e][some] = True, False
            case 2:
                shelf.blocks.forget(np.append(places_of(e, *some), ABSENT))
                live[e][some] = cached[e][some] = False
            case 3:
                shelf.blocks.cache(np.append(places_of(e, *some), ABSENT))
                cached[e][some] = live[e][some]
            case 4:
                shelf.blocks.uncache(np.append(places_of(e, *some), ABSENT))
                cached[e][some] = False
        for each in extents:
            assert shelf.blocks.live(each).tolist() == live[each].tolist()
            assert shelf.blocks.cold(each).tolist() == (live[each] & ~cached[each]).tolist()
        total = sum(int(each.sum()) for each in live.values())
        assert shelf.blocks.live_rows == total
        assert shelf.blocks.rows == total - sum(int(each.sum()) for each in cached.values())


def test_sparse_and_empty_blocks_are_found_and_extents_are_used_again(shelf: Shelf) -> None:
    extents = shelf.shelve(*(block_of(seed, 100) for seed in range(4)))
    bytes_ = shelf.blocks.bytes
    for extent, dead in zip(extents, (0, 51, 80, 100), strict=True):
        shelf.blocks.forget(places_of(extent, *range(dead)))
    assert shelf.blocks.sparse(0.5) == [extents[2], extents[1]]
    assert shelf.blocks.sparse(0.49) == [extents[2]]
    assert shelf.blocks.empty() == [extents[3]]
    assert shelf.blocks.remove(extents[3]) == 4
    assert shelf.blocks.empty() == []
    assert [number for _, number in shelf.blocks.extents()] == [1, 2, 3]
    assert shelf.blocks.bytes == bytes_ * 3 // 4
    [again] = shelf.shelve(block_of(9, 300))
    assert again == extents[3]
    assert shelf.blocks.zones(again) == Zones.of(shelf.kept[5])
    assert shelf.blocks.unverified(places_of(again, 200))
    shelf.check_block(again, shelf.kept[5])


# ---- scans


def scanned(scan: Any, after: int = 0, upto: int = EVERY, limit: int = 64, look: int = 100) -> Any:
    """Keys of the rows that a scan finds, in order; the rows are checked against ``kept``."""
    keys: list[int] = []
    start: int | None = 0
    while start is not None:
        places, start = scan.find(start, after, upto, limit, look)
        rows = np.empty((len(places), WIDTH), np.float32)
        frequencies = np.empty(len(places), np.uint64)
        meta = scan.copy(places, frequencies, rows)
        assert frequencies.tolist() == meta[:, FREQUENCY].tolist()
        assert ((meta[:, VERSION] > after) & (meta[:, VERSION] <= upto)).all()
        norms, short = np.empty(len(places)), np.empty((len(places), DIM), np.float32)
        assert scan.measure(places, norms).tolist() == meta.tolist()
        scan.read(places, short)
        assert bits_of(short) == bits_of(rows[:, :DIM])
        keys += meta[:, KEY].tolist()
    return keys


def test_a_scan_finds_the_cold_rows_of_the_wanted_versions(shelf: Shelf) -> None:
    counts = (300, 64, 65, 1)
    blocks = [block_of(i, count, version=1 + 500 * i) for i, count in enumerate(counts)]
    extents = shelf.shelve(*blocks)
    shelf.blocks.forget(places_of(extents[0], *range(0, 300, 3)))
    shelf.blocks.revive(extents[1], np.arange(0, 64, 2), True)
    cold = {e: shelf.blocks.cold(e) for e in extents}
    for after, upto in ((0, EVERY), (0, 600), (700, 1200), (5000, EVERY), (1000, 1)):
        expected = [
            key
            for extent, block in zip(extents, blocks, strict=True)
            for key, version, there in zip(
                block.keys.tolist(), block.versions.tolist(), cold[extent].tolist(), strict=True
            )
            if there and after < version <= upto
        ]
        for limit, look in ((1000, EVERY), (7, 100), (64, 1)):
            assert scanned(shelf.blocks.scan(), after, upto, limit, look) == expected


def test_a_scan_finds_rows_that_were_promoted_and_not_pushed(shelf: Shelf) -> None:
    block = block_of(1, 100)
    [extent] = shelf.shelve(block)
    shelf.blocks.cache(places_of(extent, *range(100)))
    assert shelf.blocks.rows == 0
    shelf.blocks.forget(places_of(extent, *range(10, 100)))  # these were pushed
    assert scanned(shelf.blocks.scan(), 0, EVERY, 1000, EVERY) == block.keys[:10].tolist()


def test_a_scan_holds_the_block_that_it_reads(shelf: Shelf) -> None:
    extents = shelf.shelve(block_of(1, 100), block_of(2, 100))
    scan = shelf.blocks.scan()
    places, start = scan.find(0, 0, EVERY, 10)
    assert start is not None
    for extent in extents:
        shelf.blocks.forget(places_of(extent, *range(100)))
    assert shelf.blocks.empty() == [extents[1]]
    assert shelf.blocks.held() == [1]
    rows = np.empty((10, WIDTH), np.float32)
    scan.copy(places, np.empty(10, np.uint64), rows)
    assert bits_of(rows) == bits_of(shelf.kept[1].rows[:10])
    more, start = scan.find(start, 0, EVERY, 10)
    assert (len(more), start) == (0, None)
    assert shelf.blocks.empty() == extents
    assert shelf.blocks.held() == []
    second = shelf.blocks.scan()
    shelf.blocks.revive(extents[0], np.array([5]), False)
    second.find(0, 0, EVERY, 10)
    shelf.blocks.forget(places_of(extents[0], 5))
    assert shelf.blocks.empty() == [extents[1]]
    del second
    assert shelf.blocks.empty() == extents


def test_a_scan_goes_on_to_blocks_that_are_added_meanwhile(shelf: Shelf) -> None:
    shelf.shelve(block_of(1, 100))
    scan = shelf.blocks.scan()
    _, start = scan.find(0, 0, EVERY, 1000)
    assert start is not None
    shelf.shelve(*(block_of(seed, 10) for seed in range(2, 200)))  # the records grow
    found = []
    while start is not None:
        places, start = scan.find(start, 0, EVERY, 1000)
        meta = scan.copy(
            places, np.empty(len(places), np.uint64), np.empty((len(places), 1), np.float32)
        )
        found += meta[:, KEY].tolist()
    assert found == [key for n in range(2, 200) for key in shelf.kept[n].keys.tolist()]


def test_a_scan_of_damaged_rows_raises(shelf: Shelf) -> None:
    [extent] = shelf.shelve(block_of(1, 2000))
    scan = shelf.blocks.scan()
    layout = row_layout(WIDTH, 2000, FORMATS[ROWS])
    places, _ = scan.find(0, 0, EVERY, 2000)
    shelf.damage(extent, layout.rows + 2)
    with pytest.raises(Corrupt, match="block 1"):
        scan.copy(places, np.empty(2000, np.uint64), np.empty((2000, WIDTH), np.float32))
    shelf.damage(extent, 64 + 8 * 2000)
    with pytest.raises(Corrupt, match="block 1"):
        scan.find(0, 0, EVERY, 2000)


# ---- life of the file


def test_blocks_stay_where_they_are_while_others_come_and_go(memory: Path) -> None:
    """Commits, deletes, growth of LMDB's map and of ours, and reuse of pages."""
    shelf = Shelf(memory, reserved=1 << 20)
    random = np.random.default_rng(5)
    lasting = shelf.put(*(block_of(seed, 300) for seed in range(3)))
    offsets = {number: shelf.base.offset(number) for number in lasting}
    for number in lasting:
        shelf.blocks.revive(shelf.add(number), np.arange(300), False)
    maps = {len(shelf.file.bytes)}
    reused, freed = 0, set()
    for seed in range(3, 36):
        passing = [number for number in shelf.kept if number not in lasting]
        drop = tuple(int(n) for n in random.permutation(passing)[: len(passing) // 2])
        extents = {number: extent for extent, number in shelf.blocks.extents()}
        for number in drop:
            freed.add(shelf.base.offset(number))
            shelf.blocks.remove(extents[number])
        new = [block_of(100 * seed + i, int(random.integers(1, 6000))) for i in range(3)]
        for number in shelf.put(*new, drop=drop):
            reused += shelf.base.offset(number) in freed
            shelf.add(number)
        if seed % 9 == 0:
            shelf.file.cover(len(shelf.file.bytes) + 1)
        maps.add(len(shelf.file.bytes))
        assert {number: shelf.base.offset(number) for number in lasting} == offsets
        if seed % 10 == 0:
            shelf.check()
    shelf.check()
    assert len(maps) >= 4
    assert reused > 10
    shelf.close()
    with Base(memory) as base:
        assert {number: base.offset(number) for number in lasting} == offsets


def test_closing_frees_the_memory(memory: Path) -> None:
    shelf = Shelf(memory)
    shelf.shelve(block_of(1))
    scan = shelf.blocks.scan()
    assert shelf.blocks.memory > 0
    shelf.blocks.close()
    assert (shelf.blocks.memory, shelf.blocks.rows, shelf.blocks.bytes) == (0, 0, 0)
    assert scan.find(0, 0, EVERY, 10)[1] is None
    shelf.close()
    assert os.path.exists(memory / "data.mdb")
