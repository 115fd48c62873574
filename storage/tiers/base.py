"""The contract of a tier.

To add one: write the class in a file beside this one. The table reaches tiers through this
contract alone, and the tests of the contract run over every implementation.
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
    """The rows that a tier held at one moment, a slice at a time.

    Any thread may use it while the engine thread pushes. A row that is pushed meanwhile may be
    found torn or not at all; its version, or that of the push in a log, tells.
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
        """Copy whole rows [n, width] and their frequencies uint64[n]; their metadata as now."""
        ...

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        """Write the L2 norms of embeddings, float64[n]; their metadata as now.

        Version 0: the row is gone from its place.
        """
        ...

    def read(self, places: Slots, out: Rows) -> None:
        """Copy embeddings [n, dim]."""
        ...


class Tier(Protocol):
    """Rows by place. Places are int64, chosen by the tier; calls take distinct, valid ones.

    Rows are float32[width], ``[embedding | state]``; each has metadata of four 64-bit numbers.
    """

    name: ClassVar[str]
    code: ClassVar[int]  # 1..255, in every location; never changes its meaning

    @property
    def rows(self) -> int:
        """Rows held."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes taken from the budget, unused places included."""
        ...

    def allocate(self, count: int) -> Slots:
        """Places for new rows, contents undefined; OutOfMemory leaves the tier as it was."""
        ...

    def release(self, places: Slots) -> None:
        """Give places back."""
        ...

    def create(
        self, keys: Keys, places: Slots, initializer: Initializer, seed: int, state: Rows
    ) -> None:
        """Fill new rows: initial embeddings, initial state, metadata without history."""
        ...

    def read(self, places: Slots, out: Rows) -> None:
        """Copy embeddings to ``out`` [n, dim]; where the place is ABSENT, it stays as it is."""
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

        step   of the optimizer
        stamp  the step recorded; None: the same
        """
        ...

    def images(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> None:
        """Copy whole rows [n, width] and their frequencies uint64[n], as a push left them."""
        ...

    def largest(self, places: Slots) -> float:
        """Return the largest magnitude in whole rows; infinity and NaN count as the largest."""
        ...

    def put(self, places: Slots, images: Images) -> None:
        """Write whole rows with their metadata, new or not; those that are newer stay."""
        ...

    def meta(self, places: Slots) -> Meta:
        """A copy of the metadata alone."""
        ...

    def scan(self) -> Scan:
        """All rows, for readers that go through them while pushes go on."""
        ...

    def view(self) -> View:
        """The tier as sweeps look at it; valid until the next call that changes it."""
        ...

    def dump(self, places: Slots) -> tuple[Rows, Meta]:
        """Copies of whole rows and of their metadata."""
        ...

    def close(self) -> None:
        """Return the memory."""
        ...
