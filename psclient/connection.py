"""Base class of the client: addresses and options, connecting at the first use, closing."""

from __future__ import annotations

import contextvars
import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, Self

from psclient import checked
from psclient.access import Access
from psclient.addresses import checked_where
from psclient.choices import WIRES, Lane, Transport, Wire
from psclient.cluster import Cluster
from psclient.errors import DeadlineExceeded, InvalidArgument
from psclient.places import places_of
from psclient.tls import Tls

started: contextvars.ContextVar[float | None] = contextvars.ContextVar("started", default=None)
"""When the running operation began, in monotonic seconds; None: now.

AsyncClient sets it, so that a call's timeout includes the wait for a free thread.
"""


class Connection:
    """Base class of Client: connects to all shards of a cluster at the first use.

    Thread-safe; usable in forked processes. ``Client`` explains the arguments. Raises
    InvalidArgument if one is invalid.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        wire: Wire = "float32",
        timeout: float = 30.0,
        transport: Transport = "stream",
        lane: Lane = "auto",
        client_id: int = 0,
        incarnation: int | None = None,
        renew: bool = True,
        retry_refused: bool = True,
        proxy: bool = False,
        tls: Tls | Literal[False] | None = None,
        token_file: str | os.PathLike[str] | None = None,
        token_in_plaintext: bool = False,
    ) -> None:
        self._addresses = checked_where(addresses)
        if transport not in ("stream", "unary"):
            raise InvalidArgument(f"transport must be 'stream' or 'unary', got {transport!r}")
        if lane not in ("auto", "never", "require"):
            raise InvalidArgument(f"lane must be 'auto', 'never' or 'require', got {lane!r}")
        if lane == "require" and transport == "unary":
            raise InvalidArgument("lane='require' needs transport='stream', got 'unary'")
        self._lane = lane
        self._dtype = checked.one_of("wire", wire, WIRES)
        self._timeout = checked.seconds("timeout", timeout)
        self._transport = transport
        self._access = Access(
            tls=tls,
            token_file=token_file,
            token_in_plaintext=token_in_plaintext,
            proxy=proxy,
        )
        self._places = places_of(self._addresses, self._access)
        self._client_id = checked.integer("client_id", client_id, 0, 1 << 64)
        if incarnation is None:
            incarnation = time.time_ns()
        self._incarnation = checked.integer("incarnation", incarnation, 0, 1 << 63)
        self._renew = bool(renew)
        self._retry_refused = bool(retry_refused)
        self._options = {
            "retry_refused": self._retry_refused,
            "wire": wire, "transport": transport, "lane": lane, "proxy": bool(proxy),
            "tls": tls, "token_file": token_file, "token_in_plaintext": bool(token_in_plaintext),
        }  # fmt: skip
        self._cluster: Cluster | None = None
        self._connecting = threading.RLock()
        self._dims: dict[str, int] = {}
        self._closed = False
        _connections.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle addresses and options, but not client_id, incarnation and renew.

        The unpickled client opens its own connections, under a random client_id.
        """
        return _load, (type(self), self._addresses, {**self._options, "timeout": self._timeout})

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self

    def close(self) -> None:
        """Close the connections; waiting calls fail. The client cannot be used again.

        Idempotent. A client that is no longer referenced closes by itself.
        """
        self._closed = True
        cluster, self._cluster = self._cluster, None
        if cluster is not None and cluster.process == os.getpid():
            cluster.close()

    def _deadline(self) -> float:
        """Return the deadline of an operation that begins now, in monotonic seconds."""
        return (started.get() or time.monotonic()) + self._timeout

    def _on_all(
        self,
        method: str,
        request: Any,
        answer: Any,
        *,
        first: bool = False,
        deadline: float | None = None,
    ) -> list[Any]:
        """Call a unary method on every shard at once; return the replies in shard order.

        method    "TableService/CreateTable"
        request   message to send
        answer    class of the reply message
        first     call shard 0 before the others, so that of several clients with conflicting
                  requests one wins on all shards
        deadline  monotonic seconds; None: the client's timeout from now

        Raises the error of the first shard that failed.
        """
        deadline = deadline or self._deadline()
        return self._connect(deadline).on_all(method, request, answer, deadline, first=first)

    def _connect(self, deadline: float | None = None) -> Cluster:
        """Return this process's connections to all shards; create them if there are none yet.

        deadline  monotonic seconds; None: the client's timeout from now

        Raises InvalidArgument if the client is closed or its addresses are not those of one
        cluster, Unavailable if a shard cannot be reached, and DeadlineExceeded if another thread is
        still connecting at the deadline.
        """
        cluster = self._cluster
        if cluster is not None and cluster.process == os.getpid():
            return cluster
        deadline = deadline or self._deadline()
        try:  # a signal handler may raise after the lock is taken, before ``acquire`` returns
            if not self._connecting.acquire(timeout=max(deadline - time.monotonic(), 0)):
                raise DeadlineExceeded("another thread is still connecting to the shards")
            return self._connected(deadline)
        finally:
            with suppress(RuntimeError):  # raised if this thread does not hold the lock
                self._connecting.release()

    def _connected(self, deadline: float) -> Cluster:
        """Return the connections; create them unless another thread did so in the meantime.

        deadline  monotonic seconds at which all shards must have answered

        The caller holds the lock ``_connecting``.
        """
        self._require_open()
        cluster = self._cluster
        if cluster is None or cluster.process != os.getpid():
            cluster = Cluster(
                self._places,
                self._transport,
                self._lane,
                self._client_id,
                self._incarnation,
                renew=self._renew,
                retry_refused=self._retry_refused,
                access=self._access,
                deadline=deadline,
            )
            self._cluster = cluster
            weakref.finalize(self, cluster.forget).atexit = False
            if self._closed:
                self.close()
                cluster.close()
                self._require_open()
        return cluster

    def _shards(self) -> int:
        """Return the number of shards. Searches for them if the client was given one DNS name."""
        if isinstance(self._addresses, str):
            return len(self._places.routes(self._deadline()))
        return len(self._addresses)

    def _require_open(self) -> None:
        if self._closed:
            raise InvalidArgument("the client is closed")


def _load(
    kind: type[Connection], addresses: str | Sequence[str], options: dict[str, Any]
) -> Connection:
    """Recreate a pickled client."""
    return kind(addresses, **options)


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    """Make every client in a forked child open its own connections, under a random client id."""
    for connection in list(_connections):
        connection._cluster = None
        connection._connecting = threading.RLock()
        connection._client_id = 0


os.register_at_fork(after_in_child=_after_fork)
