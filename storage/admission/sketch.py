"""A sketch: a counting Bloom filter that counts the keys without a row approximately.

cells   uint8[m] or uint16[m]   each key has k cells; a cell has the sum of the counts of its keys
keys    uint64[n]

Cell i of a key is at (h + i s) m / 2^64, with s odd. Two hashes h and s replace k hashes (Kirsch
and Mitzenmacher, "Less hashing, same performance: building a better Bloom filter", ESA 2006).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.admission.gates import GOLDEN, Admitted, CountingGate, Occurrences, Versions
from storage.arena import Arena, Budget
from storage.index import SEGMENT
from storage.kernels import Keys, inline, jit, mix64, prefetch, readonly

FULL = 31 / 64  # share of cells in use at which the sketch ages
HALVED = 1 << 18  # cells that a call halves; or 64 per cell that it counted, if that is more
AHEAD = 8  # keys whose cells are prefetched


@inline
def _stride(hashed: Any) -> Any:
    return mix64(hashed + np.uint64(GOLDEN)) | np.uint64(1)


@inline
def _cell(hashed: Any, m: Any) -> Any:
    """Return the index, below ``m`` <= 2^32, of the cell that the upper half of a hash selects."""
    return ((hashed >> np.uint64(32)) * np.uint64(m)) >> np.uint64(32)


@jit
def _prefetch_cells(cells: Any, salt: Any, k: int, key: Any) -> None:
    hashed = mix64(key ^ salt)
    stride = _stride(hashed)
    for _ in range(k):
        prefetch(cells, np.int64(_cell(hashed, cells.shape[0])), 0)
        hashed += stride


@jit
def _estimate(cells: Any, salt: Any, k: int, keys: Any, out: Any) -> None:
    """Write the estimated count of each key to ``out``: the smallest of its k cells.

    The estimate is too high only if the key shares each of its cells with other keys.

    cells  uint8[m] or uint16[m]
    salt   uint64     mixed into the hash
    k      number of cells per key
    keys   uint64[n]
    out    uint32[n]  written

    Prefetches a few keys ahead: k random cells are k cache misses, and in a batch they can overlap.
    """
    n = keys.shape[0]
    for i in range(min(AHEAD, n)):
        _prefetch_cells(cells, salt, k, keys[i])
    for i in range(n):
        if i + AHEAD < n:
            _prefetch_cells(cells, salt, k, keys[i + AHEAD])
        hashed = mix64(keys[i] ^ salt)
        stride = _stride(hashed)
        least = np.uint32(0xFFFFFFFF)
        for _ in range(k):
            least = min(least, np.uint32(cells[_cell(hashed, cells.shape[0])]))
            hashed += stride
        out[i] = least


@jit
def _add(cells: Any, salt: Any, k: int, most: int, keys: Any, amounts: Any) -> Any:
    """Add amounts to all cells of each key; return by how much the number of used cells grew.

    cells, salt, k  see ``_estimate``
    most     largest value of a cell; a cell that reached it has lost counts, and is not decreased
    keys     uint64[n]
    amounts  int64[n]   amount for each key; negative to subtract
    """
    n = keys.shape[0]
    more = 0
    for i in range(min(AHEAD, n)):
        _prefetch_cells(cells, salt, k, keys[i])
    for i in range(n):
        if i + AHEAD < n:
            _prefetch_cells(cells, salt, k, keys[i + AHEAD])
        hashed = mix64(keys[i] ^ salt)
        stride = _stride(hashed)
        for _ in range(k):
            at = _cell(hashed, cells.shape[0])
            hashed += stride
            old = np.int64(cells[at])
            if old == most and amounts[i] < 0:
                continue
            new = min(max(old + amounts[i], np.int64(0)), np.int64(most))
            more += int(new > 0) - int(old > 0)
            cells[at] = new
    return more


class SketchGate(CountingGate):
    """A counting Bloom filter.

    Fan, Cao, Almeida and Broder, "Summary cache: a scalable wide-area web cache sharing protocol",
    IEEE/ACM Transactions on Networking 8 (2000). A cell contains the sum of the counts of its keys.
    (Conservative update would raise only the smallest cells of a key. A cell would then contain a
    maximum, from which no key can be subtracted. Keys that share cells with an admitted key would
    lose their counts. If keys follow Zipf's law, more than a tenth of admissions would be late.)

    Early admission. A key is admitted too early only if it shares every one of its k cells. Ageing
    keeps at most half of the cells in use, so this happens to at most 2^-k <= error_rate of keys. A
    push is weighed before it is counted.

    Late admission has three causes.

    * Ageing halves all counts, rounding down. It begins when 31/64 (FULL) of the cells are in use,
      because more keys wait than were expected, and once per TTL through ``expire``. While it is in
      progress, each push halves 64 cells per cell that it has counted. What is counted meanwhile
      may be halved, too. A push of very many new keys ages the sketch several times at once, until
      no more than 31/64 of the cells are in use.
    * A key whose estimate was too high subtracts more than it had added when it is admitted. Keys
      that share cells with it, k ln 2 on average, lose up to their whole count. Each is late by
      less than the threshold. Only keys that are admitted early do this, and they are rare.
    * A cell at its maximum is not decreased until ageing halves it, and ageing loses what the cell
      could not count. This takes about 8 keys close to the threshold in one cell.
    """

    def __init__(
        self,
        budget: Budget,
        seed: int,
        *,
        threshold: int,
        expected_keys: int,
        hashes: int,
        cells: int,
        dtype: type[np.unsignedinteger[Any]],
    ) -> None:
        self.cap = expected_keys
        self._threshold = threshold
        self._k = hashes
        self._salt = np.uint64(mix64(np.uint64(seed)))
        self._arena = Arena(1, dtype, budget)
        self._arena.grow(cells)
        self._cells = self._arena.array.reshape(-1)[:cells]
        self._most = int(np.iinfo(dtype).max)
        self._used = 0  # number of cells that are not 0
        self._halved = cells  # cells before this index were halved since ageing began
        self._version = 0  # version of the last push
        self._aged = 0  # version at which ageing last began
        self._loaded = 0  # bytes of cells that were loaded

    @property
    def loss_reason(self) -> str:
        return "a sketch loses counts as it ages"

    @property
    def entries(self) -> int:
        """Number of keys that wait, estimated from the share of used cells.

        Swamidass, Baldi, J. Chem. Inf. Model. 47 (2007).
        """
        m = len(self._cells)
        if not m:  # closed
            return 0
        return round(-m / self._k * math.log1p(-min(self._used, m - 1) / m))

    @property
    def bytes(self) -> int:
        return self._arena.bytes

    def settle(
        self, keys: Keys, counts: Occurrences, admitted: Admitted, totals: Occurrences, version: int
    ) -> None:
        self._version = max(self._version, version)
        self.discard(keys[admitted])
        self._add(keys[~admitted], counts[~admitted].astype(np.int64))
        self._keep_up(len(keys))

    def waiting(self, keys: Keys) -> Occurrences:
        out = np.empty(len(keys), np.uint32)
        _estimate(self._cells, self._salt, self._k, readonly(keys), out)
        return out

    def discard(self, keys: Keys) -> None:
        self._add(keys, -self.waiting(keys).astype(np.int64))

    def expire(self, before: int, limit: int = SEGMENT) -> None:
        if before > self._aged and self._used:
            self._age()
        self._halve(limit)

    def put(self, keys: Keys, totals: Occurrences, versions: Versions) -> None:
        """Raise the count of each key to its total. Lowers no count: a sketch has no versions."""
        self._version = max(self._version, int(versions.max(initial=0)))
        lacking = totals.astype(np.int64) - self.waiting(keys)
        self._add(keys, np.maximum(lacking, 0))
        self._keep_up(len(keys))

    def cells(self) -> NDArray[Any]:
        cells: NDArray[Any] = readonly(self._cells)
        return cells

    def load_cells(self, start: int, data: NDArray[np.uint8]) -> None:
        super().load_cells(start, data)
        size = self._cells.itemsize
        mine = self._cells[start // size :][: len(data) // size]
        cells = data.view(self._cells.dtype)
        self._used += int(np.count_nonzero(cells)) - int(np.count_nonzero(mine))
        mine[:] = cells
        self._halved = len(self._cells)
        self._loaded += len(data)

    def begin(self, version: int) -> None:
        size = self._cells.nbytes
        if self._loaded not in (0, size):
            raise ValueError(f"expected {size} bytes of a sketch, but {self._loaded} were loaded")
        self._version = self._aged = version

    def close(self) -> None:
        self._cells = self._cells[:0].copy()
        self._arena.close()

    def _add(self, keys: Keys, amounts: NDArray[np.int64]) -> None:
        arrays = readonly(keys), readonly(amounts)
        self._used += _add(self._cells, self._salt, self._k, self._most, *arrays)
        self.edits += len(keys)

    def _keep_up(self, keys: int) -> None:
        """Halve cells while more than 31/64 (FULL) of them are in use.

        keys  number of keys in the push; the number of cells to halve is proportional to it
        """
        left = max(HALVED, 64 * self._k * keys)
        while left > 0:
            if self._used > FULL * len(self._cells):
                self._age()
            if not (done := self._halve(left)):
                return
            left -= done

    def _age(self) -> None:
        """Begin to halve all cells, unless ageing is in progress."""
        if self._halved == len(self._cells):
            self._halved = 0
            self._aged = max(self._version, self._aged)

    def _halve(self, limit: int) -> int:
        """Halve up to ``limit`` of the cells that ageing has still to halve; return how many."""
        cells = self._cells[self._halved : self._halved + limit]
        self._used -= int(np.count_nonzero(cells == 1))
        cells >>= 1
        self._halved += len(cells)
        self.edits += len(cells)
        return len(cells)
