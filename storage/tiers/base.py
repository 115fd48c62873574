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
from storage.slots import LOOK, Meta, SlotEntries


class Scan(Protocol):
    """The rows of a tier at one moment, to be read in slices.

    Any thread may use it while the engine thread pushes. A row that is pushed meanwhile may be
    missed, or read half written. Its version is then newer than the moment of the scan.
    """

    def find(
        self, start: int, after: int, upto: int, limit: int, look: int = LOOK
    ) -> tuple[Slots, int | None]:
        """Return places of up to ``limit`` rows with versions after+1..upto, and the next start.

        start  0, or what the last call returned; None after the last call
        look   places that this call looks at; EVERY where nobody waits

        A call that has looked at ``look`` places may return no place and a next start.
        """
        ...

    def copy(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> Meta:
        """Copy the first columns of rows and their frequencies; return their metadata.

        frequencies  uint64[n]           written
        rows         float32[n, k]  written; k at most the width
        """
        ...

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        """Write the L2 norms of embeddings to ``norms``, float64[n]; return the rows' metadata.

        A row whose metadata has version 0 was deleted meanwhile.
        """
        ...

    def read(self, places: Slots, out: Rows) -> None:
        """Copy the embeddings of ``places`` to ``out``, float32[n, dim]."""
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
        """Bytes that the rows take in this tier, including unused places."""
        ...

    def gather(self, places: Slots, out: Rows) -> None:
        """Copy the first columns of rows to ``out``.

        places  int64[n]  ABSENT leaves a row of ``out`` unchanged
        out     float32[n, dim] or float32[n, width]
        """
        ...

    def meta(self, places: Slots) -> Meta:
        """Return a copy of the metadata (key, version, step, frequency) of each row."""
        ...

    def scan(self) -> Scan:
        """Return all rows, for readers that go through them while pushes go on."""
        ...

    def close(self) -> None:
        """Free the memory once the last scan is dropped."""
        ...


class Writable(Tier, Protocol):
    """A tier whose rows pushes can write. A place is a slot, which has an entry in ``slots``.

    slots  key, metadata and home of the row in each slot
    """

    slots: SlotEntries

    def allocate(self, count: int) -> Slots:
        """Return slots, int64[count], for new rows with undefined contents and entries.

        Raises OutOfMemory, and changes nothing then.
        """
        ...

    def create(self, keys: Keys, slots: Slots, initializer: Initializer, seed: int) -> None:
        """Write the initial rows of new keys: initial embeddings, and initial optimizer state.

        seed  seed of the table's initial values, from ``table_seed``
        """
        ...

    def scatter(self, slots: Slots, rows: Rows) -> None:
        """Write whole rows float32[n, width]; rows whose slot is ABSENT are skipped."""
        ...

    def step(
        self, slots: Slots, gradients: Rows, optimizer: Optimizer, lr: float, step: int
    ) -> None:
        """Run one optimizer step over the rows.

        gradients  float32[n, dim]
        lr         learning rate
        step       step passed to the optimizer
        """
        ...

    def largest(self, slots: Slots) -> float:
        """Return the largest magnitude in whole rows; infinity and NaN count as the largest."""
        ...

    def view(self) -> View:
        """Return the rows as eviction sweeps read them; valid until the tier changes next."""
        ...
