"""The contract of a tier: one kind of storage for rows, for example host memory.

A place is the position of a row in its tier: an int64 that the tier chooses. The table's index
(storage/index.py) maps each key to a tier and a place.

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
LOOK = 1 << 16  # places that a scan examines per call; more would make other threads wait
EVERY = 1 << 62  # as a limit: examine all places


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
        """Copy whole rows and their frequencies, and return the rows' metadata.

        places       int64[n]           from ``find``
        frequencies  uint64[n]          written
        rows         float32[n, width]  written
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

    The places within one call must be distinct and allocated. A row is float32[width],
    ``[embedding | optimizer state]``. Its metadata are its key, version, step and frequency.

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
        """Allocate ``count`` places, and return them as int64[count].

        The caller must fill the rows there. Raises OutOfMemory, and changes nothing then.
        """
        ...

    def release(self, places: Slots) -> None:
        """Delete the rows at ``places``. New rows may reuse these places."""
        ...

    def create(
        self, keys: Keys, places: Slots, initializer: Initializer, seed: int, state: Rows
    ) -> None:
        """Fill new rows: initial embeddings, initial state, and version, step and frequency 0.

        keys         uint64[n]            key of each row
        places       int64[n]             place of each row, from ``allocate``
        initializer  computes the embeddings
        seed         seed of the table's initial values, from ``table_seed``
        state        float32[width - dim]  optimizer state of every new row
        """
        ...

    def read(self, places: Slots, out: Rows) -> None:
        """Copy the embedding at each place to the same position of ``out``.

        places  int64[n]         ABSENT (-1): leave this row of ``out`` unchanged
        out     float32[n, dim]  written
        """
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

        places     int64[n]         the rows
        gradients  float32[n, dim]  gradient of each row
        counts     uint32[n]        occurrences of each key, added to its frequency
        optimizer  the algorithm of the step
        lr         learning rate
        step       step passed to the optimizer
        version    log version of the push
        stamp      step recorded in the metadata; None: the same as ``step``
        """
        ...

    def images(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> None:
        """Copy whole rows and their frequencies, for the log record of a push.

        places       int64[n]
        frequencies  uint64[n]          written
        rows         float32[n, width]  written
        """
        ...

    def largest(self, places: Slots) -> float:
        """Return the largest magnitude of the numbers in the rows at ``places``, int64[n].

        Covers embeddings and optimizer state. Infinity and NaN count as the largest.
        """
        ...

    def put(self, places: Slots, images: Images) -> None:
        """Write row i of ``images`` with its metadata to places[i], for each i.

        A row that is already there and has a newer version is not overwritten.
        """
        ...

    def meta(self, places: Slots) -> Meta:
        """Return a copy of the metadata (key, version, step, frequency) of each row."""
        ...

    def scan(self) -> Scan:
        """Return a scan of all rows, which other threads may use while pushes continue."""
        ...

    def view(self) -> View:
        """Return the arrays of all rows for an eviction sweep; valid until the tier changes."""
        ...

    def dump(self, places: Slots) -> tuple[Rows, Meta]:
        """Return copies of whole rows, float32[n, width], and of their metadata."""
        ...

    def close(self) -> None:
        """Close the tier. The memory is freed as soon as no scan refers to it."""
        ...
