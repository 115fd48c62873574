"""Which pushes may leave infinity or NaN in a row.

To look at the result of every push before it is applied would cost a second step. A push is looked
at only if it might overflow: the step of tame gradients over tame rows cannot, see
``Optimizer.is_tame``. Whether all rows of a table are tame is known from the rows that were
written, which is a pass over memory that was just touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np

from storage.errors import RowOverflow
from storage.kernels import Keys, Rows, any_below, largest_magnitude, readonly
from storage.optimizer import TAME_GRADIENT, TAME_NUMBER, Optimizer
from storage.schema import TableSchema

TRIED = 1 << 14  # rows that a push is tried on at once
LARGEST_DRAW = 10.0  # no initial value is beyond this many times the sum of its parameters


class OverflowGuard:
    """Knows whether all rows of a table are tame.

    copies  returns copies of the rows of keys, float32[n, width]; keys without a row get the row
            that they would get
    """

    def __init__(self, schema: TableSchema, copies: Callable[[Keys], Rows]) -> None:
        self._copies = copies
        state = schema.optimizer.initial_state(schema.dim)
        roots = schema.optimizer.roots(schema.dim)
        self._root = roots.start
        self._floors = state[roots.start - schema.dim : roots.stop - schema.dim]
        largest = max(_largest_initial(schema), np.abs(state).max(initial=0.0))
        self._tame = bool(largest <= TAME_NUMBER)

    def pushed(self, largest: float) -> None:
        """Note the largest magnitude in the rows that a push left."""
        self._tame = self._tame and largest <= TAME_NUMBER

    def put(self, rows: Rows) -> None:
        """Note rows that were written whole: they may have a state that no push leaves."""
        self.pushed(largest_magnitude(rows))
        if self._tame:
            self._tame = not any_below(readonly(rows), self._root, self._floors)

    def check(
        self,
        table: str,
        optimizer: Optimizer,
        keys: Keys,
        gradients: Rows,
        lr: float,
        step: int,
        largest: float | None,
    ) -> None:
        """Raise RowOverflow if a push would leave infinity or NaN in a row that is finite now.

        largest  largest magnitude of the gradients; None: it is not known

        A row that is not finite already is not the fault of the push.
        """
        if largest is None:
            largest = largest_magnitude(gradients)
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
    """Return a bound on the magnitude of initial values."""
    initializer = schema.initializer
    parameters = [float(getattr(initializer, each.name)) for each in fields(initializer)]
    return LARGEST_DRAW * sum(map(abs, parameters))
