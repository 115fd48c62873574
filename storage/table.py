"""A table's part on one shard: one index, its tiers, one schema.

Not thread-safe: the shard's engine thread is the only caller. Keys within one call are distinct;
the service made sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.arena import Budget
from storage.index import PLACE_BITS, Index, Locations, places
from storage.initializers import table_seed
from storage.kernels import Keys, Rows, Slots
from storage.schema import TableSchema
from storage.tiers.base import FREQUENCY, STEP, VERSION, Meta, Scan, Tier
from storage.tiers.host import HostTier

Mode = Literal["train", "serve"]


@dataclass(frozen=True, slots=True)
class TableStats:
    """What a table holds on this shard."""

    rows: int
    bytes: int  # taken from the budget: slab, metadata, index, unused room in each
    index_bytes: int


@dataclass(frozen=True, slots=True)
class Dump:
    """Every row of a table on this shard, by ascending key."""

    keys: Keys  # uint64[n]
    rows: Rows  # float32[n, width]
    meta: Meta  # uint64[n, 4]: key, version, step, frequency


class Table:
    """Rows by key under one schema."""

    def __init__(self, schema: TableSchema, budget: Budget) -> None:
        self.schema = schema
        self._index = Index(budget)
        self._host: Tier = HostTier(schema.dim, schema.width, budget)
        self._seed = table_seed(schema.seed, schema.name)
        self._state = schema.optimizer.initial_state(schema.dim)

    def __len__(self) -> int:
        return len(self._index)

    def stats(self) -> TableStats:
        """What the table holds now."""
        index = self._index.bytes
        return TableStats(rows=len(self), bytes=index + self._host.bytes, index_bytes=index)

    def pull(self, keys: Keys, mode: Mode, out: Rows) -> Locations:
        """Write the embeddings of ``keys`` to ``out``; changes nothing in the table.

        keys  uint64[n]        distinct or not
        mode  for keys without a row: "train" writes their initial value, "serve" the table's
              serving default
        out   float32[n, dim]

        Returns uint64[n]: where each key is, 0 for keys without a row.
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
        """Versions uint64[n], steps int64[n], frequencies uint64[n]; 0 for keys without a row."""
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
    ) -> Slots:
        """Run one optimizer step over the rows of ``keys``, creating those that are missing.

        keys       uint64[n]        distinct
        gradients  float32[n, dim]  finite
        counts     uint32[n]        occurrences of each key behind its gradient
        lr         overrides the table's learning rate for this push

        Returns the places of the rows, for ``images``. All of it happens or, with OutOfMemory,
        nothing.
        """
        locations, absent = self._index.find(keys)
        if absent:
            missing = np.flatnonzero(locations == 0)
            locations[missing] = self._create(keys[missing])
        optimizer = self.schema.optimizer
        lr = optimizer.lr if lr is None else lr
        slots = places(locations)
        self._host.push(slots, gradients, counts, optimizer, lr, step, version)
        return slots

    def images(self, slots: Slots, frequencies: NDArray[Any], rows: Rows) -> None:
        """Copy what a push left: whole rows float32[n, width], their frequencies uint64[n]."""
        self._host.images(slots, frequencies, rows)

    def put(
        self,
        keys: Keys,
        versions: NDArray[Any],
        steps: NDArray[Any],
        frequencies: NDArray[Any],
        rows: Rows,
    ) -> None:
        """Write whole rows as they were read from a block or a record; newer ones stay.

        keys         uint64[n]           distinct
        versions     uint64[n], steps int64[n], frequencies uint64[n]
        rows         float32[n, width]

        All of it happens or, with OutOfMemory, nothing.
        """
        locations, absent = self._index.find(keys)
        if absent:
            missing = np.flatnonzero(locations == 0)
            locations[missing] = self._place(keys[missing])
        self._host.put(keys, places(locations), versions, steps, frequencies, rows)

    def delete(self, keys: Keys, before: int | None = None) -> Keys:
        """Delete rows; return the keys of those that were there, in the order of ``keys``.

        keys    uint64[n]  distinct
        before  only rows of lower versions
        """
        locations, _ = self._index.find(keys)
        there = np.flatnonzero(locations)
        if before is not None:
            meta = self._host.meta(places(locations[there]))
            there = there[meta[:, VERSION] < before]
        self._index.remove(keys[there])
        self._host.release(places(locations[there]))
        return keys[there]

    def scan(self) -> Scan:
        """All rows, for readers that go through them while pushes go on."""
        return self._host.scan()

    def tiers(self) -> list[tuple[str, Scan, int]]:
        """All rows tier by tier: its name, its rows, and the bytes that it takes."""
        return [(self._host.name, self._host.scan(), self._host.bytes)]

    def tiers_of(self, locations: Locations) -> list[str]:
        """The name of the tier of each location; empty for keys without a row."""
        names = {0: "", self._host.code: self._host.name}
        return [names[code] for code in (locations >> np.uint64(PLACE_BITS)).tolist()]

    def dump(self) -> Dump:
        """Copies of everything, for tests and tools; as large as the table."""
        keys = [k for k, _ in self._index.slices()]
        every = np.sort(np.concatenate(keys))
        rows, meta = self._host.dump(places(self._index.find(every)[0]))
        return Dump(every, rows, meta)

    def close(self) -> None:
        """Return the memory."""
        self._index.close()
        self._host.close()

    def _create(self, keys: Keys) -> Locations:
        """Give absent keys their initial rows; all or, with OutOfMemory, none."""
        locations = self._place(keys)
        slots = places(locations)
        self._host.create(keys, slots, self.schema.initializer, self._seed, self._state)
        return locations

    def _place(self, keys: Keys) -> Locations:
        """Places for the rows of absent keys, not filled yet; all or, with OutOfMemory, none."""
        slots = self._host.allocate(len(keys))
        locations = slots.view(np.uint64) | np.uint64(self._host.code << PLACE_BITS)
        try:
            self._index.insert(keys, locations)
        except BaseException:
            self._host.release(slots)
            raise
        return locations
