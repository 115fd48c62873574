"""Follower: copies of tables in this process's memory, which follow the changes on the shards.

    with Follower(addresses, tables=["user"]) as users:
        users.wait_for(client.wait_durable())      # has all that was pushed before
        rows = users.pull("user", keys)            # as Table.pull(keys, mode="serve")

A pull reads each shard's rows as they were at one version of the shard. All rows of a push become
visible together. So do all changes that the server merged into one message (coalesce_ms), and all
changes missed while the follower was disconnected. A snapshot of all rows is built next to the
visible rows and then replaces them; until then, a table takes twice its memory.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from psclient import checked
from psclient.access import Security
from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.changes import Change
from psclient.choices import Wire
from psclient.client import Client
from psclient.copies import Copy
from psclient.errors import DeadlineExceeded, InvalidArgument, PsError, TableNotFound
from psclient.replica import ShardReplica
from psclient.signals import Condition, Shield
from psclient.subscriber import Subscriber, client_of
from psclient.versions import Versions
from psproto import routing


class _Following:
    """The replicas of a Follower, and the thread that applies changes to them.

    subscriber  delivers the changes
    shards      number of shards
    on_change   called with each change after it was applied; None: not called

    The thread refers to this object but not to the Follower, so that a Follower which nobody uses
    any more can be garbage-collected.
    """

    def __init__(
        self, subscriber: Subscriber, shards: int, on_change: Callable[[Change], object] | None
    ) -> None:
        self.changed = Condition()  # held while a shard's visible state changes
        self.shards = [ShardReplica() for _ in range(shards)]
        self.failure: PsError | None = None
        self.closed = False
        self._subscriber = subscriber
        self._on_change = on_change
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def open(self) -> None:
        """Start the thread that applies changes."""
        self._thread.start()

    def close(self) -> None:
        """Close the subscriber and wait for the thread to end. The replicas stay."""
        self._subscriber.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _run(self) -> None:
        """Apply changes until the subscriber is closed. The thread runs this method.

        An error, which ends it, is stored in ``failure``.
        """
        try:
            for change in self._subscriber:
                self.shards[change.shard].take(change, self.changed)
                if self._on_change is not None:
                    self._on_change(change)
        except BaseException as error:
            failure = error if isinstance(error, PsError) else PsError(f"follower: {error!r}")
            failure.__cause__ = error if failure is not error else None
            with self.changed:
                self.failure = failure
                self.changed.notify_all()


class Follower:
    """Copies in memory of tables of all shards, kept up to date. Thread-safe.

    where        "host:port" of every shard in order, or one "name:port", or a Client, which
                 explains both
    tables       names of the tables to follow; None: all tables
    wire         dtype of embeddings on the wire: "float32", "bfloat16" or "float16"
    coalesce_ms  servers may hold back changes for this many milliseconds, to send only the newest
                 value of each key; 0: every change is sent
    on_change    called with every Change after the follower has accepted it, on the follower's
                 thread
    security     tls, token_file and token_in_plaintext, which Client explains; not with a Client,
                 which has its own

    Creating it only checks the arguments; ``open`` connects. Given one DNS name, creating it also
    searches for the shards, and may raise Unavailable.

    While a shard is down, the follower tries to reconnect and serves the rows that it has. Any
    other error stops it; from then on ``pull`` and ``wait_for`` raise that error.

    A follower that was opened before a fork cannot be used in the child: every method raises
    InvalidArgument. Pickling keeps addresses and options. If the follower was open, the unpickled
    one connects at its first use.
    """

    def __init__(
        self,
        where: str | Sequence[str] | Client,
        *,
        tables: Iterable[str] | None = None,
        wire: Wire = "float32",
        coalesce_ms: int = 0,
        on_change: Callable[[Change], object] | None = None,
        **security: Unpack[Security],
    ) -> None:
        self._client = client_of(where, security)
        self._own = None if isinstance(where, Client) else self._client
        self._where = where if isinstance(where, Client) else self._client._addresses
        self._options: dict[str, Any] = {
            "tables": None if tables is None else checked.names_of("tables", tables),
            "wire": wire,
            "coalesce_ms": coalesce_ms,
            "on_change": on_change,
        }
        options = {name: value for name, value in self._options.items() if name != "on_change"}
        self._options |= security
        endless = float("inf")  # reconnect for as long as a shard is down
        subscriber = Subscriber(self._client, timeout=endless, when_lost="snapshot", **options)
        self._following = _Following(subscriber, self._client._shards(), on_change)
        self._shard_map: routing.ShardMap | None = None  # None: not open
        self._process: int | None = None  # id of the process that opened it
        self._opens_itself = False
        self._opening = threading.Lock()
        self._end: weakref.finalize[..., Follower] | None = None

    def __enter__(self) -> Follower:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the addresses, the options, and whether the follower is open."""
        opened = self._opens_itself or (self._shard_map is not None and not self._following.closed)
        return _load, (self._where, self._options, opened)

    def __copy__(self) -> Follower:
        """Return this same follower."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Follower:
        """Return this same follower."""
        return self

    def open(self) -> Follower:
        """Connect and start to receive changes; return this follower. Idempotent.

        Raises Unavailable if the shards cannot be reached, and InvalidArgument if the follower was
        closed.
        """
        self._check_process()
        with self._opening:
            if self._following.closed:
                raise InvalidArgument("the follower is closed")
            if self._shard_map is None:
                shard_map = self._client._connect().shard_map
                with Shield():
                    self._process = os.getpid()
                    self._end = weakref.finalize(
                        self, _close, self._following, self._own, self._process
                    )
                    self._following.open()
                    self._shard_map = shard_map
        return self

    def close(self) -> None:
        """Stop receiving changes. ``pull`` still returns the rows in memory. Idempotent."""
        if self._process not in (None, os.getpid()):
            return  # a child leaves its parent's follower alone
        self._following.close()
        if self._end is not None:
            self._end()
        elif self._own is not None:
            self._own.close()

    def __len__(self) -> int:
        """Return the number of rows in memory."""
        self._check_process()
        with self._following.changed:
            return sum(
                copy.count
                for shard in self._following.shards
                for copy in shard.state.tables.values()
            )

    def __bool__(self) -> bool:
        """Return True: a follower without rows is still a follower."""
        return True

    @property
    def versions(self) -> Versions:
        """For each shard, the version up to which this follower has its rows; -1: none yet.

        After a restore to an older checkpoint, a version may be smaller than before.
        """
        self._check_process()
        with self._following.changed:
            shards = self._following.shards
            return Versions(
                (shard.version for shard in shards),
                (shard.history.epoch if shard.history else 0 for shard in shards),
            )

    @property
    def lag(self) -> tuple[int, ...]:
        """Return for each shard how many of its durable versions are not yet visible in this copy.

        This compares with the newest durable version that the shard's last message reported.
        """
        self._check_process()
        with self._following.changed:
            return tuple(max(each.head - each.version, 0) for each in self._following.shards)

    def tables(self) -> list[str]:
        """Return the names of the tables whose rows have arrived from every shard."""
        self._check_open()
        with self._following.changed:
            names = (set(shard.state.tables) for shard in self._following.shards)
            return sorted(set.intersection(*names))

    def pull(self, table: str, keys: Any) -> Rows:
        """Return the embeddings float32[*shape, dim] of integer keys[*shape], from memory.

        table  name of the table

        The embedding of a key without a row is filled with the table's serving_default. Raises
        TableNotFound if the table does not exist or has not been received yet.
        """
        batch, copies = self._begin(table, keys)
        out: Rows = np.empty((len(batch.keys), copies[0].dim), np.float32)
        with self._following.changed:
            copies = self._copies(table)
            for copy, part in zip(copies, self._parts(batch), strict=True):
                places = copy.find(batch.keys[part])
                out[part] = copy.rows[places]
                out[part][places < 0] = copy.default
        return out[batch.split.inverse].reshape(*batch.shape, copies[0].dim)

    def row_versions(self, table: str, keys: Any) -> NDArray[np.uint64]:
        """Return the version of each key's row, uint64[*shape] for integer keys[*shape].

        table  name of the table

        A row's version is the version of its shard after the row's last change; 0: the key has no
        row. Raises TableNotFound if the table does not exist or has not been received yet.
        """
        batch, _ = self._begin(table, keys)
        out = np.zeros(len(batch.keys), np.uint64)
        with self._following.changed:
            for copy, part in zip(self._copies(table), self._parts(batch), strict=True):
                places = copy.find(batch.keys[part])
                out[part] = np.where(places >= 0, copy.versions[places], 0)
        return out[batch.split.inverse].reshape(batch.shape)

    def keys(self, table: str) -> NDArray[np.uint64]:
        """Return all keys of a table that have a row, uint64[n], in no particular order.

        Raises TableNotFound if the table does not exist or has not been received yet.
        """
        self._check_open()
        with self._following.changed:
            return np.concatenate([copy.keys[: copy.count] for copy in self._copies(table)])

    def wait_for(self, versions: Sequence[int], timeout: float | None = None) -> None:
        """Wait until the follower has applied all changes up to a version of each shard.

        versions  one version per shard, as returned by ``barrier`` or ``wait_durable`` of a Client;
                  0: wait for the first rows of that shard
        timeout   seconds; None: no limit

        Raises DeadlineExceeded after ``timeout``. Raises LogDiverged if a restore to an older
        checkpoint undid a version (only for ``Versions``: plain integers lack the epochs).
        """
        self._check_open()
        following = self._following
        wanted = _wanted(versions, len(following.shards))
        if timeout is not None:
            timeout = checked.number("timeout", timeout)

        def there() -> bool:
            self._raise_failure()
            each = zip(following.shards, wanted, wanted.epochs, strict=True)
            return all([shard.reached(version, epoch) for shard, version, epoch in each])

        with following.changed:
            if following.changed.wait_for(lambda: there() or following.closed, timeout) and there():
                return
            at = [shard.version for shard in following.shards]
        if following.closed:
            raise InvalidArgument(f"the follower was closed at versions {at}")
        raise DeadlineExceeded(
            f"the follower did not reach versions {list(wanted)} in time; it is at {at}"
        )

    def _begin(self, table: str, keys: Any) -> tuple[Batch, list[Copy]]:
        """Return (the keys as a Batch, each shard's copy of the table)."""
        self._check_open()
        assert self._shard_map is not None
        return Batch(keys, self._shard_map), self._copies(table)

    def _copies(self, table: str) -> list[Copy]:
        """Return each shard's copy of a table.

        Raises TableNotFound if a shard has none, or the error that stopped the follower.
        """
        self._raise_failure()
        copies = [shard.state.tables.get(table) for shard in self._following.shards]
        if None in copies:
            raise TableNotFound(
                f"table {table!r} does not exist, or the follower has not received it yet"
            )
        return copies  # type: ignore[return-value]

    def _parts(self, batch: Batch) -> list[slice]:
        """Return for each shard the slice of ``batch.keys`` that has the keys of this shard."""
        bounds = batch.split.bounds.tolist()
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]

    def _raise_failure(self) -> None:
        """Raise the error that stopped the follower, if there is one."""
        if self._following.failure is not None:
            raise self._following.failure

    def _check_open(self) -> None:
        """Raise InvalidArgument unless the follower is open.

        A follower that was open when it was pickled is opened here.
        """
        self._check_process()
        if self._shard_map is None:
            if not self._opens_itself:
                raise InvalidArgument("the follower is not open: call open(), or use `with`")
            self.open()
            self.wait_for([0] * len(self._following.shards), self._client._timeout)

    def _check_process(self) -> None:
        """Raise InvalidArgument in a process that was forked after the follower was opened."""
        if self._process not in (None, os.getpid()):
            raise InvalidArgument(
                f"the follower was opened in process {self._process}, before a fork; create"
                f" a new one in process {os.getpid()}"
            )


def _wanted(versions: Any, shards: int) -> Versions:
    """Return the argument of ``Follower.wait_for`` as Versions.

    versions  Versions, or plain integers, which get the epoch 0 (unknown)
    shards    number of shards

    Raises InvalidArgument unless ``versions`` has one integer per shard.
    """
    if not isinstance(versions, Iterable):
        raise InvalidArgument(f"versions must be a list of versions, got {versions!r}")
    wanted = [checked.integer("version", each, -1, 1 << 64) for each in versions]
    if len(wanted) != shards:
        raise InvalidArgument(
            f"versions must have one version for each of {shards} shards, got {len(wanted)}"
        )
    return Versions(wanted, versions.epochs if isinstance(versions, Versions) else (0,) * shards)


def _close(following: _Following, own: Client | None, process: int) -> None:
    """Stop the thread of a Follower that was closed or garbage-collected.

    own      client to close too; None: the client belongs to the caller
    process  id of the process that opened the follower; in any other process, nothing is done
    """
    if process == os.getpid():
        following.close()
        if own is not None:
            own.close()


def _load(where: str | Sequence[str] | Client, options: dict[str, Any], opened: bool) -> Follower:
    """Recreate a pickled follower.

    opened  whether it was open, so that the new one opens itself at its first use
    """
    follower = Follower(where, **options)
    follower._opens_itself = opened
    return follower
