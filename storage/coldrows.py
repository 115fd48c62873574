"""The rows of a table that are in blocks on disk, for eviction sweeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.blockfile import BlockFile
from storage.errors import Corrupt
from storage.eviction.contract import Bounds, View
from storage.extents import (
    CACHED,
    COUNT,
    FIELDS,
    LIVE,
    NORM_ZONES,
    NORMS_AT,
    NUMBER,
    POSITION_BITS,
    SIZE,
    START,
    ZONES,
)
from storage.inplace import HEADER
from storage.kernels import Slots, jit, norms_of
from storage.slots import Entries, Meta
from storage.tiers.lmdb import Blocks

LISTED = 4096  # maximum number of blocks whose bounds are listed per call


@jit
def _pack(meta: Any, present: Any, entries: Any) -> None:
    """Write rows as entries of slots; see slots.py.

    meta     uint64[n, 4]  key, version, step, frequency
    present  bool[n]       False: write an entry without a row
    entries  uint64[n, 4]  written
    """
    shift, low = np.uint64(16), np.uint64(0xFFFF)
    for i in range(meta.shape[0]):
        entries[i, 0] = meta[i, 0]
        entries[i, 1] = meta[i, 1] << shift | meta[i, 3] >> shift if present[i] else 0
        entries[i, 2] = meta[i, 2] << shift | (meta[i, 3] & low)
        entries[i, 3] = 0


def pack_entries(meta: Meta, present: NDArray[np.bool_]) -> Entries:
    """Return rows as entries of slots, uint64[n, 4].

    meta     uint64[n, 4]  key, version, step, frequency
    present  bool[n]       False: the entry has version 0, no row
    """
    entries = np.empty((len(meta), 4), np.uint64)
    _pack(meta, present, entries)
    return entries


class ColdBlocks:
    """The rows in the blocks of a table. See ColdRows for the contract."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._records = blocks, blocks.records

    def bounds(self, number: int) -> Bounds:
        extents = self._records.following(number, LISTED)
        fields = self._records.records[extents[:, None], np.arange(FIELDS)]
        counts = fields.view(np.int64)
        present, nothing = np.ones(len(extents), np.bool_), np.zeros(len(extents), np.uint64)
        norms = np.ascontiguousarray(fields[:, NORM_ZONES]).view(np.float32).reshape(-1, 2)
        sides = []
        for side in (0, 1):  # the least ones, then the greatest ones
            zones = [fields[:, ZONES + 2 * column + side] for column in range(3)]
            entries = pack_entries(np.stack([nothing, *zones], axis=1), present)
            bound = norms[:, side].astype(np.float64)
            sides.append(View(entries, len(extents), bound.__getitem__, self._blocks.dim))
        return Bounds(counts[:, NUMBER], counts[:, LIVE] - counts[:, CACHED], *sides)

    def reads(self, number: int, norms: bool) -> Callable[[], None] | None:
        extent = self._records.extent_of(number)
        if extent is None:
            return None
        start, size = self._records.field(extent, START), self._records.field(extent, SIZE)
        columns = HEADER + 32 * self._records.field(extent, COUNT)
        if norms:
            columns += 4 * self._records.field(extent, COUNT)
            if not self._records.field(extent, NORMS_AT):  # norms must be computed from all rows
                columns = size
        file, first, sums = self._blocks.file, np.array([start]), np.array([start + size - 1])
        if file.resident(first, columns) and file.resident(sums, 1):
            return None
        return partial(_warm, file, first, columns, sums)

    def view(self, number: int) -> View | None:
        extent = self._records.extent_of(number)
        if extent is None:
            return None
        entries = pack_entries(self._blocks.columns(extent), self._blocks.cold(extent))
        return View(entries, len(entries), partial(self._norms, extent), self._blocks.dim)

    def _norms(self, extent: int, slots: Slots) -> NDArray[np.float64]:
        """Return the L2 norms of embeddings of a block; infinity if any of them is damaged.

        Reads the embeddings only if the block is of an older format, which has no norms.
        """
        dim = self._blocks.dim
        try:
            if (stored := self._blocks.norms(extent)) is not None:
                return stored[slots].astype(np.float64)
            embeddings = np.empty((len(slots), dim), np.float32)
            self._blocks.gather(slots | extent << POSITION_BITS, embeddings)
        except Corrupt:  # who reads these rows gets the error
            return np.full(len(slots), np.inf)
        return norms_of(embeddings, dim)


def _warm(file: BlockFile, first: NDArray[np.int64], size: int, sums: NDArray[np.int64]) -> None:
    """Read the first ``size`` bytes of a block into memory, and the page with its last sum.

    first  int64[1]  offset of the block in the file
    sums   int64[1]  offset of the last byte of the block
    """
    file.warm(first, size)
    file.warm(sums, 1)
