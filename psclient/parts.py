"""Parts of a feature over several tables: their sizes, their tables, and hashes of keys.

A feature of multihash.py has one row per key in each of several parts. This module has what its
classes share.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psclient.arrays import Rows, as_gradients
from psclient.errors import InvalidArgument
from psclient.table import Table
from psproto import routing

Keys = NDArray[np.uint64]

KEYS = 1 << 64  # number of possible keys
GOLDEN = 0x9E3779B97F4A7C15  # increment of the SplitMix64 generator


@njit(nogil=True, cache=True, error_model="numpy")
def _hash(keys: Any, out: Any) -> None:
    """Compute k hashes of each key: ``out[i, j]`` is hash i of ``keys[j]``.

    The hashes of a key are the first k outputs of a SplitMix64 generator, which is seeded with
    ``routing.mix64(key)``.

    keys  uint64[n]
    out   uint64[k, n]  written
    """
    for j in range(keys.shape[0]):
        state = routing.mix64(keys[j])
        for i in range(out.shape[0]):
            state += np.uint64(GOLDEN)
            out[i, j] = routing.mix64(state)


def hashes(keys: Keys, k: int) -> Keys:
    """Return k independent hashes of each key: uint64[k, *shape] for keys[*shape].

    Each hash is a bijection of the 64-bit integers: distinct keys have distinct hashes.
    """
    out = np.empty((k, keys.size), np.uint64)
    _hash(keys.reshape(-1), out)
    return out.reshape(k, *keys.shape)


def sizes_for(universe: int, parts: int = 2, *, coprime: bool = False) -> tuple[int, ...]:
    """Return the size of each part for a feature that must distinguish ``universe`` keys.

    universe  number of distinct keys, in 2..2^64
    parts     number of parts, in 2..64
    coprime   whether to make the sizes pairwise coprime, as ChineseRemainder requires

    The sizes are about equal, and their product is at least ``universe``. Raises InvalidArgument
    if an argument is outside its range.
    """
    if not 2 <= whole(universe, "universe") <= KEYS:
        raise InvalidArgument(f"universe must be in 2..2^64, got {universe}")
    if not 2 <= whole(parts, "parts") <= 64:
        raise InvalidArgument(f"parts must be in 2..64, got {parts}")
    least = max(2, round(universe ** (1 / parts)) - 1)
    while least**parts < universe:
        least += 1
    if not coprime:
        return (least,) * parts
    sizes: list[int] = []
    while len(sizes) < parts:
        if all(math.gcd(least, size) == 1 for size in sizes):
            sizes.append(least)
        least += 1
    return tuple(sizes)


def whole(value: Any, field: str) -> int:
    """Return ``value`` as an int.

    Raises InvalidArgument, naming ``field``, unless it is an integer of Python or NumPy.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{field} must be an integer, got {value!r}") from None


def checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the parts of a feature as a tuple.

    Raises InvalidArgument unless ``sizes`` is a non-empty list of integers in 2..2^64-1.
    """
    try:
        known = [operator.index(size) for size in sizes]
    except TypeError:
        raise InvalidArgument(f"sizes must be a list of integers, got {sizes!r}") from None
    if not known:
        raise InvalidArgument("sizes must have one size for each part, got an empty list")
    for part, size in enumerate(known):
        if not 1 < size < KEYS:
            raise InvalidArgument(f"sizes must be in 2..2^64-1, got {size} for part {part}")
    return tuple(known)


def check_coprime(sizes: Sequence[int]) -> None:
    """Raise InvalidArgument unless the sizes are pairwise coprime."""
    for one, other in combinations(sizes, 2):
        if math.gcd(one, other) > 1:
            raise InvalidArgument(
                f"sizes must be pairwise coprime, but {math.gcd(one, other)} divides both {one} and"
                f" {other}"
            )


def checked_tables(tables: Table | Sequence[Table], parts: int) -> tuple[Table, ...]:
    """Return the table of each part of a feature, as a tuple.

    tables  one table per part; or a single table, which then holds all parts
    parts   number of parts

    Raises InvalidArgument if the number or type of the tables is wrong, or if they belong to
    different clients.
    """
    each = (tables,) * parts if isinstance(tables, Table) else tuple(tables)
    if len(each) != parts:
        raise InvalidArgument(
            f"tables must be one table, or a list of {parts} tables, one per part; got {each}"
        )
    for table in each:
        if not isinstance(table, Table):
            raise InvalidArgument(f"tables must be of type Table, got {table!r}")
    if any(table.client is not each[0].client for table in each):
        raise InvalidArgument("tables must belong to one client")
    return each


def checked_gradients(gradients: Any, shape: tuple[int, ...]) -> Rows:
    """Return the gradients of embeddings, which must have the given shape, as float32.

    Raises InvalidArgument for a wrong shape, and for numbers that are infinite or NaN. The error
    gives the position of such a number in ``gradients``.
    """
    known = as_gradients(gradients, shape, "gradients")
    if not routing.all_finite(known.reshape(-1).view(np.uint32)):
        where = np.argwhere(~np.isfinite(known))[0].tolist()
        raise InvalidArgument(f"gradients must be finite, got {known[tuple(where)]} at {where}")
    return known
