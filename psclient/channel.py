"""gRPC channels that survive forks and signals.

A fork. gRPC survives it only if no thread is inside gRPC at that moment; waiting for an answer
counts as being inside. Otherwise the child hangs or aborts. Before a fork, therefore, every call is
cancelled and threads that want to start another one wait. Afterwards the owners in the parent start
their calls again. The child never touches the channels that it inherited and makes its own.
(GRPC_ENABLE_FORK_SUPPORT does not help: it waits for calls, and ends a child whose inherited
channels it cannot shut down.) numba's compiler lock needs the same care: if the process forks while
another thread loads a kernel, the lock would stay locked in the child.

A signal. Its handler may raise an exception in the middle of gRPC's Python code, which would leave
locks locked and a stream that can never be read again. Every entry into gRPC is therefore shielded
(signals.py), and an interrupted wait cancels its call.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import grpc
from numba.core.compiler_lock import global_compiler_lock

from psclient.errors import Unavailable
from psclient.signals import Shield
from psproto import keepalive

Options = tuple[tuple[str, int], ...]

FORK_PATIENCE = 2.0  # seconds that a fork waits for cancelled calls to end
PROXY = "grpc.enable_http_proxy"
OPTIONS: Options = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    *keepalive.client_options(),
    ("grpc.use_local_subchannel_pool", 1),  # else a forked child finds its parent's connections
    (PROXY, 0),
)
Cancelled = grpc.FutureCancelledError  # by a fork: start the call again


def options(*, proxy: bool) -> Options:
    """Return the options of a channel.

    proxy  use the HTTP proxy that the environment names
    """
    return tuple((name, int(proxy) if name == PROXY else value) for name, value in OPTIONS)


class Channel:
    """A connection to one server. Thread-safe.

    Its methods raise Unavailable once it is closed.
    """

    def __init__(self, address: str, options: Options = OPTIONS) -> None:
        self._address = address
        self._options = options
        self._channel: Any = None  # gRPC's, once the first call is made
        self._calls: set[Any] = set()
        self._closed = False

    def open_stream(self, method: str, requests: Iterator[bytes]) -> Any:
        """Start a stream of messages both ways. Read it with ``read``."""
        with Shield(), _gate:
            return self._note(self._open().stream_stream(method)(requests))

    def start(self, method: str, message: bytes, timeout: float) -> Any:
        """Start a unary call. Its ``result`` raises RpcError, or Cancelled after a fork."""
        with Shield(), _gate:
            return self._note(self._open().unary_unary(method).future(message, timeout=timeout))

    def call(self, method: str, message: bytes, timeout: float) -> bytes:
        """Return the answer to a unary call; raise RpcError."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                left = max(deadline - time.monotonic(), 0.001)
                return self.result(self.start(method, message, left))
            except Cancelled:
                continue

    def result(self, call: Any) -> bytes:
        """Return the answer to a started call; raise RpcError, or Cancelled after a fork."""
        with Shield(call.cancel):
            return call.result()  # type: ignore[no-any-return]

    def read(self, stream: Any) -> bytes:
        """Return the next message of a stream; raise RpcError, or StopIteration at its end."""
        with Shield(stream.cancel):
            return next(stream)  # type: ignore[no-any-return]

    def cancel(self, call: Any) -> None:
        """Cancel a stream or a call."""
        with Shield(), _gate:
            call.cancel()

    def close(self) -> None:
        """Close the channel and end its calls."""
        with Shield(), _gate:
            self._closed = True
            if self._channel is not None:
                self._channel.close()

    def quiet(self) -> None:
        """Cancel every call and wait until gRPC's threads have ended; the gate is closed."""
        for call in self._calls.copy():
            call.cancel()
        deadline = time.monotonic() + FORK_PATIENCE
        state: Any = getattr(self._channel, "_call_state", None)  # no public name tells
        while len(self._calls) or getattr(state, "managed_calls", 0):
            if time.monotonic() > deadline:
                return
            time.sleep(0.0005)

    def _open(self) -> Any:
        """Return gRPC's channel, made by the first call."""
        if self._closed:
            raise Unavailable(f"the connection to {self._address} is closed")
        if self._channel is None:
            self._channel = grpc.insecure_channel(self._address, options=self._options)
            _channels.add(self)
            _register_hooks()
        return self._channel

    def _note(self, call: Any) -> Any:
        self._calls.add(call)
        if not call.add_callback(lambda: self._calls.discard(call)):  # it has ended already
            self._calls.discard(call)
        return call


_gate = threading.RLock()  # taken by whoever calls into gRPC, and by a fork while it lasts
_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_inherited: list[Channel] = []  # never destroyed: that would call into gRPC
_hooked = False


def _before() -> None:
    global_compiler_lock.acquire()
    _gate.acquire()
    for channel in list(_channels):
        channel.quiet()


def _in_parent() -> None:
    _gate.release()
    global_compiler_lock.release()


def _in_child() -> None:
    _inherited.extend(_channels)
    _channels.clear()
    _in_parent()


def _register_hooks() -> None:
    """Register after gRPC, which registers with its first channel: the last hook runs first."""
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
