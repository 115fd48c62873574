"""The rows of one table by key, wherever they are: an index, and the tiers that store the rows.

Rows that are pushed must be in host memory, or in GPU memory, which tiers/hbm.py hides: here, such
rows count as in host memory. If the table has blocks on disk (a *cold tier*), a row
whose copy in a block is up to date is *clean*. Host memory is then a cache over the blocks:

    promote  copy a row from its block to host memory, because it is going to be pushed
    demote   give up the host copy of a clean row; nothing is written
    adopt    remember, after a flush wrote dirty rows to a block, that these rows are clean now

Only the engine thread may use it. The keys within one call must be distinct.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arena import Budget
from storage.balance import Balance
from storage.blockscan import ColdPages
from storage.cache import Cache, Policy
from storage.coldrows import ColdBlocks
from storage.errors import OutOfMemory
from storage.eviction.contract import Contents
from storage.gpu.gpu import Gpu
from storage.index import PLACE_BITS, Index, Locations, locations_of, places
from storage.initializers import Initializer
from storage.kernels import Images, Keys, Rows, Slots
from storage.results import Moves, TierStats
from storage.room import Room
from storage.slots import Meta
from storage.tiers.base import Tier, Writable
from storage.tiers.hbm import HbmTier
from storage.tiers.host import HostTier
from storage.tiers.lmdb import Blocks
from storage.tierstats import tier_names, tier_stats
from storage.visits import Watch

MARGIN = 4096  # maximum number of rows that ``demote`` demotes beyond those asked for
NEARLY = 8  # host memory is nearly full if there is room for less than 1/NEARLY of its rows
AHEAD = 32  # 1/AHEAD of the slots are kept free, but at most MOST_AHEAD
MOST_AHEAD = 1 << 16
SHARE = 64  # a table that needs memory of others takes at least 1/SHARE of the budget
MOST_SHRINK = 4 << 20  # maximum number of bytes that a table gives back per call
LEAST_SHRINK = 64 << 10  # bytes; only whole pages can be given back
LEAST_RESERVE = 1 << 20  # bytes
RESERVE = 16  # 1/RESERVE of the budget is left to indexes and counters where there is a cold tier


class RowStore:
    """Finds, creates, moves and deletes rows.

    dim     numbers in an embedding
    state   float32[width - dim], initial optimizer state of every row
    budget  memory budget of the shard
    host    the tier whose rows can be pushed
    blocks  the rows on disk; None: there is no cold tier
    balance  chooses which rows are in GPU memory; None: the table has none
    watch   the exact scans in progress
    moves   what happened between the tiers
    index   finds the location of each row by its key
    space   how many more rows host memory can take
    """

    def __init__(self, dim: int, state: Rows, budget: Budget) -> None:
        self._dim, self._width, self._budget = dim, dim + len(state), budget
        self._state = state
        self.index = Index(budget)
        try:
            self.host: Writable = HostTier(dim, state, budget)
        except BaseException:
            self.index.close()
            raise
        self._tiers: dict[int, Tier] = {self.host.code: self.host}  # where rows are, by code
        self.blocks: Blocks | None = None
        self.moves = Moves()
        self._cache = Cache(self.host)
        self.balance: Balance | None = None
        self.space = Room(budget, self.host, self.index)
        self.watch = Watch()
        self._rewritten = -1  # the block whose rows were copied last
        self._no_rows = np.empty((0, self._width), np.float32)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def width(self) -> int:
        """Float32 numbers per row: embedding and optimizer state."""
        return self._width

    def configure(self, limit: int | None, policy: Policy, half_life: float) -> None:
        """Set how much memory the table may take, and which rows leave it first.

        limit              bytes of memory; None: only the budget of the shard limits it
        policy, half_life  see Cache
        """
        self.space.limit = self._budget.limit if limit is None else limit
        self._cache = Cache(self.host, policy, half_life)
        if isinstance(self.host, HbmTier):
            self.balance = Balance(self.host, self.moves, policy, half_life)

    def attach_gpu(self, gpu: Gpu, limit: int | None = None) -> None:
        """Let rows be in GPU memory. Call it before the first row, ``configure`` and ``attach``.

        limit  bytes of GPU memory that the table may take; 0: none; None: as many as the GPU gives

        Rows that are too long for a batch stay in host memory.
        """
        if limit == 0 or not gpu.takes(self._width):
            return
        self.host.close()
        tier = HbmTier(self._dim, self._state, self._budget, gpu, limit)
        self.host, self._tiers = tier, {tier.code: tier}
        self._cache, self.balance = Cache(tier), Balance(tier, self.moves)
        self.space = Room(self._budget, tier, self.index)

    # ---- reading

    def find(self, keys: Keys) -> tuple[Locations, int]:
        """Return (locations uint64[n], 0 for keys without a row; how many keys have no row)."""
        return self.index.find(keys)

    def gather(self, locations: Locations, out: Rows) -> int:
        """Copy the first columns of rows to ``out``. Returns how many are not in host memory.

        locations  uint64[n]; 0 leaves a row of ``out`` unchanged
        out        float32[n, dim] or float32[n, width]

        Raises Corrupt if a row on disk is damaged.
        """
        misses = 0
        for code, tier in self._tiers.items():
            found, others = places(locations, code)
            tier.gather(found, out)
            if code == self.host.code:
                misses = others
            if not others:
                break
        return misses

    def meta(self, locations: Locations) -> Meta:
        """Return (key, version, step, frequency) of rows, uint64[n, 4]; all 0 for location 0."""
        meta = np.zeros((len(locations), 4), np.uint64)
        for code, tier in self._tiers.items():
            found, others = places(locations, code)
            there = np.flatnonzero(found >= 0)
            meta[there] = tier.meta(found[there])
            if not others:
                break
        return meta

    def count(self, hits: int, misses: int) -> None:
        """Count keys whose rows were in host memory (hits) or only on disk (misses)."""
        self.moves.hits += hits
        self.moves.misses += misses
        if self.balance is not None:
            self.balance.count()

    def cold(self, locations: Locations) -> NDArray[np.int64]:
        """Return the indices, int64[m], of the locations that are in blocks on disk."""
        if self.blocks is None or not self.blocks.rows:
            return np.empty(0, np.int64)
        return np.flatnonzero(locations >> np.uint64(PLACE_BITS) == self.blocks.code)

    def pages(self, keys: Keys, *, whole: bool = False, meta: bool = False) -> ColdPages | None:
        """Return the pages of the disk that contain rows of ``keys``; None if there are none.

        The result is empty if all of these pages are in memory, see ``Blocks.pages``.

        whole  the pages of whole rows, as a push needs them; otherwise only of the embeddings
        meta   also the pages of their versions, steps and frequencies
        """
        locations, _ = self.index.find_ahead(keys)
        if self.blocks is None or not len(self.cold(locations)):
            return None
        found, _ = places(locations, self.blocks.code)
        return self.blocks.pages(found, whole=whole, meta=meta)

    def keys(self) -> Keys:
        """Return the keys of all rows, ascending. For tests and tools: takes much memory."""
        return np.sort(np.concatenate([keys for keys, _ in self.index.slices()]))

    # ---- writing

    def create(self, keys: Keys, initializer: Initializer, seed: int) -> Locations:
        """Create initial rows for absent keys, and return their locations, uint64[n].

        Raises OutOfMemory, and creates none then.
        """
        locations = self.place(keys)
        slots, _ = places(locations, self.host.code)
        self.host.create(keys, slots, initializer, seed)
        self.host.slots.create(keys, slots)
        return locations

    def place(self, keys: Keys) -> Locations:
        """Add absent keys to the index, and return locations for their rows, uint64[n].

        The contents of the rows are undefined. Raises OutOfMemory, and changes nothing then.
        """
        slots = self.host.allocate(len(keys), exact=self.space.near_limit)
        locations = locations_of(slots, self.host.code)
        try:
            self.index.insert(keys, locations)
        except BaseException:
            self.host.release(slots)
            raise
        self.watch.moved(None, locations)
        return locations

    def slots(self, locations: Locations) -> Slots:
        """Return the slots, int64[n], of rows that are in host memory; ABSENT for others."""
        return places(locations, self.host.code)[0]

    def promote(self, keys: Keys, locations: Locations) -> Rows:
        """Copy those rows that are cold (on disk only) to host memory, where they are clean.

        keys       uint64[n]
        locations  uint64[n]  of the rows of ``keys``; updated in place for the copied rows

        Returns the copied rows, float32[m, width]. Raises OutOfMemory or Corrupt, and changes
        nothing then.
        """
        at = self.cold(locations)
        if not len(at):
            return self._no_rows
        assert self.blocks is not None
        rows = np.empty((len(at), self._width), np.float32)
        homes = locations[at]
        found, _ = places(homes, self.blocks.code)
        self.blocks.gather(found, rows)
        meta = self.blocks.meta(found)
        slots = self.slots_for(len(at))
        columns = (np.ascontiguousarray(column) for column in meta.T)
        of_key, versions, steps, frequencies = columns
        self.host.slots.record(slots, of_key, versions, steps.view(np.int64), frequencies)
        self.host.slots.settle(slots, homes)
        self.host.scatter(slots, rows)
        made = locations_of(slots, self.host.code)
        self.index.assign(keys[at], made)
        self.watch.moved(homes, made)
        self.blocks.cache(found)
        locations[at] = made
        self.moves.promotions += len(at)
        return rows

    def slots_for(self, count: int) -> Slots:
        """Allocate slots for rows that exist already.

        If no row in host memory is dirty, a flush could not make room. Then the memory budget is
        exceeded, so that rows can be pushed whatever the budget is. Otherwise raises OutOfMemory.
        """
        try:
            return self.host.allocate(count, exact=self.space.near_limit)
        except OutOfMemory:
            if self.dirty:
                raise
        with self._budget.exceeding():
            return self.host.allocate(count, exact=True)

    def touch(self, slots: Slots, counts: NDArray[Any], step: int, version: int) -> None:
        """Record a push in the metadata of its rows, which become dirty.

        counts  uint32[n]  occurrences of each key in the push, added to its frequency
        step, version      recorded in every row
        """
        homes = self.host.slots.touch(slots, counts, step, version)
        if len(homes):
            self._forget(homes)

    def put(self, locations: Locations, images: Images) -> None:
        """Write whole rows, none of which is cold. Never overwrites a newer row."""
        targets, homes = self.host.slots.record(self.slots(locations), *images[:-1])
        self._forget(homes)
        self.host.scatter(targets, images.rows)

    def remove(self, keys: Keys, locations: Locations) -> None:
        """Delete rows."""
        self.index.remove(keys)
        slots, others = places(locations, self.host.code)
        if others:
            assert self.blocks is not None
            self.blocks.forget(places(locations[self.cold(locations)], self.blocks.code)[0])
            slots = slots[slots >= 0]
        self._forget(self.host.release(slots))

    def _forget(self, homes: Locations) -> None:
        """Mark the copies in blocks at some locations, 0 or not, as out of date."""
        if self.blocks is not None and len(homes):
            found, _ = places(homes, self.blocks.code)
            self.blocks.forget(found[found >= 0])

    # ---- the cold tier

    def attach(self, blocks: Blocks) -> None:
        """Add a cold tier, which may have rows already; ``place_cold`` makes their keys known."""
        self.blocks = blocks
        self._tiers[blocks.code] = blocks
        limit = self._budget.limit
        self._budget.set_aside = min(max(limit // RESERVE, LEAST_RESERVE), limit // 4)
        self._budget.join(self)

    def place_cold(self, keys: Keys, locations: Locations) -> None:
        """Add absent keys whose rows are in blocks to the index."""
        self.index.insert(keys, locations)

    def room(self) -> int:
        """Return how many slots are free or may be added within the budget."""
        return self.space.rows()

    def make_room(self, count: int, absent: int) -> bool:
        """Make room for more rows in host memory, as far as that is possible without a flush.

        Moves clean rows to disk, first those of larger tables. Returns whether there is room now.
        While stored rows are loaded, the budget may be exceeded, and there is always room.

        count, absent  see Room.fits
        """
        budget, index = self._budget, self.index.growth(absent)
        if budget.free < (needed := max(index, budget.set_aside // 2)):
            budget.reclaim(needed - budget.free)
        if count > self.room() and self.memory_bytes < self.space.limit:
            size = max(self.space.row_bytes * (count - self.room()), budget.limit // SHARE)
            budget.reclaim(size, self)
        if count > self.room():
            self.demote(count - self.room())
        return budget.loading or self.space.fits(count, absent)

    @property
    def tight(self) -> bool:
        """True if fewer slots are free than are kept free, but rows could leave."""
        rows = self.host.rows
        kept = min(-(-rows // AHEAD), MOST_AHEAD)
        if self.blocks is None or self.space.slack >= kept:
            return False
        return self.room() < kept and self.dirty < rows

    def relieve(self) -> bool:
        """Demote some clean rows if little room is left, so that later pushes find room.

        Returns whether to call it again. It demotes few rows per call, so that others can run.
        """
        return self.tight and self.demote(0) > 0 and self.tight

    @property
    def held(self) -> int:
        """Bytes of memory that the slots take. See arena.Holder."""
        return self.host.bytes

    def shrink(self, size: int) -> int:
        """Give about ``size`` bytes of memory back; return how many were given. See arena.Holder.

        Only the end of the memory can be given back. So the clean rows there leave, whatever their
        scores are. Rows before the last dirty row stay until the next flush makes that row clean.
        Beside GPU memory, rows in host memory leave first, wherever they are.
        """
        self.space.slack = 0
        host, size = self.host, max(LEAST_SHRINK, min(size, MOST_SHRINK))
        before, count, end = host.bytes, -(-size // self.space.row_bytes), host.capacity
        host.compact(size)
        if before - host.bytes < size and isinstance(host, HbmTier):
            self.demote(count)
            host.compact(size - (before - host.bytes))
            size, end = LEAST_SHRINK, host.slots.used
        if before - host.bytes < size:
            slots, keys, homes, stay = self._cache.tail(max(0, end - count))
            self._leave(slots, keys, homes)
            host.cut(min(stay, host.slots.used))
            host.compact(size - (before - host.bytes))
        return before - host.bytes

    def demote(self, count: int) -> int:
        """Give up the copies in memory of at least ``count`` clean rows; see Cache.victims.

        Tries to demote 1/AHEAD of the rows more, so that it need not be called soon again. Returns
        how many rows were demoted, which is less than ``count`` if there were too few clean rows.
        """
        assert self.blocks is not None
        demoted, wanted = 0, count + min(MARGIN, -(-self.host.rows // AHEAD))
        while demoted < wanted:
            slots, keys, homes = self._cache.victims(wanted - demoted)
            if not len(slots):
                break
            self._leave(slots, keys, homes)
            demoted += len(slots)
        return demoted

    def _leave(self, slots: Slots, keys: Keys, homes: Locations) -> None:
        """Give up the host copies of clean rows: from now on they are read from their blocks.

        homes  uint64[n]  locations of their copies in blocks
        """
        if not len(slots):
            return
        assert self.blocks is not None
        self.index.assign(keys, homes)
        self.watch.moved(locations_of(slots, self.host.code), homes)
        self.blocks.uncache(places(homes, self.blocks.code)[0])
        self.host.release(slots)
        self.moves.demotions += len(slots)

    def unchanged(
        self, slots: Slots, keys: Keys, versions: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Return bool[n]: whether slots[i] has a dirty row with keys[i] and versions[i]."""
        return self.host.slots.same(slots, keys, versions)

    def waiting(self, slots: Slots, upto: int) -> NDArray[np.bool_]:
        """Return bool[n]: whether slots[i] has a dirty row with a version in 1..upto."""
        return self.host.slots.waiting(slots, upto)

    @property
    def dirty(self) -> int:
        """Number of rows in host memory that have no up-to-date copy in a block."""
        cached = self.blocks.live_rows - self.blocks.rows if self.blocks is not None else 0
        return self.host.slots.rows - cached

    @property
    def pressed(self) -> bool:
        """True if a flush is needed soon: host memory is nearly full, mostly with dirty rows."""
        rows = self.host.slots.rows
        return self.room() < rows // NEARLY and 2 * self.dirty > rows

    def adopt(self, extent: int, slots: Slots, keys: Keys, versions: NDArray[np.uint64]) -> None:
        """Make rows clean that a flush wrote to a block, unless they were changed since.

        extent    the block, whose rows are these in this order
        slots     int64[n]   slots that had the rows
        versions  uint64[n]  versions of the rows that were written
        """
        assert self.blocks is not None
        positions = np.flatnonzero(self.unchanged(slots, keys, versions))
        homes = self.blocks.locations(extent, positions)
        self.host.slots.settle(slots[positions], homes)
        self.blocks.revive(extent, positions, cached=True)
        self.moves.flushed += len(slots)

    def move(self, old: int, positions: NDArray[np.int64], new: int, first: int) -> None:
        """Replace the copies in block ``old`` by those that a flush made in block ``new``.

        positions  int64[n]  rows of the old block, copied to the rows first..first+n-1 of the new

        Rows that were changed meanwhile are skipped.
        """
        blocks = self.blocks
        assert blocks is not None
        if old != self._rewritten:
            self._rewritten = old
            self.moves.reflushed += 1
        at = np.flatnonzero(blocks.live(old)[positions])
        positions = positions[at]
        keys, homes = blocks.keys(new)[first + at], blocks.locations(old, positions)
        locations, targets = self.find(keys)[0], blocks.locations(new, first + at)
        cold = blocks.cold(old)[positions]
        self.index.assign(keys[cold], targets[cold])
        self.watch.moved(homes[cold], targets[cold])
        self.host.slots.settle(self.slots(locations[~cold]), targets[~cold])
        blocks.revive(new, first + at[cold], cached=False)
        blocks.revive(new, first + at[~cold], cached=True)
        promoted = ~cold & blocks.promoted(old)[positions]
        blocks.cache(places(targets[promoted], blocks.code)[0])
        blocks.forget(places(homes, blocks.code)[0])

    # ---- the whole

    @property
    def index_bytes(self) -> int:
        """Bytes of memory that the index takes, with what it knows of the blocks on disk."""
        return self.index.bytes + (0 if self.blocks is None else self.blocks.memory)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the index and the rows in memory take."""
        return self.index_bytes + self.host.bytes

    def contents(self) -> Contents:
        """Return all rows for an eviction sweep; valid until a row changes."""
        cold = None if self.blocks is None else ColdBlocks(self.blocks)
        return Contents(len(self), self.host.view(), cold)

    def stats(self) -> tuple[TierStats, ...]:
        """Return rows, bytes, hits and misses of each tier, the fastest first."""
        return tier_stats(self.host, self.blocks, self.moves)

    def names(self, locations: Locations) -> list[str]:
        """Return the name of each location's tier; "" for location 0, a key without a row."""
        return tier_names(self.host, self.blocks, locations, self.slots(locations))

    def close(self) -> None:
        """Close index and tiers. The memory is freed as soon as no scan refers to it."""
        self._budget.leave(self)
        self.index.close()
        for tier in self._tiers.values():
            tier.close()
