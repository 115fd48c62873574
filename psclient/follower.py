"""A copy of tables in memory that follows the cluster.

    with Follower(addresses, tables=["user"]) as users:
        users.wait_for(client.wait_durable())      # has everything that was pushed before
        rows = users.pull("user", keys)            # as Table.pull(keys, mode="serve")

A pull sees each shard at a state that it was in: what belongs together, a push, a coalesced batch,
all that was missed while the follower was away, appears at once. A snapshot is built beside what
there is and then takes its place, so the copy takes twice its memory meanwhile.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.choices import Wire
from psclient.client import Client
from psclient.errors import DeadlineExceeded, InvalidArgument, PsError, TableNotFound
from psclient.subscriber import Change, Subscriber
from psproto import routing

LEAST = 1024  # rows that an empty copy has room for
jit = njit(nogil=True, cache=True, error_model="numpy")


@jit
def _home(key: Any, mask: Any) -> Any:
    """Where a key is looked for first. Not by the hash that all keys of a shard share bits of."""
    x = np.uint64(key)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    return x & mask


@jit
def _find(slots: Any, keys: Any, wanted: Any, places: Any) -> None:
    """The places of keys, or -1.

    slots   int32[power of two]  place + 1 of a key, 0: empty; linear probing
    keys    uint64[capacity]     by place
    wanted  uint64[n]
    places  int64[n]             written
    """
    mask = np.uint64(slots.shape[0] - 1)
    for i in range(wanted.shape[0]):
        at = _home(wanted[i], mask)
        while slots[at] and keys[slots[at] - 1] != wanted[i]:
            at = (at + np.uint64(1)) & mask
        places[i] = slots[at] - 1


@jit
def _fill(slots: Any, keys: Any, count: int) -> None:
    """Enter the first ``count`` keys, which are distinct, into empty slots."""
    mask = np.uint64(slots.shape[0] - 1)
    for place in range(count):
        at = _home(keys[place], mask)
        while slots[at]:
            at = (at + np.uint64(1)) & mask
        slots[at] = place + 1


@jit
def _put(
    slots: Any,
    keys: Any,
    versions: Any,
    rows: Any,
    count: int,
    new_keys: Any,
    new_versions: Any,
    new_rows: Any,
) -> int:
    """Write rows unless newer ones are there; returns how many rows there are then.

    slots     int32[power of two]  more than half of them empty, at the end too
    keys      uint64[capacity], versions uint64[capacity], rows float32[capacity, dim]; with room
    new_keys  uint64[n], distinct; new_versions uint64[n]; new_rows float32[n, dim]
    """
    mask = np.uint64(slots.shape[0] - 1)
    n, dim = new_rows.shape
    for i in range(n):
        key = new_keys[i]
        at = _home(key, mask)
        while slots[at] and keys[slots[at] - 1] != key:
            at = (at + np.uint64(1)) & mask
        place = slots[at] - 1
        if place < 0:
            place = count
            count += 1
            slots[at] = place + 1
            keys[place] = key
        elif versions[place] > new_versions[i]:
            continue
        versions[place] = new_versions[i]
        for j in range(dim):
            rows[place, j] = new_rows[i, j]
    return count


@jit
def _remove(
    slots: Any, keys: Any, versions: Any, rows: Any, count: int, gone: Any, gone_versions: Any
) -> int:
    """Remove rows unless newer ones are there; returns how many rows are left.

    The last row moves to the place of the one removed; entries behind an emptied slot move up.
    """
    mask = np.uint64(slots.shape[0] - 1)
    one = np.uint64(1)
    for i in range(gone.shape[0]):
        at = _home(gone[i], mask)
        while slots[at] and keys[slots[at] - 1] != gone[i]:
            at = (at + one) & mask
        place = slots[at] - 1
        if place < 0 or versions[place] > gone_versions[i]:
            continue
        empty = at
        behind = (at + one) & mask
        while slots[behind]:
            home = _home(keys[slots[behind] - 1], mask)
            if ((behind - home) & mask) >= ((behind - empty) & mask):
                slots[empty] = slots[behind]
                empty = behind
            behind = (behind + one) & mask
        slots[empty] = 0
        count -= 1
        if place != count:
            at = _home(keys[count], mask)
            while slots[at] != count + 1:
                at = (at + one) & mask
            slots[at] = place + 1
            keys[place] = keys[count]
            versions[place] = versions[count]
            for j in range(rows.shape[1]):
                rows[place, j] = rows[count, j]
    return count


class _Copy:
    """One shard's part of one table: rows by key."""

    def __init__(self, dim: int, default: float, created: int) -> None:
        self.dim = dim
        self.default = default
        self.created = created
        self.count = 0
        self.slots = np.zeros(4 * LEAST, np.int32)
        self.keys = np.empty(LEAST, np.uint64)
        self.versions = np.empty(LEAST, np.uint64)
        self.rows = np.empty((LEAST, dim), np.float32)

    def put(self, keys: Any, versions: Any, rows: Rows) -> None:
        """Write rows, except over newer ones."""
        self._make_room(self.count + len(keys))
        versions = np.ascontiguousarray(versions)
        self.count = _put(
            self.slots, self.keys, self.versions, self.rows, self.count, keys, versions, rows
        )

    def remove(self, keys: Any, versions: Any) -> None:
        """Remove rows, except newer ones."""
        versions = np.ascontiguousarray(versions)
        self.count = _remove(
            self.slots, self.keys, self.versions, self.rows, self.count, keys, versions
        )

    def find(self, keys: Any) -> NDArray[np.int64]:
        """Places of keys; -1 for those that are not there."""
        places = np.empty(len(keys), np.int64)
        _find(self.slots, self.keys, keys, places)
        return places

    def _make_room(self, count: int) -> None:
        capacity = len(self.keys)
        if count <= capacity:
            return
        while capacity < count:
            capacity *= 2
        for name in ("keys", "versions", "rows"):
            old = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), old.dtype)
            new[: self.count] = old[: self.count]
            setattr(self, name, new)
        self.slots = np.zeros(4 * capacity, np.int32)
        _fill(self.slots, self.keys, self.count)


class _State:
    """What a shard held at one moment."""

    def __init__(self) -> None:
        self.tables: dict[str, _Copy] = {}
        self.stated: set[str] | None = None  # by the catch-up or snapshot under way

    def apply(self, change: Change) -> None:
        """Apply one change."""
        table = self.tables.get(change.table)
        match change.kind:
            case "rows" if table is not None:
                assert change.rows is not None
                table.put(change.keys, change.versions, change.rows)
            case "deletes" if table is not None:
                table.remove(change.keys, change.versions)
            case "created":
                schema = change.schema
                assert schema is not None
                if table is None or table.created < change.version:
                    copy = _Copy(schema.dim, schema.serving_default, change.version)
                    self.tables[change.table] = copy
                else:
                    table.default = schema.serving_default
                if self.stated is not None:
                    self.stated.add(change.table)
            case "altered" if table is not None:
                assert change.schema is not None
                table.default = change.schema.serving_default
            case "dropped" if table is not None and table.created < change.version:
                del self.tables[change.table]
            case "snapshot" | "catch_up":
                self.stated = set()
            case "snapshot_end" if self.stated is not None:
                for name in self.tables.keys() - self.stated:
                    del self.tables[name]
                self.stated = None


class _Shard:
    """What is known of one shard: its state, and what waits for the next commit mark."""

    def __init__(self) -> None:
        self.version = -1  # of the state; -1: there was none yet
        self.head = 0
        self.behind = 0.0  # seconds from the newest change to when it could be seen
        self.state = _State()
        self.building: _State | None = None  # by the snapshot under way
        self._waiting: list[Change] = []
        self._kept = 0  # of them, up to the last token
        self._stream = 0

    def take(self, change: Change, lock: Any) -> bool:
        """Take in a change; whether the state has moved."""
        if change.stream != self._stream:  # what came behind the last token comes again
            self._stream = change.stream
            del self._waiting[self._kept :]
        self.head = change.head
        if change.kind == "snapshot":
            self.building = _State()
            self._waiting.clear()
        if change.kind != "progress":
            self._waiting.append(change)
        if change.more:
            if change.token:
                if self.building is not None:
                    self._apply(self.building)
                self._kept = len(self._waiting)
            return False
        with lock:
            if self.building is not None:  # of another history perhaps, with lower versions
                self._apply(self.building)
                self.state, self.building = self.building, None
                self.version = change.version
            self._apply(self.state)
            self._kept = 0
            self.version = max(self.version, change.version)
            if change.time:
                self.behind = time.time() - change.time
            lock.notify_all()
        return True

    def _apply(self, state: _State) -> None:
        for change in self._waiting:
            state.apply(change)
        self._waiting.clear()


class Follower:
    """Follows tables of all shards. Thread-safe.

    where        "host:port" of every shard, in their order, or a Client
    tables       names; None: all
    wire         dtype of embeddings on the wire
    coalesce_ms  servers send the newest value of a key within so many milliseconds
    on_change    called with every Change, on the follower's thread, once it is taken in

    It reaches for shards that are down for as long as it is open, and serves what it has. Errors
    that do not pass end it: they are raised by ``pull`` and ``wait_for``.
    """

    def __init__(
        self,
        where: Sequence[str] | Client,
        *,
        tables: Iterable[str] | None = None,
        wire: Wire = "float32",
        coalesce_ms: int = 0,
        on_change: Any = None,
    ) -> None:
        self._own = None if isinstance(where, Client) else Client(where)
        self._client: Client = where if isinstance(where, Client) else self._own  # type: ignore[assignment]
        self._subscriber = Subscriber(
            self._client,
            tables=tables,
            wire=wire,
            coalesce_ms=coalesce_ms,
            timeout=float("inf"),
            when_lost="snapshot",
        )
        self._on_change = on_change
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._shards = [_Shard() for _ in self._client._addresses]
        self._shard_map: routing.ShardMap | None = None
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def __enter__(self) -> Follower:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Follower:
        """Begin to follow; Unavailable if the shards cannot be reached."""
        self._shard_map = self._client._connect().shard_map
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop; what there is can still be pulled."""
        self._subscriber.close()
        if self._thread.is_alive():
            self._thread.join()
        if self._own is not None:
            self._own.close()

    def __len__(self) -> int:
        """Rows held."""
        with self._changed:
            return sum(copy.count for shard in self._shards for copy in shard.state.tables.values())

    @property
    def versions(self) -> tuple[int, ...]:
        """The version that each shard is followed to; -1 where there is no state yet. It goes back
        where a shard was restored to an older checkpoint.
        """
        with self._changed:
            return tuple(shard.version for shard in self._shards)

    @property
    def lag(self) -> tuple[int, ...]:
        """Durable versions of each shard that cannot be seen here yet, as far as known."""
        with self._changed:
            return tuple(max(shard.head - shard.version, 0) for shard in self._shards)

    def tables(self) -> list[str]:
        """Names of the tables that every shard is known to have."""
        with self._changed:
            return sorted(set.intersection(*(set(shard.state.tables) for shard in self._shards)))

    def pull(self, table: str, keys: Any) -> Rows:
        """Embeddings float32[*shape, dim] of keys int64 or uint64[*shape]; the table's serving
        default for those without a row. TableNotFound where there is no such table, or not yet.
        """
        batch, copies = self._begin(table, keys)
        out: Rows = np.empty((len(batch.keys), copies[0].dim), np.float32)
        with self._changed:
            copies = self._copies(table)
            for copy, part in zip(copies, self._parts(batch), strict=True):
                places = copy.find(batch.keys[part])
                out[part] = copy.rows[places]
                out[part][places < 0] = copy.default
        return out[batch.split.inverse].reshape(*batch.shape, copies[0].dim)

    def row_versions(self, table: str, keys: Any) -> NDArray[np.uint64]:
        """Versions uint64[*shape] of the rows of keys; 0 for those without a row."""
        batch, _ = self._begin(table, keys)
        out = np.zeros(len(batch.keys), np.uint64)
        with self._changed:
            for copy, part in zip(self._copies(table), self._parts(batch), strict=True):
                places = copy.find(batch.keys[part])
                out[part] = np.where(places >= 0, copy.versions[places], 0)
        return out[batch.split.inverse].reshape(batch.shape)

    def keys(self, table: str) -> NDArray[np.uint64]:
        """All keys that have a row, in no order."""
        with self._changed:
            return np.concatenate([copy.keys[: copy.count] for copy in self._copies(table)])

    def wait_for(self, versions: Sequence[int], timeout: float | None = None) -> None:
        """Return once every shard is followed to its version, as ``barrier`` and ``wait_durable``
        of a Client return them; zeros wait for the first state. DeadlineExceeded after
        ``timeout`` seconds.
        """
        if len(versions) != len(self._shards):
            raise InvalidArgument(f"{len(versions)} versions for {len(self._shards)} shards")

        def there() -> bool:
            self._raise_failure()
            pairs = zip(self._shards, versions, strict=True)
            return all(shard.version >= version for shard, version in pairs)

        with self._changed:
            if not self._changed.wait_for(there, timeout):
                at = [shard.version for shard in self._shards]
                raise DeadlineExceeded(f"the follower is at versions {at}, not at {list(versions)}")

    def _begin(self, table: str, keys: Any) -> tuple[Batch, list[_Copy]]:
        if self._shard_map is None:
            raise InvalidArgument("the follower is not open")
        return Batch(keys, self._shard_map), self._copies(table)

    def _copies(self, table: str) -> list[_Copy]:
        self._raise_failure()
        copies = [shard.state.tables.get(table) for shard in self._shards]
        if None in copies:
            raise TableNotFound(f"table {table!r} is not there, or not yet")
        return copies  # type: ignore[return-value]

    def _parts(self, batch: Batch) -> list[slice]:
        bounds = batch.split.bounds.tolist()
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            for change in self._subscriber:
                self._shards[change.shard].take(change, self._changed)
                if self._on_change is not None:
                    self._on_change(change)
        except BaseException as error:
            failure = error if isinstance(error, PsError) else RuntimeError(f"follower: {error!r}")
            failure.__cause__ = error
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
