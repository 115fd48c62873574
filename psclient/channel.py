"""gRPC channels that survive forks and signals.

Forks. gRPC survives a fork only if no thread is inside gRPC at that moment; a thread that waits for
an answer is inside. Otherwise the child hangs or aborts. So before a fork every call is cancelled,
and threads that want to start a call wait. After the fork the parent's callers start their calls
again. The child never touches the channels that it inherited; it opens its own.
(GRPC_ENABLE_FORK_SUPPORT does not help: it waits for running calls, and ends a child whose
inherited channels it cannot shut down.) numba's compiler lock is also taken during a fork: if
another thread held it while it loaded a kernel, the lock would stay locked in the child.

Signals. A signal handler may raise an exception in the middle of gRPC's Python code, which would
leave locks locked and a stream that can never be read again. So every call into gRPC is shielded
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

FORK_PATIENCE = 2.0  # maximum time that a fork waits for cancelled calls to end, in seconds
PROXY = "grpc.enable_http_proxy"
OPTIONS: Options = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    *keepalive.client_options(),
    ("grpc.use_local_subchannel_pool", 1),  # else a forked child reuses its parent's connections
    (PROXY, 0),
)
Cancelled = grpc.FutureCancelledError  # raised after a fork cancelled a call: start it again


def options(*, proxy: bool) -> Options:
    """Return the options of a gRPC channel.

    proxy  whether to use the HTTP proxy of the environment variables
    """
    return tuple((name, int(proxy) if name == PROXY else value) for name, value in OPTIONS)


class Channel:
    """A connection to one server. Thread-safe.

    Its methods raise Unavailable once it is closed. ``method`` is a path:
    "/ps.v1.RowService/Stream".
    """

    def __init__(self, address: str, options: Options = OPTIONS) -> None:
        self._address = address
        self._options = options
        self._channel: Any = None  # gRPC's, once the first call is made
        self._calls: set[Any] = set()
        self._closed = False

    def open_stream(self, method: str, requests: Iterator[bytes]) -> Any:
        """Start a bidirectional stream that sends ``requests``; return it for ``read`` and
        ``cancel``.
        """
        with Shield(), _gate:
            return self._note(self._open().stream_stream(method)(requests))

    def start(self, method: str, message: bytes, timeout: float) -> Any:
        """Start a unary call with a timeout in seconds; return it for ``result`` and ``cancel``."""
        with Shield(), _gate:
            return self._note(self._open().unary_unary(method).future(message, timeout=timeout))

    def call(self, method: str, message: bytes, timeout: float) -> bytes:
        """Make a unary call and return the answer; ``timeout`` is in seconds.

        Starts the call again if a fork cancelled it. Raises grpc.RpcError.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                left = max(deadline - time.monotonic(), 0.001)
                return self.result(self.start(method, message, left))
            except Cancelled:
                continue

    def result(self, call: Any) -> bytes:
        """Wait for a call from ``start`` and return its answer.

        Raises grpc.RpcError, or Cancelled if a fork cancelled the call.
        """
        with Shield(call.cancel):
            return call.result()  # type: ignore[no-any-return]

    def read(self, stream: Any) -> bytes:
        """Return the next message of a stream.

        Raises grpc.RpcError, or StopIteration at its end.
        """
        with Shield(stream.cancel):
            return next(stream)  # type: ignore[no-any-return]

    def cancel(self, call: Any) -> None:
        """Cancel a stream or a unary call."""
        with Shield(), _gate:
            call.cancel()

    def close(self) -> None:
        """Close the channel and end its calls."""
        with Shield(), _gate:
            self._closed = True
            if self._channel is not None:
                self._channel.close()

    def quiet(self) -> None:
        """Cancel every call and wait up to FORK_PATIENCE until gRPC's threads have ended.

        The caller holds ``_gate``, so that no call can start.
        """
        for call in self._calls.copy():
            call.cancel()
        deadline = time.monotonic() + FORK_PATIENCE
        state: Any = getattr(self._channel, "_call_state", None)  # gRPC has no public name for it
        while len(self._calls) or getattr(state, "managed_calls", 0):
            if time.monotonic() > deadline:
                return
            time.sleep(0.0005)

    def _open(self) -> Any:
        """Return the gRPC channel; create it at the first call. Raises Unavailable if closed."""
        if self._closed:
            raise Unavailable(f"the connection to {self._address} is closed")
        if self._channel is None:
            self._channel = grpc.insecure_channel(self._address, options=self._options)
            _channels.add(self)
            _register_hooks()
        return self._channel

    def _note(self, call: Any) -> Any:
        """Remember a call until it ends, so that a fork can cancel it. Returns the call."""
        self._calls.add(call)
        if not call.add_callback(lambda: self._calls.discard(call)):  # it has ended already
            self._calls.discard(call)
        return call


_gate = threading.RLock()  # held during every call into gRPC, and for the duration of a fork
_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_inherited: list[Channel] = []  # kept for ever: destroying a channel would call into gRPC
_hooked = False


def _before() -> None:
    """Take both locks and end all gRPC calls, before a fork."""
    global_compiler_lock.acquire()
    _gate.acquire()
    for channel in list(_channels):
        channel.quiet()


def _in_parent() -> None:
    """Release both locks, after a fork."""
    _gate.release()
    global_compiler_lock.release()


def _in_child() -> None:
    """Set the inherited channels aside and release both locks, in the child after a fork."""
    _inherited.extend(_channels)
    _channels.clear()
    _in_parent()


def _register_hooks() -> None:
    """Register the fork hooks, once.

    Must run after gRPC registered its own, at its first channel: hooks that run before a fork run
    in reverse order, so that ours run first.
    """
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
