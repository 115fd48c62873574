"""One pass over all rows of a table in slices: the rows in memory by slot, then those in blocks.

Blocks whose bounds show that no row matters are skipped without reading them. The other blocks are
read from the disk by another thread, before the sweep looks at their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.errors import Corrupt
from storage.eviction.contract import Bounds, ColdRows, Contents, View

Choice = Callable[[Bounds], NDArray[np.bool_]]  # returns which blocks must be read, bool[m]


class Portion(NamedTuple):
    """The rows of one slice: slots start..stop-1 of a view."""

    view: View
    start: int
    stop: int


class Pass:
    """One pass over the rows of a table.

    contents  the rows of the table when the pass begins; None: there is nothing to do
    choose    function of the Bounds of some blocks; returns which of them must be read, bool[m].
              Each block is passed to it once
    norms     whether norms are needed, too

    wanted   function that another thread should call before the next call of ``next``, to read a
             block from the disk; None: there is none
    damaged  number of blocks that were skipped because they are damaged
    """

    def __init__(self, contents: Contents | None, choose: Choice, norms: bool = False) -> None:
        self.wanted: Callable[[], None] | None = None
        self.damaged = 0
        self._used = 0 if contents is None else contents.host.used
        self._choose, self._norms = choose, norms
        self._slot = 0  # next slot in memory
        self._blocks: list[int] = []  # numbers of blocks to read, descending
        nothing = contents is None or contents.cold is None
        self._listed = -1 if nothing else 0  # blocks before this number were listed; -1: all
        self._position = 0  # next row of the last one of ``_blocks``
        self._asked = -1  # number of the block that ``wanted`` was about

    @property
    def done(self) -> bool:
        """True if all rows were visited."""
        return self._slot >= self._used and not self._blocks and self._listed < 0

    def next(self, contents: Contents, limit: int) -> Portion | None:
        """Return the next rows, at most ``limit`` slots in memory, or the rows of one block.

        contents  the rows of the table now

        Returns None if there are none in this slice: because the pass is done, a block must be read
        first (see ``wanted``), or many blocks were skipped.
        """
        self.wanted = None
        if self._slot < self._used:
            start, self._slot = self._slot, min(self._slot + limit, self._used)
            return Portion(contents.host, start, self._slot)
        cold = contents.cold
        if cold is not None and not self._blocks and self._listed >= 0:
            self._list(cold)
        if cold is None or not self._blocks or self._must_wait(cold, self._blocks[-1]):
            return None
        return self._enter(cold)

    def resume(self, portion: Portion, stop: int) -> None:
        """Visit the slots from ``stop`` on of the last portion again."""
        if stop >= portion.stop:
            return
        if portion.view is self._last:
            self._blocks.append(self._number)
            self._position = stop
        else:
            self._slot = stop

    _last: View | None = None  # view of the last block
    _number = 0  # its number

    def _list(self, cold: ColdRows) -> None:
        """Choose from the next blocks those to read."""
        bounds = cold.bounds(self._listed)
        if not len(bounds.numbers):
            self._listed = -1
            return
        self._listed = int(bounds.numbers[-1]) + 1
        chosen = self._choose(bounds) & (bounds.rows > 0)
        self._blocks = bounds.numbers[chosen][::-1].tolist()

    def _must_wait(self, cold: ColdRows, number: int) -> bool:
        """Return whether block ``number`` must be read from the disk first; set ``wanted`` then."""
        if self._asked != number:
            self._asked, self.wanted = number, cold.reads(number, self._norms)
        return self.wanted is not None

    def _enter(self, cold: ColdRows) -> Portion | None:
        """Return the rows of the next block; None if it is gone or damaged."""
        self._number, start, self._position = self._blocks.pop(), self._position, 0
        try:
            self._last = cold.view(self._number)
        except Corrupt:  # its rows cannot be judged; who reads them gets the error
            self.damaged += 1
            self._last = None
        if self._last is None:
            return None
        return Portion(self._last, start, self._last.used)
