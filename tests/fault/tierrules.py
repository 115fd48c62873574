"""What the random model does to the tiers of a shard: its rows leave memory and come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from homes import Homes
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from stores import DIM, Home, analyses_of

from psproto import ps_pb2 as pb
from psserver.requests import Pull, Push
from storage.errors import NoRoom
from storage.slots import FREQUENCY, KEY, STEP

NAMES = st.sampled_from(["t", "u", "v", "w"])
KEYS = st.lists(st.integers(0, 25) | st.sampled_from([2**63, 2**64 - 1]), unique=True, max_size=10)
STEPS = st.integers(0, 12)
LITTLE = 3900 << 10  # bytes of memory: for four indexes, the counters of "v" and "w", and few rows


class TierRules:
    """Part of the state machine: rules that move rows, and rules that need them wherever they are.

    The machine has the other rules, and a model of each table.
    """

    home: Home
    model: dict[str, Any]
    push: Callable[..., None]
    delete: Callable[..., None]
    create: Callable[..., None]
    checkpoint: Callable[..., None]
    change: Callable[..., bool]
    fresh: Callable[[], Path]
    options: dict[str, Any]
    acknowledged: int
    faults: Any
    remember: Callable[..., None]

    @rule(name=NAMES, start=st.integers(0, 3), count=st.integers(1, 300))
    def push_many(self, name: str, start: int, count: int) -> None:
        """Push more rows than a small budget has room for."""
        self.push(name, list(range(1000 + 100 * start, 1000 + 100 * start + count)), 1, 0, 0)

    @rule(name=NAMES, keys=KEYS, value=st.integers(-8, 8), step=STEPS)
    def write(self, name: str, keys: list[int], value: int, step: int) -> None:
        """Write whole rows, as an import does."""
        entry = self.home.shard._tables.find(name)
        if entry is None or not keys:
            return
        rows = np.full((len(keys), DIM), value, np.float32)
        frequencies = np.full(len(keys), 3, np.uint64)
        columns = np.array(keys, np.uint64), frequencies, rows
        version = self.home.shard.version + 1

        def apply() -> None:
            self.home.shard.write_rows(entry.number, step, *columns)

        if self.change(lambda: self.with_room(apply)):
            model = self.model[name]
            for key in keys:
                model.waiting.pop(key, None)
                model.rows[key] = (float(value), version, 3, step)
            self.remember()

    @rule(share=st.sampled_from([0.3, 1.0]))
    def demote(self, share: float) -> None:
        """Give up the copies in memory of some of the clean rows, or of all."""
        for store in self.stores():
            count = int(share * store.host.slots.rows)
            if share == 1.0:
                store.demote(count)
            elif count:
                store._leave(*store._cache.victims(count))

    @rule(size=st.sampled_from([4096, 1 << 20]))
    def shrink(self, size: int) -> None:
        """Give memory back."""
        for store in self.stores():
            store.shrink(size)

    @rule(name=NAMES, keys=KEYS, changed=KEYS, rounds=st.integers(1, 4))
    def make_blocks_sparse(
        self, name: str, keys: list[int], changed: list[int], rounds: int
    ) -> None:
        """Flush, demote and push by turns, so that flushes move what is left of older blocks."""
        self.create(name)
        self.push(name, keys, 1, 0, 0)
        for _ in range(rounds):
            self.checkpoint()
            self.demote(1.0)
            self.push(name, changed, 1, 1, 1)
            self.delete(name, changed[:1], 0)

    @rule(name=NAMES)
    def analyze(self, name: str) -> None:
        """An analysis must see each row once, wherever it is, and move none."""
        if name not in self.model:
            return
        before = self.where()
        request = pb.AnalyzeRequest(table=name)
        *_, last = analyses_of(self.home.shard).analyze(request)
        rows = self.model[name].rows.values()
        assert last.summary.rows == len(rows)
        assert last.summary.occurrences == sum(frequency for _, _, frequency, _ in rows)
        assert self.where() == before

    @rule(name=NAMES, after=st.integers(0, 10))
    def scan(self, name: str, after: int) -> None:
        """A scan, as for a subscriber, must find the rows that are newer than a version."""
        entry, found = self.home.shard._tables.find(name), set[int]()
        if entry is None:
            return
        scan, at = entry.table.scan(), 0
        newest = self.home.shard.version
        while at is not None:
            places, at = scan.find(at, max(0, newest - after), newest, 7)
            frequencies = np.empty(len(places), np.uint64)
            rows = np.empty((len(places), DIM), np.float32)
            found.update(scan.copy(places, frequencies, rows)[:, KEY].tolist())
        rows_of = self.model[name].rows
        assert found == {key for key, row in rows_of.items() if row[1] > newest - after}

    @rule(name=NAMES, keys=KEYS, prefetch=st.booleans())
    def pull(self, name: str, keys: list[int], prefetch: bool) -> None:
        """A pull must find each row where it is and move none, whether it was prefetched or not."""
        if name not in self.model:
            return
        shard, rows = self.home.shard, self.model[name].rows
        asked = Pull(name, np.array(keys, np.uint64), pb.DTYPE_FLOAT32, "serve", True, 0)
        before = self.where()
        if prefetch:
            ahead = replace(asked, prefetch=True)
            reads = shard.cold_reads([], [ahead], prefetch=True)
            for read in reads:
                read.pages.warm()
            shard.settle(reads)
            event("rows prefetched" if reads else "nothing to prefetch")
        got = shard.exchange([], [asked]).pulls[0]
        want = [rows.get(key, (0.0, 0, 0, 0)) for key in keys]  # absent rows have version 0
        assert got.embeddings.reshape(-1, DIM).tolist() == [[value] * DIM for value, *_ in want]
        assert got.versions.tolist() == [version for _, version, *_ in want]
        assert got.frequencies.tolist() == [frequency for _, _, frequency, _ in want]
        assert self.where() == before

    @rule(name=NAMES, keys=KEYS)
    def pull_from_disk(self, name: str, keys: list[int]) -> None:
        self.create(name)
        self.push(name, keys, 1, 0, 0)
        self.checkpoint()
        self.demote(1.0)
        self.pull(name, keys, True)
        self.pull(name, keys, False)

    @precondition(lambda self: not self.home.failures and not self.faults.full)
    @rule(shards=st.integers(1, 3))
    def restore_elsewhere(self, shards: int) -> None:
        """A checkpoint, restored to another number of shards with as little memory, has all rows.

        The machine goes on with its own shard.
        """
        store = self.fresh()
        url = f"file://{store}"
        source = Homes(store, 1, url)
        source.nodes[0].serve(self.home)
        source.checkpoint("c")
        self.acknowledged = max(self.acknowledged, self.home.base.state.version)  # type: ignore[union-attr]
        memory = self.options["memory_bytes"]
        with Homes(self.fresh(), shards, url, memory_bytes=memory) as restored:
            restored.restore("c")
            self.check_restored(restored)
            for node in restored.nodes:
                node.reopen()
            self.check_restored(restored)

    def check_restored(self, restored: Homes) -> None:
        """Compare the shards of another cluster with the model, except versions."""
        rows = restored.rows()
        assert sorted(rows) == sorted(self.model)
        for name, model in self.model.items():
            want = {
                key: ([value] * DIM, frequency, step)
                for key, (value, _, frequency, step) in model.rows.items()
            }
            assert want == {
                key: (row, meta[FREQUENCY], meta[STEP]) for key, (row, meta) in rows[name].items()
            }

    def where(self) -> list[tuple[int, int]]:
        """Return (rows in memory, dirty rows) of each table."""
        return [(store.host.slots.rows, store.dirty) for store in self.stores()]

    def stores(self) -> list[Any]:
        """Return where the rows of each table are."""
        return [entry.table.store for entry in self.home.shard._tables]

    def exchange(self, item: Push) -> None:
        self.with_room(lambda: self.home.shard.exchange([item], []), item)

    def with_room(self, call: Callable[[], Any], item: Push | None = None) -> None:
        """Change the shard as the server does: if there is no room, flush first."""
        for flushes in range(4):
            try:
                call()
                return
            except NoRoom as error:
                if flushes and error.oversized and item is not None:
                    self.home.shard.exchange([item], [], exceed=True)
                    return
                self.checkpoint()
        raise AssertionError("no room after 4 flushes")
