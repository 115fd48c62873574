"""The contract of a tier: one kind of storage for rows, for example host memory.

A table finds a row by its location: the code of a tier, and the row's place there. A tier stores
rows by place and knows nothing about keys. To add a tier, write a class in a new file next to this
one, and add it to the tiers of ``Table``. The table uses tiers only through this contract, and the
tests of the contract run over every implementation.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray

from storage.eviction.contract import View
from storage.initializers import Initializer
from storage.kernels import Keys, Rows, Slots
from storage.optimizer import Optimizer
from storage.slots import LOOK, Homes, Meta, SlotEntries


class Scan(Protocol):
    """Reads the rows that a tier had when the scan was created, one slice of places per call.

    Any thread may use it while the engine thread pushes. A row that is pushed meanwhile may be
    missed, or copied partly old and partly new. The row's version is then newer than all versions
    that existed when the scan was created.
    """

    def find(
        self, start: int, after: int, upto: int, limit: int, look: int = LOOK
    ) -> tuple[Slots, int | None]:
        """Find rows with versions in after+1..upto.

        start  0 in the first call, then the next start that the previous call returned
        limit  maximum number of rows to find
        look   maximum number of places to examine, which makes the call short; EVERY: all

        Returns (places of the rows found, int64[<= limit]; next start, or None at the end of the
        tier). A call may find no rows although later calls do.
        """
        ...

    def copy(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> Meta:
        """Copy the first k numbers of rows, and their frequencies. Return the rows' metadata.

        places       int64[n]       from ``find``
        frequencies  uint64[n]      written
        rows         float32[n, k]  written; k is at most the width of a row
        """
        ...

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        """Write the L2 norms of embeddings to ``norms``, and return the rows' metadata.

        places  int64[n]    from ``find``
        norms   float64[n]  written

        Version 0 in the metadata means that the row was deleted after ``find`` returned it.
        """
        ...

    def read(self, places: Slots, out: Rows) -> None:
        """Copy the embeddings at ``places``, int64[n], to ``out``, float32[n, dim]."""
        ...


class Tier(Protocol):
    """Stores rows. A place, an int64 that the tier chooses, identifies a row in the tier.

    The places within one call must be distinct and in use. A row is float32[width],
    ``[embedding | optimizer state]``.

    name  name of the tier, for statistics
    code  1..255, stored in every location of a row in this tier; never changes its meaning
    """

    name: ClassVar[str]
    code: ClassVar[int]

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes of host memory, or of the disk, that the rows take, including unused places."""
        ...

    def gather(self, places: Slots, out: Rows) -> None:
        """Copy the embeddings, or the whole rows, at ``places`` to ``out``.

        places  int64[n]  ABSENT (-1) at index i: leave out[i] unchanged
        out     float32[n, dim] for embeddings, or float32[n, width] for whole rows
        """
        ...

    def meta(self, places: Slots) -> Meta:
        """Return a copy of the metadata (key, version, step, frequency) of each row."""
        ...

    def scan(self) -> Scan:
        """Return a scan of all rows, which other threads may use while pushes continue."""
        ...

    def close(self) -> None:
        """Close the tier. The memory is freed as soon as no scan refers to it."""
        ...


class DirtyScan(Scan, Protocol):
    """A scan that also finds the dirty rows: those without an up-to-date copy in a block."""

    def dirty(self, start: int, upto: int, limit: int) -> tuple[Slots, int | None]:
        """Find dirty rows with versions in 1..upto. For the rest see ``find``."""
        ...


class Writable(Tier, Protocol):
    """A tier whose rows pushes can write. Its places are slots: indexes of rows in its memory.

    slots  key, metadata and home of the row in each slot; slots.py defines them
    """

    slots: SlotEntries

    def allocate(self, count: int, *, exact: bool = False) -> Slots:
        """Allocate ``count`` slots, and return them as int64[count].

        exact  take no more memory than is needed

        The caller must fill their rows and their entries in ``slots``. Raises OutOfMemory, and
        changes nothing then.
        """
        ...

    def release(self, slots: Slots) -> Homes:
        """Free some slots. Returns the homes of their rows, uint64[n]; 0 for dirty rows."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of host memory that one slot takes: its row and its entry in ``slots``."""
        ...

    @property
    def in_host(self) -> int:
        """Number of rows whose numbers are in host memory."""
        ...

    @property
    def capacity(self) -> int:
        """Number of slots for which there is memory."""
        ...

    def room(self, spare: int) -> int:
        """Return how many rows fit in the memory that is there, and in ``spare`` bytes more."""
        ...

    def cost(self, count: int) -> int:
        """Return how many bytes of memory the tier needs for ``count`` more rows; 0: none."""
        ...

    def cut(self, used: int) -> None:
        """Forget the slots from number ``used`` on, all of which must be free.

        Their memory is given back to the budget. Scans may still look at it: the entries in
        ``slots`` are zero.
        """
        ...

    def compact(self, size: int) -> None:
        """Give back up to about ``size`` bytes of memory that no row needs."""
        ...

    def create(self, keys: Keys, slots: Slots, initializer: Initializer, seed: int) -> None:
        """Write the initial rows of new keys: initial embeddings, and initial optimizer state.

        keys         uint64[n]  key of each row
        slots        int64[n]   slot of each row, from ``allocate``
        initializer  computes the embeddings
        seed         seed of the table's initial values, from ``table_seed``
        """
        ...

    def scatter(self, slots: Slots, rows: Rows) -> None:
        """Copy row i of ``rows``, float32[n, width], into slots[i]; skip it if that is ABSENT."""
        ...

    def step(
        self, slots: Slots, gradients: Rows, optimizer: Optimizer, lr: float, step: int
    ) -> None:
        """Run one optimizer step over the rows in ``slots``.

        slots      int64[n]         distinct
        gradients  float32[n, dim]  gradient of each row
        optimizer  the algorithm of the step
        lr         learning rate
        step       step passed to the optimizer
        """
        ...

    def largest(self, slots: Slots) -> float:
        """Return the largest magnitude of the numbers in the rows in ``slots``, int64[n].

        Covers embeddings and optimizer state. Infinity and NaN count as the largest.
        """
        ...

    def scan(self) -> DirtyScan:
        """Return a scan of all rows, which other threads may use while pushes continue.

        Only the engine thread calls this.
        """
        ...

    def look(self) -> Scan:
        """Return a scan of all rows. Any thread may call its ``find``; the others, the engine."""
        ...

    def view(self) -> View:
        """Return the arrays of all rows for an eviction sweep; valid until the tier changes."""
        ...
