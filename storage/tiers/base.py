"""The contract of a tier: one kind of storage for rows, for example host memory.

To add a tier, write a class in a new file next to this one. The table uses tiers only through this
contract, and the tests of the contract run over every implementation.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray

from storage.eviction.contract import View
from storage.initializers import Initializer
from storage.kernels import Images, Keys, Rows, Slots
from storage.optimizer import Optimizer

Meta = NDArray[Any]  # uint64[n, 4]: key, version, step (the bits of an int64), frequency
# Versions are below 2^48, steps in -2^47..2^47-1; a frequency stops counting at 2^32-1.

KEY, VERSION, STEP, FREQUENCY = range(4)
LOOK = 1 << 16  # places that a scan looks at per call; more would make other threads wait
EVERY = 1 << 62  # a number of places that is never reached: no limit


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
        """Copy whole rows [n, width] and their frequencies uint64[n]; return their metadata."""
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

    The places within one call must be distinct and allocated. A row is float32[width],
    ``[embedding | optimizer state]``, with metadata of four 64-bit numbers; see ``Meta``.

    name  name of the tier, for statistics
    code  1..255, stored in every location of a row in this tier; never changes its meaning
    """

    name: ClassVar[str]
    code: ClassVar[int]  # 1..255, in every location; never changes its meaning

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes of memory taken from the budget, including unused places."""
        ...

    def allocate(self, count: int) -> Slots:
        """Return places, int64[count], for new rows with undefined contents.

        Raises OutOfMemory, and changes nothing then.
        """
        ...

    def release(self, places: Slots) -> None:
        """Delete the rows at ``places``, and free the places."""
        ...

    def create(
        self, keys: Keys, places: Slots, initializer: Initializer, seed: int, state: Rows
    ) -> None:
        """Fill new rows: initial embeddings, initial state, and version, step and frequency 0.

        seed   seed of the table's initial values, from ``table_seed``
        state  float32[width - dim], optimizer state of every new row
        """
        ...

    def read(self, places: Slots, out: Rows) -> None:
        """Copy embeddings to ``out`` [n, dim]; rows whose place is ABSENT are left unchanged."""
        ...

    def push(
        self,
        places: Slots,
        gradients: Rows,
        counts: NDArray[Any],
        optimizer: Optimizer,
        lr: float,
        step: int,
        version: int,
        stamp: int | None = None,
    ) -> None:
        """Run one optimizer step over the rows, and record the push in their metadata.

        gradients  float32[n, dim]
        counts     uint32[n]  occurrences of each key, added to its frequency
        lr         learning rate
        step       step passed to the optimizer
        version    log version of the push
        stamp      step recorded in the metadata; None: ``step``
        """
        ...

    def images(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> None:
        """Copy whole rows [n, width] and their frequencies uint64[n], after a push."""
        ...

    def largest(self, places: Slots) -> float:
        """Return the largest magnitude in whole rows; infinity and NaN count as the largest."""
        ...

    def put(self, places: Slots, images: Images) -> None:
        """Write whole rows with their metadata, except over newer rows."""
        ...

    def meta(self, places: Slots) -> Meta:
        """Return a copy of the metadata (key, version, step, frequency) of each row."""
        ...

    def scan(self) -> Scan:
        """Return all rows, for readers that go through them while pushes go on."""
        ...

    def view(self) -> View:
        """Return the rows as eviction sweeps read them; valid until the tier changes next."""
        ...

    def dump(self, places: Slots) -> tuple[Rows, Meta]:
        """Return copies of whole rows and of their metadata."""
        ...

    def close(self) -> None:
        """Free the memory once the last scan is dropped."""
        ...
