"""gRPC channels of a process that forks, as data loaders do.

gRPC survives a fork if no thread is inside it at that moment, waiting for an answer included; else
the child hangs or aborts. So before a fork every call is cancelled and everybody who would begin
another waits; afterwards the parent's owners begin theirs again. The child leaves what it inherited
alone, for ever, and makes channels of its own. (gRPC's GRPC_ENABLE_FORK_SUPPORT does neither: it
waits for calls, and ends a child whose inherited channels it cannot shut down.)

The lock of numba's compiler goes the same way: forked while another thread loads a kernel, it
would stay locked in the child.
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

from psproto import keepalive

PATIENCE = 2.0  # seconds that a fork waits for cancelled calls to end
OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    *keepalive.client_options(),
    ("grpc.use_local_subchannel_pool", 1),  # else a forked child finds its parent's connections
)
Cancelled = grpc.FutureCancelledError  # by a fork: begin the call again


class _Gate:
    """Whoever calls into gRPC is inside; a fork closes it, which waits until nobody is."""

    def __init__(self) -> None:
        self._empty = threading.Condition(threading.Lock())
        self._inside = 0

    def __enter__(self) -> None:
        with self._empty:
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._empty:
            self._inside -= 1
            self._empty.notify_all()

    def close(self) -> None:
        self._empty.acquire()
        while self._inside:
            self._empty.wait()

    def open(self) -> None:
        self._empty.release()


class Channel:
    """A connection to one server. Thread-safe."""

    def __init__(self, address: str, options: tuple[tuple[str, int], ...]) -> None:
        with _gate:
            self._channel = grpc.insecure_channel(address, options=options)
            self._calls: set[Any] = set()
            _channels.add(self)
            _register_hooks()

    def open_stream(self, method: str, requests: Iterator[bytes]) -> Any:
        """Begin a stream of messages both ways."""
        with _gate:
            return self._note(self._channel.stream_stream(method)(requests))

    def start(self, method: str, message: bytes, timeout: float) -> Any:
        """Begin a unary call. Its result() raises RpcError, or Cancelled by a fork."""
        with _gate:
            return self._note(self._channel.unary_unary(method).future(message, timeout=timeout))

    def call(self, method: str, message: bytes, timeout: float) -> bytes:
        """The answer to a unary call; raises RpcError."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                left = max(deadline - time.monotonic(), 0.001)
                return self.start(method, message, left).result()  # type: ignore[no-any-return]
            except Cancelled:
                continue

    def cancel(self, call: Any) -> None:
        """Cancel a stream or a call."""
        with _gate:
            call.cancel()

    def close(self) -> None:
        """Close it and its calls."""
        with _gate:
            self._channel.close()

    def quiet(self) -> None:
        """Cancel every call and wait until gRPC's threads have left; the gate is closed."""
        for call in self._calls.copy():
            call.cancel()
        deadline = time.monotonic() + PATIENCE
        state: Any = getattr(self._channel, "_call_state", None)  # no public name tells
        while len(self._calls) or getattr(state, "managed_calls", 0):
            if time.monotonic() > deadline:
                return
            time.sleep(0.0005)

    def _note(self, call: Any) -> Any:
        self._calls.add(call)
        if not call.add_callback(lambda: self._calls.discard(call)):  # over already
            self._calls.discard(call)
        return call


_gate = _Gate()
_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_inherited: list[Channel] = []  # never destroyed: that would call into gRPC
_hooked = False


def _before() -> None:
    global_compiler_lock.acquire()
    _gate.close()
    for channel in list(_channels):
        channel.quiet()


def _in_parent() -> None:
    _gate.open()
    global_compiler_lock.release()


def _in_child() -> None:
    _inherited.extend(_channels)
    _channels.clear()
    _in_parent()


def _register_hooks() -> None:
    """After gRPC's own, which it registers with the first channel: the last come first."""
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
