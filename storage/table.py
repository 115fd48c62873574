"""The part of a table that one shard stores: a schema, an index, and tiers with the rows.

Not thread-safe: only the shard's engine thread may call it. The keys within one call must be
distinct unless a method says otherwise; the service has checked that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.admission.gates import Gate, Occurrences, Versions
from storage.admission.rules import Admission
from storage.arena import Budget
from storage.errors import NoRoom, OutOfMemory
from storage.eviction.contract import Contents
from storage.eviction.evictor import Evictor
from storage.gpu.gpu import Gpu
from storage.index import Locations, locations_of
from storage.initializers import table_seed
from storage.kernels import Images, Keys, Rows, Slots, largest_magnitude
from storage.overflow import OverflowGuard
from storage.overwrite import overwrite, place_newest
from storage.records import NO_KEYS, NO_TOTALS
from storage.results import Dump, Pushed, TableStats, Tally
from storage.reuse import Reuse
from storage.rowstore import RowStore
from storage.schema import TableSchema
from storage.slots import FREQUENCY, KEY, STEP, VERSION
from storage.tablescan import ExactScan, TableScan
from storage.tiers.lmdb import Blocks

CROWDED = " by the indexes of tables, which cannot leave it: raise host_bytes"
ROUNDS = 8  # tries to make room for the rows of a push
Mode = Literal["train", "serve"]


class Table:
    """The rows of one table on one shard, by key.

    budget  memory budget of the shard
    share   fraction of all keys that this shard owns, 0..1
    """

    def __init__(self, schema: TableSchema, budget: Budget, share: float = 1.0) -> None:
        self.schema = schema
        self.tally, self.reuse = Tally(), Reuse()
        self._budget, self._share = budget, share
        self.evictor = Evictor([rule.on(share) for rule in schema.evictions])
        self._state = schema.optimizer.initial_state(schema.dim)
        self.store = RowStore(schema.dim, self._state, budget)
        self._seed = table_seed(schema.seed, schema.name)
        self._guard = OverflowGuard(schema, self._copies)
        self._pressed: Callable[[], None] = lambda: None
        self._missed = 0  # rows that were on disk when the next push was checked
        try:
            self.gate = self._make_gate(schema.admission.on(share))
        except BaseException:
            self.store.close()
            raise

    def __len__(self) -> int:
        return len(self.store)

    def attach(self, blocks: Blocks, pressed: Callable[[], None]) -> None:
        """Give the table a cold tier: rows that are not in use may leave host memory.

        pressed  called when host memory is nearly full of rows that the next flush must write
        """
        self.store.attach(blocks)
        self._pressed = pressed

    def attach_gpu(self, gpu: Gpu, limit: int | None = None) -> None:
        """Let rows be in GPU memory; see RowStore.attach_gpu."""
        self.store.attach_gpu(gpu, limit)

    def alter(self, schema: TableSchema, version: int, seconds: float) -> int | None:
        """Replace the schema by one that differs only in fields that may be altered.

        version  log version of the alteration
        seconds  time of the alteration

        The admission counters of keys without a row are dropped if the new admission rule cannot
        use them; counting then starts again from zero. Returns the approximate number of dropped
        counters, or None if no counters were lost.

        Raises OutOfMemory, and changes nothing then, if there is no memory for a new sketch.
        """
        dropped = self._alter_admission(schema)
        if schema.evictions != self.schema.evictions:
            rules = [rule.on(self._share) for rule in schema.evictions]
            self.evictor = self.evictor.altered(rules, version, seconds)
        self.schema = schema
        return dropped

    def _make_gate(self, admission: Admission) -> Gate:
        try:
            return admission.gate(self._budget, self._seed)
        except OutOfMemory as error:
            what = f"table {self.schema.name!r}: {error.what}"
            raise OutOfMemory(error.budget, error.held, error.wanted, what) from error

    def _alter_admission(self, schema: TableSchema) -> int | None:
        old, new = self.schema.admission.on(self._share), schema.admission.on(self._share)
        if new.keeps(old):
            new.alter(self.gate)
            return None
        gate = self._make_gate(new)
        replaced, dropped = self.gate, self.gate.entries
        gate.dropped = replaced.dropped + dropped
        gate.edits = replaced.edits + 1  # so that stored cells of the old gate count as outdated
        replaced.close()
        self.gate = gate
        return dropped if replaced.counting or replaced.loss_reason else None

    def stats(self) -> TableStats:
        """Return the current number of rows and the memory of the table."""
        store, gate = self.store, self.gate
        return TableStats(
            rows=len(self),
            bytes=store.memory_bytes + gate.bytes,
            index_bytes=store.index_bytes,
            waiting=gate.entries,
            counter_bytes=gate.bytes,
            tiers=store.stats(),
            damage=(0, 0) if store.blocks is None else store.blocks.damage_counts,
        )

    def pull(self, keys: Keys, mode: Mode, out: Rows, *, count: bool = True) -> Locations:
        """Write the embeddings of ``keys`` to ``out``. Does not change the table.

        keys   uint64[n]        distinct or not
        mode   for keys without a row: "train" writes their initial value, "serve" the table's
               serving default
        out    float32[n, dim]
        count  whether to count hits and misses of the tiers

        Returns the location of each key, uint64[n]; 0 for keys without a row.
        """
        locations, absent = self.store.find(keys)
        misses = self.store.gather(locations, out)
        if count:
            self.store.count(len(keys) - absent - misses, misses)
            self.reuse.pulled(keys, locations, len(keys) - absent)
        if absent:
            missing = np.flatnonzero(locations == 0)
            if mode == "train":
                initializer, dim = self.schema.initializer, self.schema.dim
                initializer.fill(self._seed, keys[missing], missing, dim, out)
            else:
                out[missing] = self.schema.serving_default
        return locations

    def metadata(self, locations: Locations) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return (versions uint64[n], steps int64[n], frequencies uint64[n]) of rows.

        locations  uint64[n], from ``pull``; 0 for keys without a row, for which all three are 0
        """
        meta = self.store.meta(locations)
        return meta[:, VERSION], meta[:, STEP].view(np.int64), meta[:, FREQUENCY]

    def push(
        self,
        keys: Keys,
        gradients: Rows,
        counts: NDArray[Any],
        *,
        version: int,
        step: int,
        lr: float | None = None,
        largest: float | None = None,
        copied: bool = False,
    ) -> Pushed:
        """Run one optimizer step over the rows of ``keys``, creating those that are admitted.

        keys       uint64[n]        distinct
        gradients  float32[n, dim]  finite
        counts     uint32[n]        occurrences of each key in the push
        version    log version of this push
        step       the trainer's step, which the optimizer gets. Rows record this step or the
                   table's step, whichever is larger, so that a client that lags or sends no step
                   does not make rows look idle
        lr         learning rate of this push; None: the table's
        largest    largest magnitude of the gradients; None: compute it if needed
        copied     True: the caller will pass the result's slots to ``images``

        Gradients of keys that are not admitted are dropped. Raises OutOfMemory or RowOverflow, and
        changes nothing then.
        """
        if largest is None:
            largest = largest_magnitude(gradients)
        optimizer = self.schema.optimizer
        lr = optimizer.lr if lr is None else lr
        locations, absent = self._locate(keys)
        self.store.moves.used(len(keys) - absent, self._missed)
        self._missed = 0
        self._guard.check(self.schema.name, optimizer, keys, gradients, lr, step, largest)
        waiting, totals = NO_KEYS, NO_TOTALS
        if absent:
            missing = np.flatnonzero(locations == 0)
            admitted, counted = self._admit(keys, counts, missing, locations, version)
            counts = counts.copy()
            counts[missing[admitted]] = counted[admitted]
            if not admitted.all():
                refused, present = missing[~admitted], np.flatnonzero(locations)
                if self.gate.counting:
                    waiting, totals = keys[refused], counted[~admitted]
                self._count_refused(counts[refused])
                keys, counts, gradients = keys[present], counts[present], gradients[present]
                locations = locations[present]
        slots = self.store.slots(locations)
        stamp = max(step, self.evictor.step)
        self.reuse.pushed(keys, slots, self.store.host.slots.array)
        self.store.touch(slots, counts, stamp, version)
        self.store.host.step(slots, gradients, optimizer, lr, step)
        self._guard.pushed(optimizer, lr, largest)
        if self._guard.unsure and not copied:
            self._guard.written(self.store.host.largest(slots))
        return Pushed(keys, slots, waiting, totals, stamp)

    def _count_refused(self, occurrences: NDArray[Any]) -> None:
        self.tally.refused += len(occurrences)
        self.tally.dropped += int(occurrences.sum(dtype=np.uint64))

    def check_push(
        self,
        keys: Keys,
        gradients: Rows,
        *,
        step: int,
        lr: float | None = None,
        largest: float | None = None,
    ) -> None:
        """Raise RowOverflow if a push would leave infinity or NaN in a row that is finite now.

        For the parameters see ``push``. Changes nothing.
        """
        if largest is None:
            largest = largest_magnitude(gradients)
        if self.store.blocks is not None:
            self._locate(keys)
        optimizer = self.schema.optimizer
        lr = optimizer.lr if lr is None else lr
        self._guard.check(self.schema.name, optimizer, keys, gradients, lr, step, largest)

    def _locate(self, keys: Keys) -> tuple[Locations, int]:
        """Find the rows of ``keys``, with room for those that are missing in host memory.

        Rows that are in blocks on disk are copied to host memory. Returns (locations uint64[n], 0
        for keys without a row; number of keys without a row). Raises OutOfMemory or Corrupt.
        """
        locations, absent = self.store.find(keys)
        blocks = self.store.blocks
        if blocks is not None and (absent or blocks.records.cold_rows):
            locations, absent = self._with_room(keys, locations, absent)
            self._missed += self._promote(keys, locations)
        return locations, absent

    def _promote(self, keys: Keys, locations: Locations) -> int:
        """Copy those rows that are on disk only to host memory; return how many."""
        if len(rows := self.store.promote(keys, locations)):
            self._guard.put(rows)
        return len(rows)

    def _with_room(self, keys: Keys, locations: Locations, absent: int) -> tuple[Locations, int]:
        """Make room for those rows of ``keys`` that are missing in host memory.

        locations  uint64[n]  of the rows; 0 for keys without a row
        absent     number of keys without a row

        Returns both as they are then: other rows of ``keys`` may have had to leave memory.
        """
        missing = 0 if self.store.blocks is None else absent + len(self.store.cold(locations))
        if missing and not self.store.space.fits(missing, absent):
            self.store.space.slack = 0  # other tables have taken what the last look found
            self.make_room([keys])
            locations, absent = self.store.find(keys)
        if missing and self.store.pressed:
            self._pressed()
        return locations, absent

    def load(self, places: Slots) -> int:
        """Copy rows on disk to host memory, where they are clean; return how many.

        places  int64[n], places of rows in blocks; rows that left them meanwhile are ignored

        Raises OutOfMemory or Corrupt; then none was copied.
        """
        blocks = self.store.blocks
        assert blocks is not None
        keys = np.ascontiguousarray(blocks.meta(places)[:, KEY])
        locations, _ = self.store.find(keys)
        still = locations == locations_of(places, blocks.code)
        if (count := int(still.sum())) > self.store.room():
            wanted = count * self.store.space.row_bytes
            raise OutOfMemory(self._budget.limit, self._budget.held, wanted)
        return self._promote(keys[still], locations[still])

    def make_room(self, pushes: Sequence[Keys]) -> None:
        """Make room in host memory for the rows of some keys.

        pushes  uint64[n] each: the keys of one push or more

        Does nothing without a cold tier. Raises NoRoom if a flush is needed first.
        """
        store = self.store
        every = sum(map(len, pushes))
        if store.blocks is None or store.space.surely_fits(every):
            return
        for _ in range(ROUNDS):  # making room may demote rows of these keys
            missing, new, demotions = 0, 0, store.moves.demotions
            for keys in pushes:
                locations, absent = store.find(keys)
                missing += absent + len(store.cold(locations))
                new += absent
            fits = store.make_room(missing, new)
            if store.moves.demotions == demotions:
                break
        if not fits:
            self._refuse(missing, new, store.space.oversized(every))

    def _refuse(self, missing: int, new: int, oversized: bool) -> None:
        """Raise NoRoom if a flush can make room, or OutOfMemory if not even that helps.

        missing, new  number of rows that are not in host memory, and that do not exist yet
        oversized     see NoRoom

        Does neither if rows that exist must be copied to host memory, and nothing else can leave
        it: then they exceed the memory budget.
        """
        budget, what = self._budget, f"table {self.schema.name!r}: "
        size = missing * self.store.space.row_bytes
        dirty = any(holder.dirty for holder in budget.holders)
        if not budget.crowded and (dirty or oversized):
            raise NoRoom(budget.limit, budget.held, size, what, oversized)
        if new:
            raise OutOfMemory(budget.limit, budget.held, size, what, CROWDED)
        if self.store.dirty:
            raise NoRoom(budget.limit, budget.held, size, what, oversized)

    @property
    def cold_rows(self) -> int:
        """Number of rows that are on disk only. Any thread may read this."""
        blocks = self.store.blocks
        return 0 if blocks is None else blocks.records.cold_rows

    def _copies(self, keys: Keys) -> Rows:
        """Return copies of the rows of keys, float32[n, width].

        For keys without a row, returns the initial row that they would get.
        """
        locations, absent = self.store.find(keys)
        rows = np.empty((len(keys), self.schema.width), np.float32)
        self.store.gather(locations, rows)
        if absent:
            missing = np.flatnonzero(locations == 0)
            dim = self.schema.dim
            self.schema.initializer.fill(self._seed, keys[missing], missing, dim, rows)
            rows[missing, dim:] = self._state
        return rows

    def _admit(
        self,
        keys: Keys,
        counts: NDArray[Any],
        missing: NDArray[np.int64],
        locations: Locations,
        version: int,
    ) -> tuple[NDArray[np.bool_], Occurrences]:
        """Create rows for the missing keys that are admitted, and count the other missing keys.

        keys, counts, version  see ``push``
        missing    int64[m]   indices in ``keys`` of the keys without a row
        locations  uint64[n]  written for the keys that get a row

        Returns (bool[m], True for missing keys that have a row now; uint32[m], occurrences of each
        missing key so far).
        """
        absent, more = keys[missing], counts[missing]
        admitted, totals = self.gate.weigh(absent, more, version)
        fresh = absent[admitted]
        made = self.store.create(fresh, self.schema.initializer, self._seed)
        try:
            self.gate.settle(absent, more, admitted, totals, version)
        except BaseException:
            self.store.remove(fresh, made)
            raise
        locations[missing[admitted]] = made
        self.tally.admitted += len(fresh)
        return admitted, totals

    def images(self, slots: Slots, frequencies: NDArray[Any], rows: Rows) -> None:
        """Copy whole rows and frequencies after a push, for its log record.

        slots        int64[n]           slots of the rows, from ``push``
        frequencies  uint64[n]          written
        rows         float32[n, width]  written
        """
        self.store.host.gather(slots, rows)
        self.store.host.slots.frequencies(slots, frequencies)
        if self._guard.unsure:
            self._guard.written(largest_magnitude(rows))

    def put(self, images: Images) -> None:
        """Write whole rows from a block or a log record. Never overwrites a newer row.

        The admission counters of keys that had no row before are deleted. Raises OutOfMemory, and
        changes nothing then.
        """
        keys = images.keys
        locations, absent = self._with_room(keys, *self.store.find(keys))
        fresh = keys[locations == 0] if absent else NO_KEYS
        images = overwrite(self.store, images, locations)
        self.gate.discard(fresh)
        self._guard.put(images.rows)

    def place_newest(self, extent: int, keys: Keys, versions: Versions) -> None:
        """Make the rows of a block on disk current, except those of which there is a newer row.

        extent    the block; none of its rows is current yet
        keys      uint64[n]  keys of all its rows, distinct
        versions  uint64[n]  versions of all its rows

        The admission counters of the keys are deleted.
        """
        place_newest(self.store, extent, keys, versions)
        self.gate.discard(keys)

    def put_counters(self, keys: Keys, totals: Occurrences, versions: Versions) -> None:
        """Write admission counters from a block or a log record. Never overwrites newer counters.

        keys      uint64[n]  distinct; keys that have a row are ignored
        totals    uint32[n]  occurrences of each key
        versions  uint64[n]  log version of each counter's last change
        """
        absent = self.store.find(keys)[0] == 0
        self.gate.put(keys[absent], totals[absent], versions[absent])

    def discard_counters(self, keys: Keys) -> None:
        """Delete the admission counters of those ``keys``, uint64[n], that have no row."""
        self.gate.discard(keys[self.store.find(keys)[0] == 0])

    def delete(self, keys: Keys, before: Versions | None = None) -> tuple[Keys, int]:
        """Delete the rows of keys, and the admission counters of keys without a row.

        keys    uint64[n]  distinct
        before  uint64[n]  delete a row only if its version is older than this; None: always

        Returns (deleted keys, in the order of ``keys``; how many of them had a row).
        """
        locations, absent = self.store.find(keys)
        there = np.flatnonzero(locations)
        if before is not None:
            there = there[self.store.meta(locations[there])[:, VERSION] < before[there]]
        gone = keys[there]
        self.store.remove(gone, locations[there])
        if absent:
            missing = np.flatnonzero(locations == 0)
            counted = missing[self.gate.waiting(keys[missing]) > 0]
            if len(counted):
                self.gate.discard(keys[counted])
                return keys[np.sort(np.concatenate([there, counted]))], len(there)
        return gone, len(there)

    def contents(self) -> Contents:
        """Return all rows for an eviction sweep; valid until the table changes."""
        return self.store.contents()

    def scan(self) -> TableScan:
        """Return a scan of all rows, for copying those of some versions while pushes continue."""
        return TableScan(self.store.host, self.store.blocks)

    def exact_scan(self) -> ExactScan:
        """Return a scan that reads each row exactly once while pushes continue."""
        return ExactScan(self.store.host, self.store.blocks, self.store.watch)

    def tiers_of(self, locations: Locations) -> list[str]:
        """Return the name of each location's tier; "" for location 0, a key without a row."""
        return self.store.names(locations)

    def dump(self) -> Dump:
        """Return copies of all rows and counters, for tests and tools. Doubles the memory."""
        every = self.store.keys()
        locations = self.store.find(every)[0]
        rows = np.empty((len(every), self.schema.width), np.float32)
        self.store.gather(locations, rows)
        parts = [np.stack([k, t, v], axis=1) for k, t, v in self.gate.changed(0)]
        counters = np.concatenate([np.empty((0, 3), np.uint64), *parts])
        counters = counters[np.argsort(counters[:, 0])]
        return Dump(every, rows, self.store.meta(locations), counters, self.gate.cells().copy())

    def close(self) -> None:
        """Close the table. The memory is freed as soon as no scan refers to it."""
        self.store.close()
        self.gate.close()
