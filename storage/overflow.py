"""Find pushes that would leave infinity or NaN in a row, before they are applied.

To try every push on copies of its rows would double its cost. So a push is tried only if it might
overflow. It cannot overflow if its gradients and all rows of the table are *tame*, which means not
extremely large (see ``Optimizer.is_tame``). To know that the rows are tame, the guard keeps an
upper bound of the magnitudes in all rows. Each push raises the bound by ``Optimizer.reach``. If the
bound would become too large, the guard examines the rows after the push instead, while they are
still in the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np

from storage.errors import RowOverflow
from storage.kernels import Keys, Rows, any_below, largest_magnitude, readonly
from storage.optimizer import TAME_GRADIENT, TAME_NUMBER, Optimizer
from storage.schema import TableSchema

TRIED = 1 << 14  # rows that are copied at a time to try out a push
LARGEST_DRAW = 10.0  # bound of initial values, as a multiple of the sum of the parameters


class OverflowGuard:
    """Refuses pushes to one table that would overflow, and keeps a bound on its rows for that.

    copies  function from keys, uint64[n], to copies of their rows, float32[n, width]; for keys
            without a row it returns the row that they would get
    unsure  True: the caller must examine the rows of the last push, and call ``written``
    """

    def __init__(self, schema: TableSchema, copies: Callable[[Keys], Rows]) -> None:
        self._copies = copies
        state = schema.optimizer.initial_state(schema.dim)
        roots = schema.optimizer.roots(schema.dim)
        self._root = roots.start
        self._floors = state[roots.start - schema.dim : roots.stop - schema.dim]
        self._dim = schema.dim
        self._bound = float(max(_largest_initial(schema), np.abs(state).max(initial=0.0)))
        self._tame = self._bound <= TAME_NUMBER  # once False, it stays False
        self.unsure = False  # ``written`` must follow the push

    def pushed(self, optimizer: Optimizer, lr: float, largest: float) -> None:
        """Record that a push was applied. Sets ``unsure`` if its rows must be examined.

        optimizer  the algorithm of the push
        lr         learning rate of the push
        largest    largest magnitude of the gradients
        """
        if not self._tame:
            return
        bound = self._bound + optimizer.reach(self._dim, lr, largest)
        self.unsure = bound > TAME_NUMBER
        if not self.unsure:
            self._bound = float(np.float32(bound))  # rounded as the kernels round

    def written(self, largest: float) -> None:
        """Record ``largest``, the largest magnitude in rows that were written just now."""
        self.unsure = False
        if not largest <= self._bound:  # NaN too
            self._bound = largest
            self._tame &= largest <= TAME_NUMBER

    def put(self, rows: Rows) -> None:
        """Record that whole rows, float32[n, width], were written.

        Their optimizer state need not result from pushes, so a root may be less than in a new row.
        """
        self.written(largest_magnitude(rows))
        if self._tame:  # a root that is less than that of a new row is not tame
            self._tame = not any_below(readonly(rows), self._root, self._floors)

    def check(
        self,
        table: str,
        optimizer: Optimizer,
        keys: Keys,
        gradients: Rows,
        lr: float,
        step: int,
        largest: float,
    ) -> None:
        """Raise RowOverflow if a push would leave infinity or NaN in a row that is finite now.

        table      name of the table, for the error
        keys       uint64[n]  distinct
        gradients  float32[n, dim]
        lr, step   learning rate and step of the push
        largest    largest magnitude of the gradients
        """
        if self._tame and largest <= TAME_GRADIENT and optimizer.is_tame(lr):
            return
        for start in range(0, len(keys), TRIED):
            part = slice(start, start + TRIED)
            rows = self._copies(keys[part])
            before = np.isfinite(rows).all(axis=1)
            optimizer.step(rows, np.arange(len(rows)), gradients[part], lr, step)
            bad = np.flatnonzero(before & ~np.isfinite(rows).all(axis=1))
            if len(bad):
                at = start + int(bad[0])
                raise RowOverflow(table, int(keys[at]), float(np.abs(gradients[at]).max()))


def _largest_initial(schema: TableSchema) -> float:
    """Return an upper bound of the magnitude of the table's initial values."""
    initializer = schema.initializer
    parameters = [float(getattr(initializer, each.name)) for each in fields(initializer)]
    return LARGEST_DRAW * sum(map(abs, parameters))
