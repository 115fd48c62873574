"""gRPC channels that survive forks and signals.

Forks. gRPC survives a fork only if no thread is inside gRPC at that moment; a thread that waits for
an answer is inside. Otherwise the child hangs or aborts. So before a fork every call is cancelled,
and threads that want to start a call wait. After the fork the parent's callers start their calls
again. The child never touches the channels that it inherited; it opens its own.
(GRPC_ENABLE_FORK_SUPPORT does not help: it waits for running calls, and ends a child whose
inherited channels it cannot shut down.) numba's compiler lock is also taken during a fork: if
another thread held it while it loaded a kernel, the lock would stay locked in the child.

Outages. When a name cannot be resolved for a while, a gRPC channel finds the server late: after
each failed look-up its resolver pauses longer, up to two minutes, and no option shortens that. So
the first call after a failure opens a new gRPC channel, which looks the name up at once. This
happens at most every REOPEN_SECONDS. Calls that still run on the old gRPC channel end there.

Certificates. New calls use a new gRPC channel once the files for TLS have changed. Calls that still
run on the old one end there.

Signals. A signal handler may raise an exception in the middle of gRPC's Python code, which would
leave locks locked and a stream that can never be read again. So every call into gRPC is made inside
a Shield (signals.py), which delays signal handlers. A signal that arrives during a wait cancels the
call that is waited for.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from numba.core.compiler_lock import global_compiler_lock

from psclient.access import PLAIN, Access
from psclient.errors import Unavailable
from psclient.handshake import Diagnosis, Finding
from psclient.routes import Metadata, Route
from psclient.signals import Shield

FORK_PATIENCE = 2.0  # maximum time that a fork waits for cancelled calls to end, in seconds
REOPEN_SECONDS = 0.5  # shortest time between two gRPC channels to a server that is not reached
DETAILS = "grpc-status-details-bin"  # trailer with details of a server's error
DOWN = ("Failed to connect to remote host", "DNS resolution failed")  # in gRPC's texts: no TLS
Cancelled = grpc.FutureCancelledError  # raised after a fork cancelled a call: start it again


@dataclass(eq=False, slots=True)
class _Opened:
    """A gRPC channel with its running calls."""

    channel: Any  # gRPC's object
    address: str  # "host:port" that it connects to
    credentials: Any  # of Access
    since: float  # when it was opened, in monotonic seconds
    calls: set[Any] = field(default_factory=set)  # running calls: gRPC's objects
    failed: bool = False  # whether a call failed because the server was not reached, or another was


class Channel:
    """Connection to one server. Thread-safe.

    route   address of the server, which may change
    access  how to connect: options, TLS, token

    A gRPC channel is opened by the first call, and a new one by the first call after a failure (see
    the top of this file) or after the address or the files for TLS have changed. ``method`` is a
    path in all methods, such as "/ps.v1.RowService/Stream". Calls on a closed Channel raise
    Unavailable.
    """

    def __init__(self, route: Route, access: Access = PLAIN) -> None:
        self.route = route
        self._access = access
        self._diagnosis = Diagnosis()
        self._opened: _Opened | None = None  # once the first call is made
        self._replaced: list[_Opened] = []  # former gRPC channels; some calls may still run on them
        self._closed = False

    def open_stream(self, method: str, requests: Iterator[bytes]) -> Any:
        """Start a bidirectional stream and return it, to be passed to ``read`` and ``cancel``.

        method    path, such as "/ps.v1.RowService/Stream"
        requests  encoded messages to send; the stream takes each as soon as it can be sent
        """
        with Shield(), _gate:
            opened = self._open()
            call = opened.channel.stream_stream(method)
            return self._note(opened, call(requests, metadata=self._metadata()))

    def start(self, method: str, message: bytes, timeout: float) -> Any:
        """Start a unary call and return it, to be passed to ``result`` and ``cancel``.

        method   path, such as "/ps.v1.RowService/Exchange"
        message  encoded request
        timeout  seconds
        """
        with Shield(), _gate:
            opened = self._open()
            call = opened.channel.unary_unary(method)
            return self._note(
                opened, call.future(message, timeout=timeout, metadata=self._metadata())
            )

    def call(self, method: str, message: bytes, timeout: float) -> bytes:
        """Make a unary call and return the encoded reply.

        method   path, such as "/ps.v1.RowService/Delete"
        message  encoded request
        timeout  seconds

        Starts the call again if a fork of this process cancelled it. Raises grpc.RpcError if the
        call fails.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                left = max(deadline - time.monotonic(), 0.001)
                return self.result(self.start(method, message, left))
            except Cancelled:
                continue

    def result(self, call: Any) -> bytes:
        """Wait for a call that ``start`` returned; return the encoded reply.

        Raises grpc.RpcError if the call fails, Cancelled if a fork of this process cancelled it.
        """
        with Shield(call.cancel):
            return call.result()  # type: ignore[no-any-return]

    def read(self, stream: Any) -> bytes:
        """Wait for the next message of a stream that ``open_stream`` returned; return its bytes.

        Raises StopIteration at the end of the stream, and grpc.RpcError if it fails.
        """
        with Shield(stream.cancel):
            return next(stream)  # type: ignore[no-any-return]

    def cancel(self, call: Any) -> None:
        """Cancel a stream or a unary call, which ``open_stream`` or ``start`` returned."""
        with Shield(), _gate:
            call.cancel()

    def explain(self, error: grpc.RpcError) -> Finding | None:
        """Return why a call failed if TLS is the reason, so that no retry can succeed; else None.

        May take seconds: it tries a handshake, unless that was done within the last second.
        """
        if not _unreached(error) or self._access.proxy or self._closed:
            return None
        if any(text in (error.details() or "") for text in DOWN):
            return None
        address, access = self.route.address, self._access
        return self._diagnosis.of(address, access.tls, access.expected(address, self.route.name))

    def close(self) -> None:
        """Close the connection and end all its calls."""
        with Shield(), _gate:
            self._closed = True
            for opened in self._all():
                opened.channel.close()

    def quiet(self) -> None:
        """Cancel every call, before a fork; wait until gRPC's threads for the calls have ended.

        Waits at most FORK_PATIENCE seconds. The caller holds ``_gate``, so that no call can start.
        """
        deadline = time.monotonic() + FORK_PATIENCE
        for opened in self._all():
            for call in opened.calls.copy():
                call.cancel()
        for opened in self._all():
            state: Any = getattr(opened.channel, "_call_state", None)  # gRPC has no public name
            while len(opened.calls) or getattr(state, "managed_calls", 0):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.0005)

    def _all(self) -> list[_Opened]:
        """Return the gRPC channel in use, if there is one, and the former ones."""
        return [*self._replaced, *([self._opened] if self._opened else [])]

    def _open(self) -> _Opened:
        """Return the gRPC channel; open one at the first call, and a new one if it is outdated.

        Raises Unavailable if this Channel was closed, TlsError if the files for TLS cannot be used,
        and InvalidArgument if a token would be sent in plaintext.
        """
        if self._closed:
            raise Unavailable(f"the connection to {self.route.address} is closed")
        opened = self._opened
        if opened is not None and self._outdated(opened):
            self._replaced.append(opened)
            opened = None
        if opened is None:
            self._close_unused()
            opened = self._opened = self._connect(self.route.address)
            _channels.add(self)
            _register_hooks()
        return opened

    def _connect(self, address: str) -> _Opened:
        """Return a new gRPC channel to ``address``."""
        access = self._access
        access.require_secrecy(address)
        options = access.options(address, access.expected(address, self.route.name))
        credentials = access.credentials()
        if credentials is None:
            channel = grpc.insecure_channel(address, options=options)
        else:
            channel = grpc.secure_channel(address, credentials, options=options)
        return _Opened(channel, address, credentials, time.monotonic())

    def _metadata(self) -> Metadata:
        """Return the metadata of a call: the shard that it is for, and the token."""
        return self.route.metadata + self._access.metadata()

    def _outdated(self, opened: _Opened) -> bool:
        """Return whether to replace a gRPC channel: it failed, or address or files have changed."""
        if opened.address != self.route.address:
            return True
        if opened.credentials is not self._access.credentials():
            return True
        return opened.failed and time.monotonic() - opened.since >= REOPEN_SECONDS

    def _close_unused(self) -> None:
        """Close the former gRPC channels on which no call runs any more."""
        unused = [each for each in self._replaced if not each.calls]
        self._replaced = [each for each in self._replaced if each.calls]
        for opened in unused:
            opened.channel.close()

    def _note(self, opened: _Opened, call: Any) -> Any:
        """Remember a gRPC call until it ends, so that a fork can cancel it. Returns ``call``.

        opened  the gRPC channel on which it runs. Its field ``failed`` is set if the call fails
                because it did not reach the right server
        """
        opened.calls.add(call)

        def end() -> None:
            opened.calls.discard(call)
            if _unreached(call):
                opened.failed = True
                self.route.failed(opened.address)

        if not call.add_callback(end):  # it has ended already
            end()
        return call


def _unreached(call: Any) -> bool:
    """Return whether a gRPC call that has ended failed because it did not reach the right server.

    A server that answers with an error adds a trailer, and names OTHER_SHARD in it if the call was
    meant for another server.
    """
    if call.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    details = dict(call.trailing_metadata() or ()).get(DETAILS, b"")
    return not details or b"OTHER_SHARD" in details


_gate = threading.RLock()  # held during every call into gRPC, and for the duration of a fork
_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_inherited: list[Channel] = []  # kept for ever: destroying a channel would call into gRPC
_hooked = False


def _before() -> None:
    """Prepare a fork: acquire ``_gate`` and numba's compiler lock, and end all gRPC calls."""
    global_compiler_lock.acquire()
    _gate.acquire()
    for channel in list(_channels):
        channel.quiet()


def _in_parent() -> None:
    """Release the locks that ``_before`` acquired, after a fork."""
    _gate.release()
    global_compiler_lock.release()


def _in_child() -> None:
    """In a forked child: release the locks of ``_before``, keep inherited channels unused."""
    _inherited.extend(_channels)
    _channels.clear()
    _in_parent()


def _register_hooks() -> None:
    """Register ``_before``, ``_in_parent`` and ``_in_child`` as fork hooks, once per process.

    Must be called after gRPC has registered its hooks, which it does when its first channel is
    created. Python runs the hooks before a fork in reverse order, so ``_before`` then runs first.
    """
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
