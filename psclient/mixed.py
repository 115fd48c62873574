"""MixedDimension: a feature with longer embeddings for frequent keys than for rare keys.

A rare key is pushed too seldom to train many numbers. So the first numbers of every key's embedding
are in a small table, where the servers also count how often the key is pushed. Only keys that are
pushed often enough get the remaining numbers, which are in a second, wide table.
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
from psclient.parts import Keys, checked_gradients, checked_tables, whole
from psclient.pending import Pending
from psclient.table import Table

MAX_FREQUENCY = (1 << 32) - 1  # the servers stop counting at this number


@dataclass(frozen=True, slots=True, eq=False)
class PulledMixed:
    """Result of MixedDimension.pull_mixed; pass it to MixedDimension.push in place of keys."""

    embeddings: Rows  # float32[*shape, dim]; from small.dim on, 0 where ``wide`` is False
    keys: Keys  # [*shape]
    batch: Batch  # the distinct keys of the flattened keys
    wide: NDArray[np.bool_]  # [*shape]: whether the key has a wide part


class MixedDimension:
    """A feature with few trained numbers for rare keys and more for frequent keys.

    small      table with the first ``small.dim`` numbers of each key's embedding
    wide       table with the other ``wide.dim`` numbers of frequent keys; they are 0 for rare keys
    threshold  a key is frequent once this many occurrences of it were pushed; 1..2^32-1

    dim  length of all embeddings: ``small.dim + wide.dim``

    A pull takes two round trips, the second for the frequent keys; a push takes one. Raises
    InvalidArgument if ``small`` and ``wide`` are not two tables of one client, or for an invalid
    threshold.
    """

    def __init__(self, small: Table, wide: Table, threshold: int) -> None:
        checked_tables((small, wide), 2)
        if small.name == wide.name:
            raise InvalidArgument(
                f"small and wide must be different tables, got {small.name!r} twice"
            )
        if not 1 <= whole(threshold, "threshold") <= MAX_FREQUENCY:
            raise InvalidArgument(f"threshold must be in 1..2^32-1, got {threshold}")
        self.small = small
        self.wide = wide
        self.threshold = threshold
        self.client = small.client
        self.dim = small.dim + wide.dim

    def pull(self, keys: Any, *, mode: Mode = "train") -> Rows:
        """Return the embeddings float32[*shape, dim] of integer keys[*shape].

        mode  result for keys without a row: "train" or "serve". Client.pull explains them
        """
        return self.pull_mixed(keys, mode=mode).embeddings

    def prefetch(self, keys: Any) -> Pending:
        """Ask the shards to read the rows of integer keys from disk; return at once.

        Call it some time before a pull or push of these keys. Client.prefetch explains the result,
        which need not be waited for.
        """
        batch = self.client.batch(keys)
        return self.client.prefetch({self.small.name: batch, self.wide.name: batch})

    def pull_mixed(self, keys: Any, *, mode: Mode = "train") -> PulledMixed:
        """Return the embeddings of integer keys[*shape], and which of the keys are frequent.

        mode  result for keys without a row: "train" or "serve". Client.pull explains them

        Pass the result to ``push`` in place of keys.
        """
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
        """Push gradients to the rows of keys, in one round trip.

        keys       result of pull_mixed; or integers[*shape], which takes an additional pull
        gradients  float[*shape, dim]. For rare keys only the first small.dim numbers are used

        Client.push explains the other arguments.
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
