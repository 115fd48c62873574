"""The tier of blocks: pages are read ahead, and what is in memory is known for a while."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shelves import WIDTH, Shelf, block_of, places_of

from storage import residency
from storage.block import FORMATS, ROWS, row_layout
from storage.errors import Corrupt
from storage.extents import WHOLE
from storage.kernels import ABSENT


def test_warm_pages_are_verified_once_settled(shelf: Shelf) -> None:
    extents = shelf.shelve(block_of(1, 5000), block_of(2, 5000))
    places = np.random.default_rng(3).integers(0, 5000, 400) | extents[1] << 16
    places[::7] = ABSENT
    assert shelf.blocks.unverified(places)
    for whole, meta in ((False, False), (True, True)):
        pages = shelf.blocks.pages(places, whole=whole, meta=meta)
        pages.warm()
        shelf.blocks.settle(pages)
        again = shelf.blocks.pages(places, whole=whole, meta=meta)
        assert len(again.fresh) == 0
        again.warm()
        shelf.blocks.settle(again)
    assert not shelf.blocks.unverified(places)
    shelf.damage(extents[1], 64)
    shelf.blocks.meta(places[places >= 0])  # is not verified again
    shelf.damage(extents[1], 64)
    shelf.check()


def test_damage_is_raised_only_while_the_block_is_there(shelf: Shelf) -> None:
    good, bad = shelf.shelve(block_of(1, 500), block_of(2, 500))
    layout = row_layout(WIDTH, 500, FORMATS[ROWS])
    shelf.damage(bad, layout.rows)
    pages = shelf.blocks.pages(np.concatenate([places_of(good, 7), places_of(bad, 0, 499)]))
    pages.warm()
    with pytest.raises(Corrupt, match="block 2"):
        shelf.blocks.settle(pages)
    assert not shelf.blocks.unverified(places_of(good, 7))
    assert shelf.blocks.unverified(places_of(bad, 0))
    shelf.blocks.forget(places_of(bad, *range(500)))
    assert shelf.blocks.remove(bad) == 2
    shelf.blocks.settle(pages)
    [again] = shelf.shelve(block_of(3, 500))
    assert again == bad
    shelf.blocks.settle(pages)  # what was verified was another block
    assert shelf.blocks.unverified(places_of(again, 499))


def read_ahead(shelf: Shelf, places: NDArray[np.int64], **what: bool) -> bool:
    """Read the pages of rows ahead; return whether there was something to read."""
    pages = shelf.blocks.pages(places, **what)
    pages.warm()
    shelf.blocks.settle(pages)
    return not pages.empty


def test_pages_that_were_read_are_not_read_again_for_a_while(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    extents = shelf.shelve(*(block_of(seed, 5000) for seed in range(20)))
    random = np.random.default_rng(3)
    places = random.integers(0, 5000, 400) | random.choice(extents, 400) << 16
    places[::7] = ABSENT
    assert read_ahead(shelf, places)
    assert not read_ahead(shelf, places)
    assert read_ahead(shelf, places, whole=True, meta=True)
    assert not read_ahead(shelf, places, whole=True, meta=True)
    assert not shelf.blocks.unverified(places)
    assert not read_ahead(shelf, places[:0])
    one = places_of(extents[4], *range(5000))
    assert read_ahead(shelf, one, whole=True)  # a few of all blocks: only its own pages are noted
    assert not read_ahead(shelf, one, whole=True)
    monkeypatch.setattr(residency, "WINDOW", -1)  # as if it were later
    assert read_ahead(shelf, one, whole=True)
    assert read_ahead(shelf, places)


def test_all_pages_of_a_block_that_was_just_written_are_at_hand(shelf: Shelf) -> None:
    for number in shelf.put(block_of(1, 5000), block_of(2, 700)):
        extent = shelf.add(number, verified=True)
        assert shelf.blocks.records.field(extent, WHOLE) == 1
        every = places_of(extent, *range(len(shelf.kept[number])))
        assert not read_ahead(shelf, every, whole=True, meta=True)


def test_a_page_that_has_left_memory_ends_the_trust_in_earlier_looks(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    extents = shelf.shelve(*(block_of(seed, 5000) for seed in range(3)))
    places = np.concatenate([places_of(extent, 1, 4999) for extent in extents])
    assert read_ahead(shelf, places)
    assert not read_ahead(shelf, places)

    def gone(address: int, starts: Any, pages: Any, page: int, states: Any, out: Any) -> None:
        out[:] = ~np.uint64(1)  # all pages but the first

    with monkeypatch.context() as patch:
        patch.setattr(residency, "look", gone)
        for _ in range(residency.SAMPLES):  # some of the blocks are drawn each time
            pages = shelf.blocks.pages(places)
            if not pages.empty:
                break
    assert not pages.empty
    assert read_ahead(shelf, places)  # of all blocks, the others too
    assert not read_ahead(shelf, places)


def test_a_new_block_does_not_inherit_what_is_known_of_another(shelf: Shelf) -> None:
    _, second = shelf.shelve(block_of(1, 500), block_of(2, 500))
    places = places_of(second, 0, 499)
    pages = shelf.blocks.pages(places)
    pages.warm()
    shelf.blocks.forget(places_of(second, *range(500)))
    shelf.blocks.remove(second)
    [again] = shelf.shelve(block_of(3, 500))
    assert again == second
    shelf.blocks.settle(pages)
    assert not shelf.blocks.pages(places).empty
    assert read_ahead(shelf, places)
    assert not read_ahead(shelf, places)


def test_damaged_pages_are_never_at_hand(shelf: Shelf) -> None:
    [extent] = shelf.shelve(block_of(1, 5000))
    shelf.damage(extent, row_layout(WIDTH, 5000, FORMATS[ROWS]).rows)
    for first in (True, False):
        with pytest.raises(Corrupt):
            read_ahead(shelf, places_of(extent, 0))
        assert read_ahead(shelf, places_of(extent, 4999)) == first
    shelf.blocks.records.see_pieces(extent, np.zeros(100, np.bool_))  # damage was found
    assert read_ahead(shelf, places_of(extent, 4999))
