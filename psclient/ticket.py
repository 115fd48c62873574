"""Tickets of a Pipeline: the batches on their way, and which of their rows must wait for a push."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient import hashtable
from psclient.arrays import Rows, as_keys
from psclient.batch import Batch
from psclient.errors import InvalidArgument
from psclient.outputs import Output

Places = NDArray[np.int32]
Index = NDArray[np.int64]

ANY_TIME = -(1 << 62)  # in Wanted.after: the row need not wait for any push
REQUESTED = 1 << 62  # in Wanted.after: plus the step of the last push sent before the request
LEAST = 256  # rows that a buffer has at least

_SALT = np.uint64(secrets.randbits(64))


class KeySet:
    """Looks up which keys of other batches are among the distinct keys of one batch.

    keys  uint64[n], distinct
    """

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self._keys = keys
        self._slots = np.zeros(1 << (2 * len(keys)).bit_length(), np.int32)
        hashtable.fill(self._slots, _SALT, keys, len(keys))

    def has(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each key, uint64[m], whether it is in the set."""
        places = np.empty(len(keys), np.int64)
        hashtable.find(self._slots, _SALT, self._keys, keys, places)
        return places >= 0


@dataclass(slots=True, eq=False)
class Wanted:
    """The rows of one table that one batch needs.

    batch   the distinct keys, and where each key of the batch is among them
    after   int64[distinct]: before a row is requested, step of the last push that must be sent
            before, or ANY_TIME; then REQUESTED + step of the last push that was sent before
    rows    float32[distinct, dim], a part of a buffer; None until the first row is requested
    output  for a GPU: which rows are in its memory instead, see Output.arrived; None: none are
    """

    batch: Batch
    after: Index
    rows: Rows | None = None
    output: Output | None = None
    _set: KeySet | None = None

    @property
    def requested(self) -> NDArray[np.bool_]:
        """Return for each row whether it was requested."""
        return self.after > REQUESTED // 2

    @property
    def keys(self) -> KeySet:
        """Return the distinct keys as a set."""
        if self._set is None:
            self._set = KeySet(self.batch.keys)
        return self._set


@dataclass(slots=True, eq=False)
class Ticket:
    """One batch of a Pipeline, with the rows of its keys.

    step    training step of the batch
    batch   the batch, as the loader returned it
    rows    {table: float32[distinct, dim]}, the row of each distinct key. They are in a buffer that
            is used again: they are valid until ``push`` or ``skip`` of this ticket
    places  {feature: int32[*shape of its keys]}, index in ``rows[its table]`` of each key's row
    keys    {table: Batch of the keys of all its features}; ``keys[table].keys`` are the distinct
            keys, in the order of ``rows[table]``
    """

    step: int
    batch: Any
    places: dict[str, Places]
    keys: dict[str, Batch]
    rows: dict[str, Rows] = field(default_factory=dict)
    wanted: dict[str, Wanted] = field(default_factory=dict, repr=False)
    last: int = -1  # number of the last request for its rows; -1: none
    again: dict[str, list[Index]] = field(default_factory=dict, repr=False)  # rows to pull again


def plan(
    step: int, batch: Any, keys: Mapping[str, Any], tables: Mapping[str, str], make: Any
) -> Ticket:
    """Find the distinct keys of a batch, per table; return its Ticket, without rows.

    keys    {feature: integers of any shape, or a Batch, or a function that returns one of these}
    tables  {feature: name of its table}
    make    function that turns keys into a Batch

    Raises InvalidArgument unless ``keys`` has exactly the features of ``tables``.
    """
    if not isinstance(keys, Mapping) or set(keys) != set(tables):
        got = sorted(map(str, keys)) if isinstance(keys, Mapping) else type(keys).__name__
        raise InvalidArgument(
            f"keys_of(batch) must return a mapping with the features {sorted(tables)}, got {got}"
        )
    by_table: dict[str, list[str]] = {}
    for feature, table in tables.items():
        by_table.setdefault(table, []).append(feature)
    places: dict[str, Places] = {}
    batches: dict[str, Batch] = {}
    for table, features in by_table.items():
        batches[table], found = _join([_called(keys[each]) for each in features], make)
        places.update(zip(features, found, strict=True))
    ticket = Ticket(step, batch, {name: places[name] for name in tables}, batches)
    for table, each in batches.items():
        ticket.wanted[table] = Wanted(each, np.full(len(each.keys), ANY_TIME))
    return ticket


def _called(value: Any) -> Any:
    """Return what ``value`` returns if it is a function, else itself."""
    return value() if callable(value) else value


def _join(parts: Sequence[Any], make: Callable[[Any], Batch]) -> tuple[Batch, list[Places]]:
    """Find the distinct keys of all features of one table.

    parts  keys of each feature: integers of any shape, or a Batch

    Returns (the Batch of all keys, for each feature the index of its keys in the distinct keys).
    """
    given = [part if isinstance(part, Batch) else as_keys(part) for part in parts]
    if len(given) == 1:
        batch = given[0] if isinstance(given[0], Batch) else make(given[0])
        return batch, [batch.split.inverse.reshape(batch.shape)]
    flat = [part.keys if isinstance(part, Batch) else part.reshape(-1) for part in given]
    batch = make(np.concatenate(flat))
    ends = np.cumsum([len(part) for part in flat])[:-1]
    places = []
    for part, place in zip(given, np.split(batch.split.inverse, ends), strict=True):
        whole = place[part.split.inverse] if isinstance(part, Batch) else place
        places.append(whole.reshape(part.shape))
    if any(isinstance(part, Batch) for part in given):
        flat_places = np.concatenate([place.reshape(-1) for place in places])
        counts = np.bincount(flat_places, minlength=len(batch.keys)).astype(np.uint32)
        batch.split = replace(batch.split, counts=counts)
    return batch, places


def wait_for(ticket: Ticket, earlier: Iterable[Ticket], last: int) -> None:
    """Note for each row of a ticket after which push it is to be requested.

    earlier  tickets that were not pushed yet, in the order of their steps
    last     step of the last push that the rows must contain
    """
    for other in earlier:
        if other.step > last:
            continue
        for table, wanted in ticket.wanted.items():
            wanted.after[other.wanted[table].keys.has(wanted.batch.keys)] = other.step


def due(wanted: Wanted, step: int) -> Index:
    """Return which rows may be requested once the push of ``step`` is sent, and were not yet."""
    return np.flatnonzero(wanted.after <= step)


class Ring:
    """Buffers for the rows of one table, used in turn. Each grows by doubling.

    dim    length of a row
    count  number of buffers
    empty  function that allocates a float32 array of a shape, such as ``np.empty``
    """

    def __init__(self, dim: int, count: int, empty: Callable[[tuple[int, int]], Rows]) -> None:
        self.dim = dim
        self._empty = empty
        self._buffers: list[Rows | None] = [None] * count
        self._next = 0

    def take(self, rows: int) -> Rows:
        """Return float32[rows, dim], a part of the buffer that was not used for the longest time.

        Its numbers are those of an earlier batch, or any.
        """
        at, self._next = self._next, (self._next + 1) % len(self._buffers)
        buffer = self._buffers[at]
        if buffer is None or len(buffer) < rows:
            size = LEAST if buffer is None else len(buffer)
            while size < rows:
                size *= 2
            buffer = self._buffers[at] = self._empty((size, self.dim))
        return buffer[:rows]


def counted(wanted: Wanted, pushes: Sequence[tuple[int, KeySet]]) -> int:
    """Return how many rows lack at least one of some pushes to their keys.

    pushes  (step, keys) of each
    """
    keys = wanted.batch.keys
    lacking = np.zeros(len(keys), np.bool_)
    for step, pushed in pushes:
        lacking |= pushed.has(keys) & (wanted.after < REQUESTED + step)
    return int(lacking.sum())
