"""The standard work (docs/benchmarks.md): one table, and the batches drawn from it.

Every contender of a benchmark gets the same batches and starts from the same rows. This file
imports only NumPy, because peers also import it under other Python interpreters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Rows = NDArray[np.float32]
Step = tuple[Ids, Ids, Rows]  # ids [B] with duplicates; distinct ids, ascending; their gradients


@dataclass(frozen=True)
class Work:
    """Parameters of the standard work: the size of the table, and how batches are drawn."""

    rows: int = 2_000_000  # of the table; ids are 0..rows - 1
    dim: int = 32
    batch: int = 10_000  # ids per step, duplicates included
    zipf: float = 1.05  # exponent; rank r is drawn with probability proportional to r ** -zipf.
    # 0: all ids are equally frequent
    seed: int = 0


def standard_work(work: Work, steps: int) -> list[Step]:
    """Return the first ``steps`` steps of ``work``. Equal arguments give equal steps.

    A random permutation, which ``work.seed`` determines, decides which ids are frequent.
    """
    mass = np.cumsum(np.arange(1, work.rows + 1, dtype=np.float64) ** -work.zipf)
    mass /= mass[-1]
    order = np.random.default_rng((work.seed, 1)).permutation(work.rows)
    rng = np.random.default_rng((work.seed, 2))
    drawn: list[Step] = []
    for _ in range(steps):
        ids = order[np.searchsorted(mass, rng.random(work.batch), side="right")]
        distinct = np.unique(ids)
        grads = rng.standard_normal((len(distinct), work.dim), dtype=np.float32)
        drawn.append((ids, distinct, grads))
    return drawn


class Draws:
    """Draws batches of ids without end. The same ids are frequent as in ``standard_work``.

    hottest  int64[rows], all ids by descending probability
    """

    def __init__(self, work: Work) -> None:
        self._mass = np.cumsum(np.arange(1, work.rows + 1, dtype=np.float64) ** -work.zipf)
        self._mass /= self._mass[-1]
        self.hottest = np.random.default_rng((work.seed, 1)).permutation(work.rows)
        self._rng = np.random.default_rng((work.seed, 5))
        self._batch = work.batch

    def ids(self) -> Ids:
        """Return the ids of the next batch, int64[batch], with duplicates."""
        drawn = np.searchsorted(self._mass, self._rng.random(self._batch), side="right")
        return self.hottest[drawn]


def of_every_id(step: Step) -> Rows:
    """Return a gradient for each id of a step, duplicates included, float32[B, dim].

    The gradients of equal ids sum up to the gradient of this id in the step. A neural network
    computes its gradients in this form.
    """
    ids, distinct, grads = step
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    assert len(counts) == len(distinct)
    share: Rows = np.reciprocal(counts.astype(np.float32))
    return grads[inverse] * share[inverse, None]


def keys_of(ids: Ids, seed: int = 0) -> Ids:
    """Return a random 63-bit key for every id; distinct ids have distinct keys.

    seed  a different seed gives different keys

    This is the splitmix64 generator (Steele, Lea, Flood, 2014) modulo 2**63. It is a bijection,
    because its multiplications by odd numbers and its shifts can be undone.
    """
    low = np.uint64((1 << 63) - 1)
    offset = np.uint64(np.random.default_rng((seed, 3)).integers(1 << 63))
    x = (ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + offset) & low
    x ^= x >> np.uint64(30)
    x = x * np.uint64(0xBF58476D1CE4E5B9) & low
    x ^= x >> np.uint64(27)
    x = x * np.uint64(0x94D049BB133111EB) & low
    x ^= x >> np.uint64(31)
    return x.view(np.int64)


def initial_rows(work: Work) -> Rows:
    """Return the rows that every peer has before the first step, float32[rows, dim]."""
    rng = np.random.default_rng((work.seed, 4))
    return rng.standard_normal((work.rows, work.dim), dtype=np.float32) * np.float32(0.01)
