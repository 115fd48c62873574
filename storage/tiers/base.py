"""The contract of a tier.

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
LOOK = 1 << 16  # places whose metadata takes 1.5 MiB; more would keep others waiting
EVERY = 1 << 62  # places


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
        """Write the L2 norms of embeddings, float64[n]; return their metadata.

        Version 0: the row was deleted.
        """
        ...

    def read(self, places: Slots, out: Rows) -> None:
        """Copy embeddings [n, dim]."""
        ...


class Tier(Protocol):
    """Rows by place. A place is an int64 that the tier chooses; calls take distinct, valid ones.

    A row is float32[width], ``[embedding | state]``, with metadata of four 64-bit numbers.
    """

    name: ClassVar[str]
    code: ClassVar[int]  # 1..255, in every location; never changes its meaning

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes taken from the budget, unused places included."""
        ...

    def allocate(self, count: int) -> Slots:
        """Return places for new rows, contents undefined; OutOfMemory leaves the tier unchanged."""
        ...

    def release(self, places: Slots) -> None:
        """Free places, whose rows are deleted."""
        ...

    def create(
        self, keys: Keys, places: Slots, initializer: Initializer, seed: int, state: Rows
    ) -> None:
        """Fill new rows: initial embeddings, initial state, and version, step and frequency 0."""
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
        """Record the push in the metadata and run one optimizer step over the rows.

        step   passed to the optimizer
        stamp  step recorded in the metadata; None: ``step``
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
        """Return a copy of the metadata."""
        ...

    def scan(self) -> Scan:
        """Return all rows, for readers that go through them while pushes go on."""
        ...

    def view(self) -> View:
        """Return the tier as sweeps see it; valid until the next call that changes it."""
        ...

    def dump(self, places: Slots) -> tuple[Rows, Meta]:
        """Return copies of whole rows and of their metadata."""
        ...

    def close(self) -> None:
        """Free the memory, once the last scan has let go of it."""
        ...
