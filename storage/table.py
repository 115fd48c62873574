"""One shard's part of a table: a schema, an index, and tiers with the rows.

Not thread-safe: the shard's engine thread is the only caller. Keys within one call are distinct,
which the service has checked.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.admission.gates import Gate, Occurrences, Versions
from storage.admission.rules import Admission
from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.eviction.contract import View
from storage.eviction.evictor import Evictor
from storage.index import PLACE_BITS, Index, Locations, places
from storage.initializers import table_seed
from storage.kernels import Images, Keys, Rows, Slots, largest_magnitude
from storage.overflow import OverflowGuard
from storage.records import NO_KEYS, NO_TOTALS
from storage.results import Dump, Pushed, TableStats, Tally
from storage.schema import TableSchema
from storage.tiers.base import FREQUENCY, STEP, VERSION, Scan, Tier
from storage.tiers.host import HostTier

Mode = Literal["train", "serve"]


class Table:
    """Rows by key under one schema.

    share  part of all keys that this shard owns, 0..1
    """

    def __init__(self, schema: TableSchema, budget: Budget, share: float = 1.0) -> None:
        self.schema = schema
        self.tally = Tally()
        self._budget, self._share = budget, share
        self.evictor = Evictor([rule.on(share) for rule in schema.evictions])
        self._index = Index(budget)
        self._host: Tier = HostTier(schema.dim, schema.width, budget)
        self._seed = table_seed(schema.seed, schema.name)
        self._state = schema.optimizer.initial_state(schema.dim)
        self._guard = OverflowGuard(schema, self._copies)
        try:
            self.gate = self._make_gate(schema.admission.on(share))
        except BaseException:
            self._index.close()
            self._host.close()
            raise

    def __len__(self) -> int:
        return len(self._index)

    def alter(self, schema: TableSchema, version: int, seconds: float) -> int | None:
        """Go on under a schema that differs in alterable fields; see psserver/alterations.py.

        version  of the alteration, at ``seconds``

        Returns None if no counters towards admission are lost; else about how many there were. They
        are dropped where the new rule cannot go on from them, and their keys start again from zero.

        Raises OutOfMemory, and changes nothing then, if there is no room for a new sketch.
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
        gate.edits = replaced.edits + 1  # so that no block of cells is taken for the new gate's
        replaced.close()
        self.gate = gate
        return dropped if replaced.counting or replaced.loss_reason else None

    def stats(self) -> TableStats:
        """Return the size of the table now."""
        index, gate = self._index.bytes, self.gate
        return TableStats(
            rows=len(self),
            bytes=index + self._host.bytes + gate.bytes,
            index_bytes=index,
            waiting=gate.entries,
            counter_bytes=gate.bytes,
        )

    def pull(self, keys: Keys, mode: Mode, out: Rows) -> Locations:
        """Write the embeddings of ``keys`` to ``out``; changes nothing in the table.

        keys  uint64[n]        distinct or not
        mode  for keys without a row: "train" writes their initial value, "serve" the table's
              serving default
        out   float32[n, dim]

        Returns the location of each key, uint64[n]; 0 for keys without a row.
        """
        locations, absent = self._index.find(keys)
        self._host.read(places(locations), out)
        if absent:
            missing = np.flatnonzero(locations == 0)
            if mode == "train":
                initializer, dim = self.schema.initializer, self.schema.dim
                initializer.fill(self._seed, keys[missing], missing, dim, out)
            else:
                out[missing] = self.schema.serving_default
        return locations

    def metadata(self, locations: Locations) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return versions uint64[n], steps int64[n], frequencies uint64[n]; 0 for absent rows."""
        meta = np.zeros((len(locations), 4), np.uint64)
        present = np.flatnonzero(locations)
        meta[present] = self._host.meta(places(locations[present]))
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
        step       of the trainer, for the optimizer. Rows record it, or the step of the table if
                   that is larger: a client that lags or sends no step makes no row look idle
        lr         overrides the table's learning rate for this push
        largest    largest magnitude of the gradients; None: it is not known
        copied     the caller passes the result to ``images``

        Gradients of keys that are not admitted are dropped. Raises OutOfMemory or RowOverflow, and
        changes nothing then.
        """
        self.check_push(keys, gradients, step=step, lr=lr, largest=largest)
        locations, absent = self._index.find(keys)
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
                self.tally.refused += len(refused)
                self.tally.dropped += int(counts[refused].sum(dtype=np.uint64))
                keys, counts, gradients = keys[present], counts[present], gradients[present]
                locations = locations[present]
        optimizer = self.schema.optimizer
        lr = optimizer.lr if lr is None else lr
        slots = places(locations)
        stamp = max(step, self.evictor.step)
        self._host.push(slots, gradients, counts, optimizer, lr, step, version, stamp)
        if not copied:
            self._guard.pushed(self._host.largest(slots))
        return Pushed(keys, slots, waiting, totals, stamp)

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

        Arguments are those of ``push``.
        """
        optimizer = self.schema.optimizer
        lr = optimizer.lr if lr is None else lr
        self._guard.check(self.schema.name, optimizer, keys, gradients, lr, step, largest)

    def _copies(self, keys: Keys) -> Rows:
        """Return copies of rows, float32[n, width]; keys without one get the one they would get."""
        locations, absent = self._index.find(keys)
        rows = np.empty((len(keys), self.schema.width), np.float32)
        present = np.flatnonzero(locations)
        rows[present] = self._host.dump(places(locations[present]))[0]
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
        """Create rows for the missing keys that are admitted, and count the others.

        missing    int64[m]   positions in ``keys`` of those without a row
        locations  uint64[n]  written where a row is created

        Returns which of the missing keys have a row now, bool[m], and their occurrences so far,
        uint32[m].
        """
        absent, more = keys[missing], counts[missing]
        admitted, totals = self.gate.weigh(absent, more, version)
        fresh = absent[admitted]
        made = self._create(fresh)
        try:
            self.gate.settle(absent, more, admitted, totals, version)
        except BaseException:
            self._index.remove(fresh)
            self._host.release(places(made))
            raise
        locations[missing[admitted]] = made
        self.tally.admitted += len(fresh)
        return admitted, totals

    def images(self, slots: Slots, frequencies: NDArray[Any], rows: Rows) -> None:
        """Copy the rows that a push left.

        frequencies  uint64[n]          written
        rows         float32[n, width]  written
        """
        self._host.images(slots, frequencies, rows)
        self._guard.pushed(largest_magnitude(rows))

    def put(self, images: Images) -> None:
        """Write whole rows from a block or a record, except over newer rows.

        Keys that get a row lose their counters. Raises OutOfMemory, and changes nothing then.
        """
        keys, rows = images.keys, images.rows
        locations, absent = self._index.find(keys)
        if absent:
            missing = np.flatnonzero(locations == 0)
            locations[missing] = self._place(keys[missing])
            self.gate.discard(keys[missing])
        self._host.put(places(locations), images)
        self._guard.put(rows)

    def put_counters(self, keys: Keys, totals: Occurrences, versions: Versions) -> None:
        """Write counters from a block or a record, except over newer counters.

        keys      uint64[n], distinct; those that have a row are ignored
        totals    uint32[n]
        versions  uint64[n]
        """
        absent = self._index.find(keys)[0] == 0
        self.gate.put(keys[absent], totals[absent], versions[absent])

    def delete(self, keys: Keys, before: Versions | None = None) -> tuple[Keys, int]:
        """Delete rows, and the counters of keys without one.

        keys    uint64[n]  distinct
        before  uint64[n]  only rows of lower versions; None: all rows

        Returns the keys that had a row or a counter, in the order of ``keys``, and how many had a
        row.
        """
        locations, absent = self._index.find(keys)
        there = np.flatnonzero(locations)
        if before is not None:
            meta = self._host.meta(places(locations[there]))
            there = there[meta[:, VERSION] < before[there]]
        gone = keys[there]
        self._index.remove(gone)
        self._host.release(places(locations[there]))
        if absent:
            missing = np.flatnonzero(locations == 0)
            counted = missing[self.gate.waiting(keys[missing]) > 0]
            if len(counted):
                self.gate.discard(keys[counted])
                return keys[np.sort(np.concatenate([there, counted]))], len(there)
        return gone, len(there)

    def view(self) -> View:
        """Return the rows as sweeps see them; valid until the next call that changes the table."""
        return self._host.view()

    def scan(self) -> Scan:
        """Return all rows, for readers that go through them while pushes go on."""
        return self._host.scan()

    def tiers(self) -> list[tuple[str, Scan, int]]:
        """Return for each tier its name, its rows, and the bytes that it takes."""
        return [(self._host.name, self._host.scan(), self._host.bytes)]

    def tiers_of(self, locations: Locations) -> list[str]:
        """Return the name of the tier of each location; empty for keys without a row."""
        names = {0: "", self._host.code: self._host.name}
        return [names[code] for code in (locations >> np.uint64(PLACE_BITS)).tolist()]

    def dump(self) -> Dump:
        """Return copies of everything, for tests and tools: as large as the table."""
        keys = [k for k, _ in self._index.slices()]
        every = np.sort(np.concatenate(keys))
        rows, meta = self._host.dump(places(self._index.find(every)[0]))
        parts = [np.stack([k, t, v], axis=1) for k, t, v in self.gate.changed(0)]
        counters = np.concatenate([np.empty((0, 3), np.uint64), *parts])
        counters = counters[np.argsort(counters[:, 0])]
        return Dump(every, rows, meta, counters, self.gate.cells().copy())

    def close(self) -> None:
        """Free the memory, once the last scan has let go of it."""
        self._index.close()
        self._host.close()
        self.gate.close()

    def _create(self, keys: Keys) -> Locations:
        """Create initial rows for absent keys; raises OutOfMemory, and creates none then."""
        locations = self._place(keys)
        slots = places(locations)
        self._host.create(keys, slots, self.schema.initializer, self._seed, self._state)
        return locations

    def _place(self, keys: Keys) -> Locations:
        """Return locations for the rows of absent keys, not filled; OutOfMemory changes nothing."""
        slots = self._host.allocate(len(keys))
        locations = slots.view(np.uint64) | np.uint64(self._host.code << PLACE_BITS)
        try:
            self._index.insert(keys, locations)
        except BaseException:
            self._host.release(slots)
            raise
        return locations
