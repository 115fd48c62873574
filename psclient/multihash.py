"""Compositional embeddings: a key's embedding combines one row from each of several small parts.

    QuotientRemainder  digits of the key's number in mixed radix, one per part
    ChineseRemainder   the key's number modulo pairwise coprime sizes
    KHash              k hashes of the key, each modulo the size of its part

The number of a row within its part is called a code. The first two classes are complementary
partitions (Shi, Mudigere, Naumov and Yang, 2020, arXiv:1909.02107): any two of ``universe`` numbers
have different codes in at least one part, so k parts of about n^(1/k) rows replace a table of n
rows. The number of a key is a hash of the key, which works for any ids, or the key itself, which
works for dense ids.

A part is a whole table, or a range of the keys of a table that several parts share. Its rows are
ordinary rows: the first push creates them. One round trip pulls or pushes all parts.
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

KEYS = 1 << 64  # number of possible keys
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment


@njit(nogil=True, cache=True, error_model="numpy")
def _hash(keys: Any, out: Any) -> None:
    """Compute k hashes of each key: ``out[i, j]`` is number i of the SplitMix64 stream of keys[j].

    keys  uint64[n]
    out   uint64[k, n]  written
    """
    for j in range(keys.shape[0]):
        state = routing.mix64(keys[j])
        for i in range(out.shape[0]):
            state += np.uint64(GOLDEN)
            out[i, j] = routing.mix64(state)


def hashes(keys: Keys, k: int) -> Keys:
    """Return k independent hashes of each key: uint64[k, *shape].

    Each hash is a bijection: distinct keys have distinct hashes.
    """
    out = np.empty((k, keys.size), np.uint64)
    _hash(keys.reshape(-1), out)
    return out.reshape(k, *keys.shape)


def sizes_for(universe: int, parts: int = 2, *, coprime: bool = False) -> tuple[int, ...]:
    """Return sizes of parts, small and about equal, whose product is at least ``universe``.

    universe  number of distinct keys to represent, in 2..2^64
    parts     number of parts, in 2..64
    coprime   whether to make the sizes pairwise coprime, as ChineseRemainder needs them
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
    """Embeddings, with the information that ``push`` needs to push their gradients."""

    embeddings: Rows  # float32[*shape, dim]
    batches: dict[str, Batch]  # by table: its row keys, of shape [parts in the table, *shape]
    parts: tuple[Rows, ...]  # rows of each part, float32[*shape, dim of the part]


class MultiHash:
    """A feature whose keys have one row in each of several parts.

    tables   one table per part; or one table for all parts, each of which has a range of its keys
    sizes    number of rows of each part, at least 2: codes of part i are 0..sizes[i] - 1
    combine  how to combine the rows of a key: "add" or "multiply" (tables of equal dim), or
             "concatenate"

    universe  number of distinct combinations of rows, at most 2^64
    dim       length of an embedding

    Raises InvalidArgument if an argument breaks these rules.
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
        self._parts_of: dict[str, list[int]] = {}  # numbers of the parts in each table
        offsets = []
        for part, table in enumerate(self.tables):
            there = self._parts_of.setdefault(table.name, [])
            offsets.append(sum(self.sizes[other] for other in there))
            there.append(part)
            if offsets[-1] + self.sizes[part] > KEYS:
                raise InvalidArgument(
                    f"the sum of sizes of the parts in table {table.name!r} must be <= 2^64, got"
                    f" {offsets[-1] + self.sizes[part]}"
                )
        self._offsets = np.array(offsets, np.uint64)  # row key of each part's code 0

    def codes(self, keys: Any) -> Keys:
        """Return the code of each key in each part: uint64[parts, *shape of keys].

        Codes of part i are in 0..sizes[i] - 1.
        """
        raise NotImplementedError

    def row_keys(self, keys: Any) -> Keys:
        """Return the keys of the rows that keys[*shape] use: uint64[parts, *shape].

        They equal the codes, except where several parts share a table.
        """
        codes = self.codes(keys)
        return codes + self._offsets.reshape(-1, *(1,) * (codes.ndim - 1))

    def collisions(self, keys: Any) -> float:
        """Return the fraction of the distinct ``keys`` that share all their rows with another
        key.
        """
        ordered = np.sort(as_keys(keys), axis=None)  # faster than np.unique
        codes = self.codes(ordered[np.append(True, ordered[1:] != ordered[:-1])[: ordered.size]])
        codes = codes[:, np.lexsort(codes)]
        equal = (codes[:, 1:] == codes[:, :-1]).all(axis=0)  # whether key i equals key i + 1
        shared = np.append(equal, False) | np.append(False, equal)
        return float(shared[: codes.shape[1]].mean()) if codes.size else 0.0

    # ---- for requests that contain other tables too

    def batches(self, keys: Any) -> dict[str, Batch]:
        """Return {table: Batch of row keys} to pull for keys[*shape], for Client.pull or
        exchange.
        """
        rows = self.row_keys(keys)
        return {name: self.client.batch(rows[there]) for name, there in self._parts_of.items()}

    def compose(self, batches: Mapping[str, Batch], rows: Mapping[str, Rows]) -> PulledParts:
        """Combine pulled rows into embeddings.

        batches  from the method ``batches``
        rows     result of Client.pull or exchange for these batches; other tables in it are ignored
        """
        parts = [np.empty(0, np.float32)] * len(self.tables)
        for name, there in self._parts_of.items():
            for part, of_part in zip(there, rows[name], strict=True):
                parts[part] = of_part
        own = {name: batches[name] for name in self._parts_of}
        return PulledParts(COMBINATIONS[self.combine].combine(parts), own, tuple(parts))

    def gradients(self, keys: Any, gradients: Any) -> dict[str, tuple[Batch, Rows]]:
        """Return {table: (Batch, gradients)} to push, for Client.push or exchange. See ``push``."""
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
        """Return embeddings float32[*shape, dim] of keys[*shape], in one round trip.

        See Client.pull.
        """
        return self.pull_parts(keys, mode=mode, wire=wire).embeddings

    def pull_parts(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None
    ) -> PulledParts:
        """Return the embeddings of keys[*shape], with the rows that they combine.

        Pass the result to ``push`` in place of keys. See Client.pull for ``mode`` and ``wire``.
        """
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
        """Push gradients float[*shape, dim] of embeddings to the rows that they combine.

        keys  int[*shape]; or the result of pull_parts, which saves work. With combine="multiply"
              the gradients depend on the rows: those in the result of pull_parts, or, for int keys,
              the current ones, which takes an additional pull

        Gradients of equal codes are summed; the optimizer updates each row once. See Client.push
        for the other arguments.
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
        """Push gradients and then pull ``keys``, in one round trip. Returns the result of
        pull_parts.

        keys  int[*shape] to pull
        push  (keys or a result of pull_parts, gradients), as in ``push``

        See Client.exchange for the other arguments.
        """
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
    """Base class of parts whose codes together distinguish the numbers 0..universe - 1.

    universe  number of distinct numbers, at least 2; at most the product of the sizes and 2^64.
              None: that maximum
    hashed    True: a key's number is a hash of it modulo universe, which works for any ids.
              False: the key modulo universe. The ids 0..universe - 1 then have distinct
              combinations of rows, but ids with a stride may use few rows of a part

    MultiHash explains the other arguments.
    """

    coprime = False  # whether the sizes must be pairwise coprime

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
                f"universe must be in 2..{covered}, the product of sizes {list(self.sizes)},"
                f" got {universe}"
            )
        self.universe = covered if universe is None else whole(universe, "universe")
        self.hashed = hashed

    def _numbers(self, keys: Any) -> Keys:
        """Return the number of each key: uint64[*shape], in 0..universe - 1."""
        array = as_keys(keys)
        numbers = hashes(array, 1)[0] if self.hashed else array
        return numbers if self.universe == KEYS else numbers % np.uint64(self.universe)


class QuotientRemainder(_Complementary):
    """A feature of two parts: number x has the codes ``x // sizes[1]`` and ``x % sizes[1]``.

    So sizes[0] is the number of quotients. With more than two sizes, the codes are the digits of x
    in mixed radix.
    """

    def codes(self, keys: Any) -> Keys:
        left = self._numbers(keys)
        codes = np.empty((len(self.sizes), *left.shape), np.uint64)
        for part in range(len(self.sizes) - 1, 0, -1):
            left, codes[part] = np.divmod(left, np.uint64(self.sizes[part]))
        codes[0] = left
        return codes


class ChineseRemainder(_Complementary):
    """A feature whose number x has the code ``x % sizes[i]`` in part i.

    The sizes must be pairwise coprime, so that distinct numbers have distinct codes.
    """

    coprime = True

    def codes(self, keys: Any) -> Keys:
        numbers = self._numbers(keys)
        return np.stack([numbers % np.uint64(size) for size in self.sizes])


class KHash(MultiHash):
    """A feature with an independent hash of the key for each part, modulo the part's size."""

    def codes(self, keys: Any) -> Keys:
        each = hashes(as_keys(keys), len(self.sizes))
        return np.stack([one % np.uint64(size) for one, size in zip(each, self.sizes, strict=True)])


# ---- rules


def whole(value: Any, field: str) -> int:
    """Return ``value`` as an int; ``field`` names it in errors.

    Raises InvalidArgument unless it is an integer of Python or NumPy.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{field} must be an integer, got {value!r}") from None


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return ``sizes`` as a tuple.

    Raises InvalidArgument unless each is an integer in 2..2^64-1.
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


def _check_coprime(sizes: Sequence[int]) -> None:
    """Raise InvalidArgument unless the sizes are pairwise coprime."""
    for one, other in combinations(sizes, 2):
        if math.gcd(one, other) > 1:
            raise InvalidArgument(
                f"sizes must be pairwise coprime, but {math.gcd(one, other)} divides both {one} and"
                f" {other}"
            )


def checked_tables(tables: Table | Sequence[Table], parts: int) -> tuple[Table, ...]:
    """Return one table for each part; a single table is used for all parts.

    Raises InvalidArgument if the number or type is wrong, or they belong to different clients.
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
    """Return gradients float[*shape] as float32.

    Raises InvalidArgument for a wrong shape, and for numbers that are infinite or NaN. Checked
    before they are split by part, so that the error gives the position in the caller's array.
    """
    known = as_gradients(gradients, shape, "gradients")
    if not routing.all_finite(known.reshape(-1).view(np.uint32)):
        where = np.argwhere(~np.isfinite(known))[0].tolist()
        raise InvalidArgument(f"gradients must be finite, got {known[tuple(where)]} at {where}")
    return known
