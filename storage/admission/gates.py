"""Which keys may have a row: the gates that count their occurrences.

A gate counts the occurrences of keys that have no row. A key that is admitted, evicted or deleted
is forgotten: if it comes back without a row, it starts again from zero.

A push is whole or nothing, so asking and counting are two calls: ``weigh`` changes nothing, rows
are made for what it admits, which may find no memory, and ``settle`` counts. A count travels with
the log as what it became (``put``), never as what was added, so a record may be replayed again.
A record or checkpoint may bring back a counter that was dropped for age or room since; its count
is true, so it does no harm. One that makes rows is replayed with ``forget``.

"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.index import SEGMENT
from storage.kernels import Keys, jit, mix64, readonly

LARGEST = (1 << 32) - 1  # a total stops counting there, as frequencies do
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd

Admitted = NDArray[np.bool_]
Occurrences = NDArray[np.uint32]
Versions = NDArray[np.uint64]


class Gate(ABC):
    """The counters of one table on one shard; engine thread only.

    Calls take keys without a row, uint64[n], distinct within a call.
    """

    counting: ClassVar[bool] = False  # whether keys that wait have counters
    cap: int = 0  # keys that it is made to count at a time
    dropped: int = 0  # counters that went for age or for room, so far
    edits: int = 0  # grows whenever ``cells`` change

    @property
    def forgets(self) -> str:
        """How a key may have been pushed that has neither row nor counter; empty: it was not."""
        return ""

    @abstractmethod
    def weigh(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        """Which keys of a push are to have a row; changes nothing.

        counts   uint32[n]  occurrences in this push
        version  of this push

        Returns bool[n], and uint32[n]: the occurrences so far with those of this push, which is
        an admitted key's first frequency, and the counter's next value for any other.
        """

    def settle(
        self, keys: Keys, counts: Occurrences, admitted: Admitted, totals: Occurrences, version: int
    ) -> None:
        """Count what ``weigh`` said of the same push; all or, with OutOfMemory, nothing.

        No other call may have changed the gate in between.
        """
        return  # unless a gate counts

    def admit(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        """``weigh`` and ``settle``, for callers that need nothing in between."""
        admitted, totals = self.weigh(keys, counts, version)
        self.settle(keys, counts, admitted, totals, version)
        return admitted, totals

    def waiting(self, keys: Keys) -> Occurrences:
        """Occurrences so far, uint32[n]; changes nothing."""
        return np.zeros(len(keys), np.uint32)

    def forget(self, keys: Keys) -> None:
        """Start keys again from zero, those without a counter included."""
        return  # unless a gate counts

    def expire(self, before: int, limit: int = SEGMENT) -> None:
        """Let go of counters last touched before a version; each call looks at the next ones.

        limit  places looked at, about; calls with the same ``before`` see all of them in turn
        """
        return  # unless a gate counts

    def put(self, keys: Keys, totals: Occurrences, versions: Versions) -> None:
        """Write counters as a record or a block has them; newer ones stay.

        All of it happens or, with OutOfMemory, nothing.
        """
        return  # unless a gate counts

    def changed(self, after: int) -> Iterator[tuple[Keys, Occurrences, Versions]]:
        """Yield counters of versions above ``after``, in slices; pushes may go on in between.

        Every counter that stays comes at least once. A slice looks at a bounded number of counters,
        so it may be empty. Sketches have ``cells`` instead.
        """
        return iter(())

    def cells(self) -> NDArray[Any]:
        """All of a sketch, a read-only view that the next push changes; empty for other gates.

        Parts that are read at different versions are one good copy as soon as what was pushed
        meanwhile was ``put``.
        """
        return np.empty(0, np.uint8)

    def load_cells(self, start: int, data: NDArray[np.uint8]) -> None:
        """Take over the bytes from ``start`` on of what ``cells`` of an equal gate returned.

        All parts, each a whole number of cells, make an equal gate. Raises ValueError if it cannot
        have been the same rule.
        """
        size = self.cells().nbytes
        if start < 0 or start + len(data) > size:
            raise ValueError(
                f"a sketch of {size} bytes has no bytes {start}..{start + len(data) - 1}"
            )

    def begin(self, version: int) -> None:
        """All that was stored is loaded, and pushes go on behind this version.

        Raises ValueError if only a part of a sketch was loaded.
        """
        return  # unless a gate ages

    @property
    def entries(self) -> int:
        """Keys waiting; for a sketch, estimated."""
        return 0

    @property
    def bytes(self) -> int:
        """Bytes taken from the budget."""
        return 0

    def alter(self, threshold: int, cap: int) -> None:
        """Go on with the same counters under another threshold and another ``cap``."""
        return  # unless a gate counts

    def close(self) -> None:
        """Return the memory."""
        return  # unless a gate has any


def _sum(before: Occurrences, counts: Occurrences) -> Occurrences:
    """Totals, which stop counting at LARGEST."""
    return np.minimum(np.add(before, counts, dtype=np.uint64), LARGEST).astype(np.uint32)


class AlwaysGate(Gate):
    """Keeps no counters."""

    def weigh(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        return np.ones(len(keys), np.bool_), counts.astype(np.uint32)


class CountingGate(Gate):
    """Admits a key once its occurrences reach a threshold."""

    counting: ClassVar[bool] = True
    _threshold: int

    def weigh(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        totals = _sum(self.waiting(keys), counts)
        return totals >= self._threshold, totals

    def alter(self, threshold: int, cap: int) -> None:
        self._threshold, self.cap = threshold, cap


@jit
def _draw(keys: Any, counts: Any, seed: Any, version: Any, p: float, out: Any) -> None:
    """out[i] = whether one of counts[i] draws of probability p succeeds, by a single number.

    That number is output ``version`` of the key's own stream, as in initializers.py: the same
    whatever the batch. The seed is mixed first, so that the streams are not those of the initial
    values.
    """
    start = mix64(seed + np.uint64(GOLDEN))
    position = (version + np.uint64(1)) * np.uint64(GOLDEN)
    failure = np.log1p(-p)  # -inf for p = 1
    for i in range(keys.shape[0]):
        bits = mix64(mix64(keys[i] ^ start) + position)
        chance = -np.expm1(np.float64(counts[i]) * failure)
        out[i] = counts[i] > 0 and np.float64(bits >> np.uint64(11)) * 2.0**-53 < chance


class ProbabilityGate(Gate):
    """Keeps no counters: what happened before does not matter."""

    def __init__(self, p: float, seed: int) -> None:
        self._p = p
        self._seed = np.uint64(seed)

    @property
    def forgets(self) -> str:
        return "keys that were pushed and not drawn are not remembered"

    def weigh(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        admitted = np.empty(len(keys), np.bool_)
        arrays = readonly(keys), readonly(counts)
        _draw(*arrays, self._seed, np.uint64(version), self._p, admitted)
        return admitted, counts.astype(np.uint32)
