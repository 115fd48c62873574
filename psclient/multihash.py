"""Features over several tables: a key's embedding is put together from one row of each part.

    QuotientRemainder  the key's number in mixed radix, one digit a part
    ChineseRemainder   the key's number modulo pairwise coprime sizes
    KHash              k hashes of the key, each modulo a size of its own

The first two are complementary partitions (Shi, Mudigere, Naumov and Yang, 2020, arXiv:1909.02107):
any two of ``universe`` numbers differ in some part, so a table of n rows becomes k tables of about
n^(1/k). A key's number is a hash of it, so any ids will do, or the key itself where ids are dense.

A part is all of a table, or a range of the keys of one that several parts share. Its rows are rows
like any other: they come into being when they are pushed. All parts travel in one round trip.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psclient.arrays import Rows, as_gradients, as_keys
from psclient.batch import Batch
from psclient.choices import Durability, Mode, Wire
from psclient.combine import COMBINATIONS, Combine
from psclient.errors import InvalidArgument
from psclient.rowclient import RowClient
from psclient.table import Table
from psproto import routing

Keys = NDArray[np.uint64]

KEYS = 1 << 64  # that there are
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment


@njit(nogil=True, cache=True, error_model="numpy")
def _hash(keys: Any, out: Any) -> None:
    """out[i, j] = number i of the SplitMix64 stream that starts at mix64(keys[j]).

    keys  uint64[n]
    out   uint64[k, n]
    """
    for j in range(keys.shape[0]):
        state = routing.mix64(keys[j])
        for i in range(out.shape[0]):
            state += np.uint64(GOLDEN)
            out[i, j] = routing.mix64(state)


def hashes(keys: Keys, k: int) -> Keys:
    """k independent hashes of each key: uint64[k, *shape]. Each is one to one by itself."""
    out = np.empty((k, keys.size), np.uint64)
    _hash(keys.reshape(-1), out)
    return out.reshape(k, *keys.shape)


def sizes_for(universe: int, parts: int = 2, *, coprime: bool = False) -> tuple[int, ...]:
    """Small, about equal sizes whose product is ``universe`` or more.

    coprime  pairwise, as ChineseRemainder needs them
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


@dataclass(frozen=True, slots=True, eq=False)
class PulledParts:
    """Embeddings, with what a push of their gradients needs."""

    embeddings: Rows  # float32[*shape, dim]
    batches: dict[str, Batch]  # by table: the keys of its parts' rows, [parts there, *shape]
    parts: tuple[Rows, ...]  # float32[*shape, dim of the part]


class MultiHash:
    """A feature whose key has one row in each of several parts.

    tables   one for each part; or one for all, which take ranges of its keys, in their order
    sizes    of the parts, above 1: codes of part i are 0..sizes[i] - 1
    combine  "add" or "multiply" (tables of one dim), or "concatenate"

    ``universe`` is the number of distinct compositions, ``dim`` the length of an embedding.
    """

    universe: int

    def __init__(
        self, tables: Table | Sequence[Table], sizes: Sequence[int], combine: Combine = "add"
    ) -> None:
        self.sizes = _checked_sizes(sizes)
        self.tables = checked_tables(tables, len(self.sizes))
        if combine not in COMBINATIONS:
            raise InvalidArgument(
                f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}"
            )
        self.combine = combine
        self.client: RowClient = self.tables[0].client
        self.dims = tuple(table.dim for table in self.tables)
        self.dim = COMBINATIONS[combine].dim(self.dims)
        self.universe = min(math.prod(self.sizes), KEYS)
        self._parts_of: dict[str, list[int]] = {}  # by table
        offsets = []
        for part, table in enumerate(self.tables):
            there = self._parts_of.setdefault(table.name, [])
            offsets.append(sum(self.sizes[other] for other in there))
            there.append(part)
            if offsets[-1] + self.sizes[part] > KEYS:
                raise InvalidArgument(
                    f"sizes of the parts in table {table.name!r} must add up to 2^64 at most, got"
                    f" {offsets[-1] + self.sizes[part]}"
                )
        self._offsets = np.array(offsets, np.uint64)  # by part: where its keys begin

    def codes(self, keys: Any) -> Keys:
        """uint64[parts, *shape]: in 0..size - 1, one for each part and key."""
        raise NotImplementedError

    def row_keys(self, keys: Any) -> Keys:
        """uint64[parts, *shape]: the keys, in the table of each part, of the rows of keys[*shape].

        The codes, where no part shares its table with one before it.
        """
        codes = self.codes(keys)
        return codes + self._offsets.reshape(-1, *(1,) * (codes.ndim - 1))

    def collisions(self, keys: Any) -> float:
        """Share of the distinct keys that share every part, so the embedding, with another one."""
        ordered = np.sort(as_keys(keys), axis=None)  # faster than np.unique
        codes = self.codes(ordered[np.append(True, ordered[1:] != ordered[:-1])[: ordered.size]])
        codes = codes[:, np.lexsort(codes)]
        equal = (codes[:, 1:] == codes[:, :-1]).all(axis=0)  # to the next one
        shared = np.append(equal, False) | np.append(False, equal)
        return float(shared[: codes.shape[1]].mean()) if codes.size else 0.0

    # ---- for requests that other tables travel in too

    def batches(self, keys: Any) -> dict[str, Batch]:
        """What to pull for keys[*shape]: by table, for Client.pull or Client.exchange."""
        rows = self.row_keys(keys)
        return {name: self.client.batch(rows[there]) for name, there in self._parts_of.items()}

    def compose(self, batches: Mapping[str, Batch], rows: Mapping[str, Rows]) -> PulledParts:
        """Embeddings from what came back for ``batches``; other tables in ``rows`` are ignored."""
        parts = [np.empty(0, np.float32)] * len(self.tables)
        for name, there in self._parts_of.items():
            for part, of_part in zip(there, rows[name], strict=True):
                parts[part] = of_part
        own = {name: batches[name] for name in self._parts_of}
        return PulledParts(COMBINATIONS[self.combine].combine(parts), own, tuple(parts))

    def gradients(self, keys: Any, gradients: Any) -> dict[str, tuple[Batch, Rows]]:
        """What to push, by table, for Client.push or Client.exchange. See ``push``."""
        if not isinstance(keys, PulledParts) and COMBINATIONS[self.combine].reads_parts:
            keys = self.pull_parts(keys)
        known = isinstance(keys, PulledParts)
        batches, parts = (keys.batches, keys.parts) if known else (self.batches(keys), ())
        shape = next(iter(batches.values())).shape[1:]
        array = checked_gradients(gradients, (*shape, self.dim))
        split = COMBINATIONS[self.combine].gradients(array, parts, self.dims)
        return {
            name: (batches[name], np.stack([split[part] for part in there]))
            for name, there in self._parts_of.items()
        }

    # ---- requests

    def pull(self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None) -> Rows:
        """Embeddings float32[*shape, dim] of keys[*shape], in one round trip."""
        return self.pull_parts(keys, mode=mode, wire=wire).embeddings

    def pull_parts(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None
    ) -> PulledParts:
        """``pull``, with what ``push`` would otherwise have to find or to pull again."""
        batches = self.batches(keys)
        return self.compose(batches, self.client.pull(batches, mode=mode, wire=wire))

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
        """Push gradients float[*shape, dim] of embeddings to the rows they came from.

        keys  int[*shape]; or what pull_parts returned, which saves work, and "multiply" a pull:
              its gradients are those at the rows pulled, else at the rows as they are now

        One round trip. Gradients of equal codes are summed; the server's optimizer takes one step
        for each row.
        """
        push = self.gradients(keys, gradients)
        self.client.push(push, step=step, lr=lr, wire=wire, durability=durability)

    def exchange(
        self,
        keys: Any,
        push: tuple[Any, Any],
        *,
        step: int = 0,
        lr: float | None = None,
        mode: Mode = "train",
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> PulledParts:
        """Push (keys or what pull_parts returned, gradients) and pull ``keys`` in one message."""
        batches = self.batches(keys)
        rows = self.client.exchange(
            self.gradients(*push),
            batches,
            step=step,
            lr=lr,
            mode=mode,
            wire=wire,
            durability=durability,
        )
        return self.compose(batches, rows)

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self._parts_of))
        return (
            f"{type(self).__name__}({names}, sizes={list(self.sizes)}, combine={self.combine!r},"
            f" dim={self.dim})"
        )


class _Complementary(MultiHash):
    """Parts that together tell ``universe`` numbers apart.

    universe  2 or more, and no more than the product of the sizes and 2^64, which it is where None
    hashed    whether a key's number is its hash modulo the universe, for ids of any kind; or else
              the key itself modulo the universe: then no two of the ids 0..universe - 1 share all
              parts, but strided ids may use few rows of some
    """

    coprime = False  # whether sizes must be, pairwise

    def __init__(
        self,
        tables: Table | Sequence[Table],
        sizes: Sequence[int],
        combine: Combine = "add",
        *,
        universe: int | None = None,
        hashed: bool = True,
    ) -> None:
        super().__init__(tables, sizes, combine)
        if self.coprime:
            _check_coprime(self.sizes)
        covered = self.universe
        if universe is not None and not 2 <= whole(universe, "universe") <= covered:
            raise InvalidArgument(
                f"universe must be in 2..{covered}, as many numbers as sizes {list(self.sizes)}"
                f" tell apart, got {universe}"
            )
        self.universe = covered if universe is None else whole(universe, "universe")
        self.hashed = hashed

    def _numbers(self, keys: Any) -> Keys:
        """uint64[*shape], in 0..universe - 1."""
        array = as_keys(keys)
        numbers = hashes(array, 1)[0] if self.hashed else array
        return numbers if self.universe == KEYS else numbers % np.uint64(self.universe)


class QuotientRemainder(_Complementary):
    """Number x has the codes x // sizes[1] and x % sizes[1]; more sizes go on in mixed radix.

    So the first size is that of the quotients.
    """

    def codes(self, keys: Any) -> Keys:
        left = self._numbers(keys)
        codes = np.empty((len(self.sizes), *left.shape), np.uint64)
        for part in range(len(self.sizes) - 1, 0, -1):
            left, codes[part] = np.divmod(left, np.uint64(self.sizes[part]))
        codes[0] = left
        return codes


class ChineseRemainder(_Complementary):
    """Number x has the codes x % size; sizes are pairwise coprime, so that all universe differ."""

    coprime = True

    def codes(self, keys: Any) -> Keys:
        numbers = self._numbers(keys)
        return np.stack([numbers % np.uint64(size) for size in self.sizes])


class KHash(MultiHash):
    """As many independent hashes of the key as there are sizes, each modulo its size."""

    def codes(self, keys: Any) -> Keys:
        each = hashes(as_keys(keys), len(self.sizes))
        return np.stack([one % np.uint64(size) for one, size in zip(each, self.sizes, strict=True)])


# ---- rules


def whole(value: Any, field: str) -> int:
    """The integer that a parameter is, of Python or NumPy; InvalidArgument for any other value."""
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{field} must be an integer, got {value!r}") from None


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    try:
        known = [operator.index(size) for size in sizes]
    except TypeError:
        raise InvalidArgument(f"sizes must be a list of integers, got {sizes!r}") from None
    if not known:
        raise InvalidArgument("sizes must name one size for each part, got none")
    for part, size in enumerate(known):
        if not 1 < size < KEYS:
            raise InvalidArgument(f"sizes must be in 2..2^64-1, got {size} for part {part}")
    return tuple(known)


def _check_coprime(sizes: Sequence[int]) -> None:
    for one, other in combinations(sizes, 2):
        if math.gcd(one, other) > 1:
            raise InvalidArgument(
                f"sizes must be pairwise coprime, got {one} and {other}, which"
                f" {math.gcd(one, other)} divides"
            )


def checked_tables(tables: Table | Sequence[Table], parts: int) -> tuple[Table, ...]:
    each = (tables,) * parts if isinstance(tables, Table) else tuple(tables)
    if len(each) != parts:
        raise InvalidArgument(f"tables must be one, or one for each of {parts} parts, got {each}")
    for table in each:
        if not isinstance(table, Table):
            raise InvalidArgument(f"tables must be of type Table, got {table!r}")
    if any(table.client is not each[0].client for table in each):
        raise InvalidArgument("tables must be of one client")
    return each


def checked_gradients(gradients: Any, shape: tuple[int, ...]) -> Rows:
    """As float32[*shape, dim]; InvalidArgument if another shape or dtype, or not finite.

    Checked before they are taken apart, so that an error speaks of the caller's array.
    """
    known = as_gradients(gradients, shape, "gradients")
    if not routing.all_finite(known.reshape(-1).view(np.uint32)):
        where = np.argwhere(~np.isfinite(known))[0].tolist()
        raise InvalidArgument(f"gradients must be finite, got {known[tuple(where)]} at {where}")
    return known
