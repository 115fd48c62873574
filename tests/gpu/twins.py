"""A tier with a device, and a twin in host memory, through the same operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from lifted import tier_on

from storage.arena import Budget
from storage.gpu.device import Device
from storage.kernels import ABSENT, Images
from storage.optimizer import Optimizer
from storage.tiers.base import Writable
from storage.tiers.host import HostTier
from tests.storage.test_tiers import SEED, UNIFORM, dump, push, put


class Twins:
    """The same random operations on rows in GPU memory and in host memory.

    Rows have other places in each tier. ``run`` compares whatever the tiers return.
    """

    def __init__(self, device: Device, optimizer: Optimizer, dim: int, seed: int) -> None:
        self.rng, self.dim = np.random.default_rng(seed), dim
        self.optimizer, state = optimizer, optimizer.initial_state(dim)
        self.width, self.version, self.next_key = dim + len(state), 0, 0
        self.near = tier_on(device, Budget(1 << 30), dim, state, 0.6)
        self.old: tuple[Any, Any, int] | None = None  # earlier scans, and the version then
        self.far = HostTier(dim, state, Budget(1 << 30))
        self.far.allocate(3)  # so that places differ
        self.places = np.empty((0, 2), np.int64)  # of each row in both tiers

    def some(self) -> Any:
        """Choose rows: int64[n, 2]."""
        count = int(self.rng.integers(0, min(len(self.places), 90) + 1))
        return self.rng.permutation(self.places)[:count]

    def same(self, read: Callable[[Writable, Any], Any], places: Any) -> None:
        """Check that both tiers return the same arrays."""
        pairs = zip(read(self.near, places[:, 0]), read(self.far, places[:, 1]), strict=True)
        for got, wanted in pairs:
            assert got.tobytes() == wanted.tobytes()

    def create(self) -> None:
        count = int(self.rng.integers(0, 120))
        keys = np.arange(self.next_key, self.next_key + count, dtype=np.uint64)
        self.next_key += count
        both = [tier.allocate(count) for tier in (self.near, self.far)]
        for tier, places in zip((self.near, self.far), both, strict=True):
            tier.create(keys, places, UNIFORM, SEED)
            tier.slots.create(keys, places)
        self.places = np.concatenate([self.places, np.stack(both, axis=1)])

    def push(self) -> None:
        some, self.version = self.some(), self.version + 1
        size = 10.0 ** float(self.rng.integers(-30, 2))
        gradients = (self.rng.standard_normal((len(some), self.dim)) * size).astype(np.float32)
        counts = self.rng.integers(1, 9, len(some)).astype(np.uint32)
        for k, tier in enumerate((self.near, self.far)):
            given = gradients.copy()
            rows = np.ascontiguousarray(some[:, k])
            push(tier, rows, given, counts, self.optimizer, 0.01, self.version, self.version)
            given[:] = np.nan  # a tier must not look at it later

    def read(self) -> None:
        some = self.some()
        some[::3] = ABSENT

        def read(tier: Writable, places: Any) -> Any:
            out = np.full((len(places), self.dim), 7, np.float32)
            tier.gather(np.ascontiguousarray(places), out)
            return (out,)

        self.same(read, some)

    def write(self) -> None:
        some, self.old = self.some(), None
        n = len(some)
        rows = self.rng.standard_normal((n, self.width)).astype(np.float32)
        keys = self.near.meta(some[:, 0])[:, 0].copy()
        versions = self.rng.integers(0, self.version + 2, n).astype(np.uint64)
        numbers = self.rng.integers(0, 99, n)
        images = Images(keys, versions, numbers, numbers.astype(np.uint64), abs(rows))
        for k, tier in enumerate((self.near, self.far)):
            put(tier, np.ascontiguousarray(some[:, k]), images)

    def leave(self) -> None:
        chosen = self.rng.random(len(self.places)) < 0.1
        for k, tier in enumerate((self.near, self.far)):
            tier.release(np.ascontiguousarray(self.places[chosen, k]))
        self.places = self.places[~chosen]

    def move(self) -> None:
        self.near.stir(self.rng)

    def look_back(self) -> None:
        """Compare rows that were not changed since the scans were created, whatever moved."""
        near, far, version = self.old or (None, None, 0)
        self.old = self.near.scan(), self.far.scan(), self.version
        if near is None or not len(self.places):
            return
        n, found = len(self.places), []
        for k, scan in enumerate((near, far)):
            rows, frequencies = np.empty((n, self.width), np.float32), np.empty(n, np.uint64)
            meta = scan.copy(np.ascontiguousarray(self.places[:, k]), frequencies, rows)
            same = meta[:, 1] <= version
            found.append((meta[same].tobytes(), frequencies[same].tobytes(), rows[same].tobytes()))
        assert found[0] == found[1]

    def examine(self) -> None:
        def read(tier: Writable, places: Any) -> Any:
            places = np.ascontiguousarray(places)
            scan, n = tier.scan(), len(places)
            rows, frequencies = np.empty((n, self.width), np.float32), np.empty(n, np.uint64)
            out = np.empty((n, self.dim), np.float32)
            meta = scan.copy(places, frequencies, rows)
            scan.read(places, out)
            return rows, frequencies, out, meta, np.array([tier.largest(places)])

        self.same(read, self.some())

    def run(self, rounds: int) -> None:
        verbs = (self.create, self.push, self.push, self.push, self.read, self.write)
        every = (*verbs, self.leave, self.examine, self.move, self.move, self.look_back)
        self.create()
        for choice in self.rng.integers(0, len(every), rounds):
            every[choice]()
        self.same(lambda tier, places: dump(tier, places, self.width), self.places)
