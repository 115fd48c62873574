"""A feature whose embeddings grow: a small row for every key, a wide one for frequent keys.

Most keys are rare, and rare keys cannot train many numbers. Each key therefore has the first
numbers of its embedding in a small table, where the servers count how often it is pushed. Keys that
are pushed often enough get the remaining numbers in a wide table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows, as_keys
from psclient.batch import Batch
from psclient.choices import Durability, Mode, Wire
from psclient.errors import InvalidArgument
from psclient.multihash import Keys, checked_gradients, checked_tables, whole
from psclient.table import Table

MAX_FREQUENCY = (1 << 32) - 1  # where the servers' counts stop


@dataclass(frozen=True, slots=True, eq=False)
class PulledMixed:
    """Embeddings, and what a push of their gradients needs."""

    embeddings: Rows  # float32[*shape, dim]; 0 after the small part where ``wide`` is False
    keys: Keys  # [*shape]
    batch: Batch  # of the keys, flat
    wide: NDArray[np.bool_]  # [*shape]: whether the key has a wide part


class MixedDimension:
    """A feature whose embeddings grow: float32[dim], dim = small.dim + wide.dim.

    small      table of the first small.dim numbers of every key, and of its frequency
    wide       table of the other numbers of keys pushed ``threshold`` times or more; until then
               these numbers are 0
    threshold  occurrences pushed, in 1..2^32-1

    A pull takes two round trips, the second for the wide parts. A push takes one.
    """

    def __init__(self, small: Table, wide: Table, threshold: int) -> None:
        checked_tables((small, wide), 2)
        if small.name == wide.name:
            raise InvalidArgument(f"small and wide must be two tables, got {small.name!r} twice")
        if not 1 <= whole(threshold, "threshold") <= MAX_FREQUENCY:
            raise InvalidArgument(f"threshold must be in 1..2^32-1, got {threshold}")
        self.small = small
        self.wide = wide
        self.threshold = threshold
        self.client = small.client
        self.dim = small.dim + wide.dim

    def pull(self, keys: Any, *, mode: Mode = "train") -> Rows:
        """Return embeddings float32[*shape, dim] of keys[*shape]."""
        return self.pull_mixed(keys, mode=mode).embeddings

    def pull_mixed(self, keys: Any, *, mode: Mode = "train") -> PulledMixed:
        """Return embeddings, and which keys have a wide part; ``push`` takes the result as keys."""
        array = as_keys(keys)
        batch = self.client.batch(array.reshape(-1))
        rows = self.small.pull_rows(batch.keys, mode=mode)
        earned = rows.frequencies >= self.threshold
        distinct = np.zeros((len(batch.keys), self.dim), np.float32)
        distinct[:, : self.small.dim] = rows.embeddings
        if earned.any():
            distinct[earned, self.small.dim :] = self.wide.pull(batch.keys[earned], mode=mode)
        out = batch.spread(distinct).reshape(*array.shape, self.dim)
        return PulledMixed(out, array, batch, batch.spread(earned).reshape(array.shape))

    def push(
        self,
        keys: Any,
        gradients: Any,
        *,
        step: int = 0,
        lr: float | None = None,
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> None:
        """Push gradients float[*shape, dim]; wide parts of keys that have none are ignored.

        keys  what pull_mixed returned; or int[*shape], for which one more pull is made
        """
        pulled = keys if isinstance(keys, PulledMixed) else self.pull_mixed(keys)
        array = checked_gradients(gradients, (*pulled.keys.shape, self.dim))
        flat, split = array.reshape(-1, self.dim), self.small.dim
        push: dict[str, tuple[Any, Rows]] = {self.small.name: (pulled.batch, flat[:, :split])}
        if pulled.wide.any():
            earned = flat[pulled.wide.reshape(-1)]
            push[self.wide.name] = (pulled.keys[pulled.wide], earned[:, split:])
        self.client.push(push, step=step, lr=lr, wire=wire, durability=durability)

    def __repr__(self) -> str:
        return (
            f"MixedDimension({self.small.name!r}, {self.wide.name!r}, threshold={self.threshold},"
            f" dim={self.dim})"
        )
