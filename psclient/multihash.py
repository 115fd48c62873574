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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psclient.arrays import Rows, as_keys
from psclient.batch import Batch
from psclient.choices import Durability, Mode, Wire
from psclient.combine import COMBINATIONS, Combine
from psclient.errors import InvalidArgument
from psclient.parts import (
    KEYS,
    Keys,
    check_coprime,
    checked_gradients,
    checked_sizes,
    checked_tables,
    whole,
)
from psclient.parts import hashes as hashes
from psclient.parts import sizes_for as sizes_for
from psclient.pending import Pending
from psclient.rowclient import RowClient
from psclient.table import Table


@dataclass(frozen=True, slots=True, eq=False)
class PulledParts:
    """Result of MultiHash.pull_parts; pass it to MultiHash.push in place of keys."""

    embeddings: Rows  # float32[*shape, dim]
    batches: dict[str, Batch]  # by table: its row keys, of shape [parts in the table, *shape]
    parts: tuple[Rows, ...]  # for each part: the rows that were combined, float32[*shape, its dim]


class MultiHash:
    """Base class of features that combine one row from each of several parts into an embedding.

    tables   one table per part; or one table for all parts, each of which has a range of its keys
    sizes    number of rows of each part, in 2..2^64-1; codes of part i are 0..sizes[i] - 1
    combine  how to combine the rows of a key: "add" or "multiply" (tables of equal dim), or
             "concatenate"

    universe  number of distinct combinations of rows, at most 2^64
    dim       length of an embedding

    A subclass defines ``codes``. Raises InvalidArgument if an argument breaks these rules.
    """

    universe: int

    def __init__(
        self, tables: Table | Sequence[Table], sizes: Sequence[int], combine: Combine = "add"
    ) -> None:
        self.sizes = checked_sizes(sizes)
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
        self._parts_of: dict[str, list[int]] = {}  # by table: numbers of the parts in it
        self._offsets = self._assign_ranges()  # row key of code 0 of each part

    def _assign_ranges(self) -> Keys:
        """Give each part a range of its table's keys; return the first key of each, uint64[parts].

        Raises InvalidArgument if the parts in one table need more than 2^64 keys.
        """
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
        return np.array(offsets, np.uint64)

    def codes(self, keys: Any) -> Keys:
        """Return the code (number of a row) of each key in each part: uint64[parts, *shape].

        keys  integers[*shape]

        Codes of part i are in 0..sizes[i] - 1.
        """
        raise NotImplementedError

    def row_keys(self, keys: Any) -> Keys:
        """Return the key, in its table, of each row that is combined: uint64[parts, *shape].

        keys  integers[*shape] of the feature

        A row's key is its code, plus an offset if several parts share a table.
        """
        codes = self.codes(keys)
        return codes + self._offsets.reshape(-1, *(1,) * (codes.ndim - 1))

    def collisions(self, keys: Any) -> float:
        """Return the fraction of distinct keys that share their embedding with another of them.

        keys  integers of any shape

        Two keys share an embedding if they have the same code in every part.
        """
        ordered = np.sort(as_keys(keys), axis=None)  # faster than np.unique
        codes = self.codes(ordered[np.append(True, ordered[1:] != ordered[:-1])[: ordered.size]])
        codes = codes[:, np.lexsort(codes)]
        equal = (codes[:, 1:] == codes[:, :-1]).all(axis=0)  # whether key i equals key i + 1
        shared = np.append(equal, False) | np.append(False, equal)
        return float(shared[: codes.shape[1]].mean()) if codes.size else 0.0

    # ---- for requests that contain other tables too

    def batches(self, keys: Any) -> dict[str, Batch]:
        """Return {table: Batch of row keys} to pull for integer keys[*shape].

        Pass it to Client.pull or Client.exchange, perhaps with the keys of other tables.
        """
        rows = self.row_keys(keys)
        return {name: self.client.batch(rows[there]) for name, there in self._parts_of.items()}

    def compose(self, batches: Mapping[str, Batch], rows: Mapping[str, Rows]) -> PulledParts:
        """Combine rows that were pulled into embeddings.

        batches  result of the method ``batches``
        rows     result of Client.pull or Client.exchange for these batches; other tables in it are
                 ignored
        """
        parts = [np.empty(0, np.float32)] * len(self.tables)
        for name, there in self._parts_of.items():
            for part, of_part in zip(there, rows[name], strict=True):
                parts[part] = of_part
        own = {name: batches[name] for name in self._parts_of}
        return PulledParts(COMBINATIONS[self.combine].combine(parts), own, tuple(parts))

    def gradients(self, keys: Any, gradients: Any) -> dict[str, tuple[Batch, Rows]]:
        """Return {table: (Batch of row keys, gradients of rows)}, for Client.push or exchange.

        The arguments are those of ``push``.
        """
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
        """Return the embeddings float32[*shape, dim] of integer keys[*shape], in one round trip.

        Client.pull explains ``mode`` and ``wire``.
        """
        return self.pull_parts(keys, mode=mode, wire=wire).embeddings

    def prefetch(self, keys: Any) -> Pending:
        """Ask the shards to read the rows of integer keys[*shape] from disk; return at once.

        Call it some time before a pull or push of these keys. Client.prefetch explains the result,
        which need not be waited for.
        """
        return self.client.prefetch(self.batches(keys))

    def pull_parts(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None
    ) -> PulledParts:
        """Return the embeddings of integer keys[*shape], with the rows that they combine.

        Pass the result to ``push`` in place of keys. Client.pull explains ``mode`` and ``wire``.
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
        """Push the gradients of embeddings to the rows that they combine.

        keys       result of pull_parts; or integers[*shape], which takes more work. With
                   combine="multiply" the gradient of a row depends on the other rows: those in the
                   result of pull_parts, or, for integers, the current ones, which are pulled first
        gradients  float[*shape, dim]

        Gradients of the same row are summed; the optimizer updates each row once. Client.push
        explains the other arguments.
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
        """Push gradients and then pull ``keys``, in one round trip; return the pulled embeddings.

        keys  integers[*shape] to pull
        push  (keys or a result of pull_parts, gradients), as in ``push``

        Client.exchange explains the other arguments.
        """
        batches, gradients = self.batches(keys), self.gradients(*push)
        options: dict[str, Any] = {"mode": mode, "wire": wire, "durability": durability}
        rows = self.client.exchange(gradients, batches, step=step, lr=lr, **options)
        return self.compose(batches, rows)

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self._parts_of))
        return (
            f"{type(self).__name__}({names}, sizes={list(self.sizes)}, combine={self.combine!r},"
            f" dim={self.dim})"
        )


class _Complementary(MultiHash):
    """Base class of features that map a key to a number, and different numbers to different codes.

    universe  the numbers are 0..universe - 1; at least 2, at most the product of the sizes and
              2^64. None: that maximum
    hashed    True: a key's number is a hash of the key, modulo universe; this works for any keys.
              False: the key modulo universe. The keys 0..universe - 1 then have distinct
              combinations of rows, but keys with a stride may use few rows of a part

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
            check_coprime(self.sizes)
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
    """A feature of two parts: a key's number x has the codes ``x // sizes[1]``, ``x % sizes[1]``.

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
    """A feature in which a key's number x has the code ``x % sizes[i]`` in part i.

    The sizes must be pairwise coprime, so that distinct numbers have distinct codes.
    """

    coprime = True

    def codes(self, keys: Any) -> Keys:
        numbers = self._numbers(keys)
        return np.stack([numbers % np.uint64(size) for size in self.sizes])


class KHash(MultiHash):
    """A feature in which a key's code in part i is hash i of the key, modulo ``sizes[i]``.

    The hashes are independent. Keys that collide in one part usually differ in another part.
    """

    def codes(self, keys: Any) -> Keys:
        each = hashes(as_keys(keys), len(self.sizes))
        return np.stack([one % np.uint64(size) for one, size in zip(each, self.sizes, strict=True)])
