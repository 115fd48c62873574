"""What a client is connected with, and its life."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Self

from psclient import checked
from psclient.choices import WIRES, Transport, Wire
from psclient.cluster import Cluster
from psclient.errors import InvalidArgument


class Connection:
    """Connects to a cluster at the first use. Thread-safe; usable in forked processes."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        wire: Wire = "float32",
        timeout: float = 30.0,
        transport: Transport = "stream",
        client_id: int = 0,
        incarnation: int | None = None,
    ) -> None:
        if (
            isinstance(addresses, str)
            or not addresses
            or not all(isinstance(each, str) for each in addresses)
        ):
            raise InvalidArgument(f"addresses must be a list of 'host:port', got {addresses!r}")
        if transport not in ("stream", "unary"):
            raise InvalidArgument(f"transport must be 'stream' or 'unary', got {transport!r}")
        if not 0 < checked.number("timeout", timeout) <= threading.TIMEOUT_MAX:
            raise InvalidArgument(f"timeout must be positive seconds, got {timeout}")
        self._addresses = list(addresses)
        self._dtype = checked.one_of("wire", wire, WIRES)
        self._timeout = timeout
        self._transport = transport
        self._client_id = checked.integer("client_id", client_id, 0, 1 << 64)
        if incarnation is None:
            incarnation = time.time_ns()
        self._incarnation = checked.integer("incarnation", incarnation, 0, 1 << 63)
        self._cluster: Cluster | None = None
        self._connecting = threading.Lock()
        self._dims: dict[str, int] = {}
        self._closed = False
        _clients.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls that wait fail. The client cannot be used again."""
        self._closed = True
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def _on_all(self, method: str, request: Any, answer: Any, *, first: bool = False) -> list[Any]:
        deadline = time.monotonic() + self._timeout
        return self._connect().on_all(method, request, answer, deadline, first=first)

    def _connect(self) -> Cluster:
        cluster = self._cluster
        if cluster is not None and cluster.process == os.getpid():
            return cluster
        with self._connecting:
            if self._closed:
                raise InvalidArgument("the client is closed")
            if self._cluster is None or self._cluster.process != os.getpid():
                self._cluster = Cluster(
                    self._addresses,
                    self._transport,
                    self._client_id,
                    self._incarnation,
                    time.monotonic() + self._timeout,
                )
            return self._cluster


_clients: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    """A child connects anew, under identities of its own."""
    for client in list(_clients):
        client._cluster = None
        client._connecting = threading.Lock()
        client._client_id = 0


os.register_at_fork(after_in_child=_after_fork)
