"""Kernels that read rows and metadata of blocks straight from the map of the base's file.

All of them take the records of the blocks (extents.py), and verify each piece of a block before its
first use. Common parameters:

    records   uint64[extents, words]
    seen_at   first word of the seen bits in a record
    words     uint64[]   the map of the file
    floats    float32[]  the same memory
    places    int64[n]   extent << 16 | position
    remember  whether to record which pieces were verified; only the engine thread may do that

A result is the index of the first place whose bytes are damaged, or n if none is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.extents import BODY, COUNT, NORMS_AT, NUMBER, ROWS_AT, START, get_bit, ready, set_bit
from storage.kernels import inline, jit, prefetch, prefetch_row, square_sum
from storage.sums import PIECE, SHIFT, intact

AHEAD = 16  # rows that are prefetched
HEADER = 64  # bytes of a block before its keys
FRESH = 5  # numbers per entry of ``list_pages``: page, number, extent, start of the block, body


@inline
def _row_at(records: Any, place: Any, size: Any) -> Any:
    """Return the offset in the file of a row of ``size`` bytes."""
    return np.int64(records[place >> 16, ROWS_AT]) + (place & 0xFFFF) * size


@inline
def _seen(records: Any, seen_at: Any, extent: Any, start: Any, stop: Any) -> Any:
    """Return whether all pieces with the bytes start..stop-1 of the file were verified."""
    base = np.int64(records[extent, START]) - SHIFT
    first, last = (start - base) // PIECE, (stop - 1 - base) // PIECE
    both = get_bit(records, extent, seen_at, first) & get_bit(records, extent, seen_at, last)
    return both != 0 and last - first < 2


@inline
def _ahead(records: Any, floats: Any, places: Any, i: Any, width: Any, size: Any) -> None:
    """Prefetch rows and records of the places after ``i``, each at its own distance."""
    n = places.shape[0]
    if i + 3 * AHEAD < n:
        prefetch(records, places[i + 3 * AHEAD] >> 16, 0)
    if i + 2 * AHEAD < n and places[i + 2 * AHEAD] >= 0:
        prefetch(floats, _row_at(records, places[i + 2 * AHEAD], 4 * width) >> 2, 0)
    if 0 <= i + AHEAD < n and places[i + AHEAD] >= 0:
        prefetch_row(floats, _row_at(records, places[i + AHEAD], 4 * width) >> 2, size)


@jit
def gather(
    records: Any,
    seen_at: int,
    words: Any,
    floats: Any,
    width: int,
    places: Any,
    out: Any,
    remember: bool,
) -> Any:
    """Copy the first columns of rows to ``out``; negative places leave a row unchanged.

    width  float32 numbers per row
    out    float32[n, k]  written; k at most ``width``
    """
    n, k = out.shape
    for i in range(-2 * AHEAD, 0):
        _ahead(records, floats, places, i, width, 4 * k)
    for i in range(n):
        _ahead(records, floats, places, i, width, 4 * k)
        place = places[i]
        if place < 0:
            continue
        at = _row_at(records, place, 4 * width)
        extent, stop = place >> 16, at + 4 * k
        if not _seen(records, seen_at, extent, at, stop) and not ready(
            records, seen_at, words, extent, at, stop, remember
        ):
            return i
        row = floats[at >> 2 : (at >> 2) + k]  # so that the loop below becomes vector instructions
        for j in range(k):
            out[i, j] = row[j]
    return n


@jit
def measure(
    records: Any,
    seen_at: int,
    words: Any,
    floats: Any,
    width: int,
    dim: int,
    places: Any,
    norms: Any,
) -> Any:
    """Write the L2 norms of embeddings to ``norms``, float64[n]. Remembers no verified piece.

    width  float32 numbers per row
    dim    numbers in an embedding

    Reads the norms that the block has, or else computes them as ``measure`` in kernels.py does.
    """
    n = places.shape[0]
    for i in range(n):
        at = np.int64(records[places[i] >> 16, NORMS_AT])
        if at > 0:
            at += 4 * (places[i] & 0xFFFF)
            if not ready(records, seen_at, words, places[i] >> 16, at, at + 4, False):
                return i
            norms[i] = floats[at >> 2]
            continue
        at = _row_at(records, places[i], 4 * width)
        if not ready(records, seen_at, words, places[i] >> 16, at, at + 4 * dim, False):
            return i
        first = at >> 2
        norms[i] = np.float32(np.sqrt(square_sum(floats[first : first + dim], dim)))
    return n


@jit
def read_meta(records: Any, seen_at: int, words: Any, places: Any, out: Any, remember: bool) -> Any:
    """Copy the metadata of rows to ``out``, uint64[n, 4]: key, version, step, frequency."""
    n = places.shape[0]
    for i in range(n):
        if i + AHEAD < n:
            extent, position = places[i + AHEAD] >> 16, places[i + AHEAD] & 0xFFFF
            first = (np.int64(records[extent, START]) + HEADER >> 3) + position
            for j in range(4):
                prefetch(words, first + j * np.int64(records[extent, COUNT]), 0)
        extent, position = places[i] >> 16, places[i] & 0xFFFF
        column = np.int64(records[extent, START]) + HEADER + 8 * position
        step = 8 * np.int64(records[extent, COUNT])
        for j in range(4):
            at = column + j * step
            if not _seen(records, seen_at, extent, at, at + 8) and not ready(
                records, seen_at, words, extent, at, at + 8, remember
            ):
                return i
            out[i, j] = words[np.uint64(at) >> np.uint64(3)]
    return n


@jit
def copy_columns(words: Any, first: Any, out: Any) -> None:
    """Copy the metadata of all rows of a block to ``out``, uint64[count, 4].

    first  index in ``words`` of the block's first key
    """
    count = out.shape[0]
    for j in range(4):
        for i in range(count):
            out[i, j] = words[first + j * count + i]


@jit
def find_cold(
    records: Any,
    live_at: int,
    cached_at: int,
    promoted_at: int,
    words: Any,
    extent: int,
    start: int,
    stop: int,
    after: int,
    upto: int,
    places: Any,
) -> Any:
    """Find cold or promoted rows of a block, with versions after+1..upto, at start..stop-1.

    live_at, cached_at, promoted_at  first words of these bits in a record
    places                           int64[n]  written from index 0 on; n is the maximum to find

    A live row that was promoted is found even if it has a slot, because the scan may have passed
    the slot before the row was copied there. The pieces with the versions must have been verified.
    Returns (number found, position to continue at).
    """
    found = 0
    column = (np.int64(records[extent, START]) + HEADER >> 3) + np.int64(records[extent, COUNT])
    for position in range(start, stop):
        if get_bit(records, extent, live_at, position) == 0:
            continue
        if (
            get_bit(records, extent, cached_at, position) != 0
            and get_bit(records, extent, promoted_at, position) == 0
        ):
            continue
        version = np.int64(words[column + position])
        if after < version <= upto:
            if found == places.shape[0]:
                return found, position
            places[found] = np.int64(extent) << 16 | position
            found += 1
    return found, stop


@jit
def _list(
    records: Any,
    seen_at: Any,
    extent: Any,
    start: Any,
    stop: Any,
    pages: Any,
    pieces: Any,
    fresh: Any,
    counts: Any,
) -> None:
    """List the pieces with the bytes start..stop-1 of the file; see ``list_pages``."""
    begin = np.int64(records[extent, START])
    base = begin - SHIFT
    for piece in range((start - base) // PIECE, (stop - 1 - base) // PIECE + 1):
        pages[counts[0]] = base + piece * PIECE
        pieces[counts[0]] = extent << 16 | piece
        counts[0] += 1
        if get_bit(records, extent, seen_at, piece) == 0:
            entry = fresh[counts[1]]
            entry[0], entry[1] = base + piece * PIECE, np.int64(records[extent, NUMBER])
            entry[2], entry[3] = extent, begin
            entry[4] = np.int64(records[extent, BODY])
            counts[1] += 1


@jit
def list_pages(
    records: Any,
    seen_at: int,
    width: int,
    size: int,
    norms: bool,
    meta: bool,
    places: Any,
    pages: Any,
    pieces: Any,
    fresh: Any,
    counts: Any,
) -> None:
    """List the pages of the file that contain rows. A page may occur more than once.

    width   float32 numbers per row
    size    bytes of each row to read
    norms   list the pages with the rows' norms instead, where the block has norms
    meta    also list the pages that contain the metadata
    pages   int64[]     written: offset of each page
    pieces  int64[]     written: extent << 16 | number of the piece in its block, of each page
    fresh   int64[, 5]  written, only for pages that were not verified yet: offset of the page,
            number of its block, extent, offset of the block, words before its sums
    counts  int64[2]    written: how many of ``pages`` and of ``fresh`` were written
    """
    counts[:] = 0
    for i in range(places.shape[0]):
        if places[i] < 0:
            continue
        extent = places[i] >> 16
        at, wanted = _row_at(records, places[i], 4 * width), size
        if norms and records[extent, NORMS_AT] != 0:
            at, wanted = np.int64(records[extent, NORMS_AT]) + 4 * (places[i] & 0xFFFF), 4
        _list(records, seen_at, extent, at, at + wanted, pages, pieces, fresh, counts)
        if meta:
            at = np.int64(records[extent, START]) + HEADER + 8 * (places[i] & 0xFFFF)
            for j in range(4):
                start = at + 8 * j * np.int64(records[extent, COUNT])
                _list(records, seen_at, extent, start, start + 8, pages, pieces, fresh, counts)


@jit
def verify_pages(words: Any, fresh: Any, good: Any) -> None:
    """Verify the pages that ``list_pages`` wrote to ``fresh``.

    good  bool[n]  written: which pages are intact
    """
    for i in range(fresh.shape[0]):
        begin = fresh[i, 3]
        piece = (fresh[i, 0] - begin + SHIFT) // PIECE
        good[i] = intact(words, begin >> 3, fresh[i, 4], piece)


@jit
def remember(records: Any, seen_at: int, fresh: Any, good: Any) -> Any:
    """Set the seen bits of pages that were verified, unless their block is gone by now.

    fresh  int64[n, 5]  the pages, from ``list_pages``
    good   bool[n]      which of them are intact

    Returns the index in ``fresh`` of a damaged page whose block still exists; -1 if there is none.
    """
    bad = -1
    for i in range(fresh.shape[0]):
        extent = fresh[i, 2]
        there = records[extent, COUNT] != 0 and records[extent, NUMBER] == np.uint64(fresh[i, 1])
        if there and good[i]:
            set_bit(records, extent, seen_at, (fresh[i, 0] - fresh[i, 3] + SHIFT) // PIECE)
        elif there:
            bad = i
    return bad
