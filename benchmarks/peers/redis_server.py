"""Redis on loopback, with Adagrad in the process of the trainer."""

from __future__ import annotations

import atexit
import shutil
import socket
import subprocess
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.peer import (
    CHUNK,
    EPSILON,
    LEARNING_RATE,
    START_TIMEOUT,
    Peer,
    Unavailable,
    free_port,
)
from benchmarks.work import Ids, Rows, Work, initial_rows, keys_of


class Message:
    """Reusable buffer for a Redis command or reply: a header, then many parts of equal layout.

    The constant bytes of the parts are written once. ``parts`` is a structured array: ``parts[f]``
    is field f of all parts.
    """

    ROOM = 32  # bytes reserved for the header

    def __init__(self, capacity: int, fields: list[tuple[str, Any]]) -> None:
        """Allocate the buffer.

        capacity  maximum number of parts
        fields    layout of a part: (name, dtype, or constant bytes)
        """
        dtype = np.dtype(
            [(name, f"S{len(kind)}" if isinstance(kind, bytes) else kind) for name, kind in fields]
        )
        self._bytes = np.empty(self.ROOM + capacity * dtype.itemsize, np.uint8)
        self.parts: NDArray[Any] = self._bytes[self.ROOM :].view(dtype)
        self.constants = {name: kind for name, kind in fields if isinstance(kind, bytes)}
        for name, constant in self.constants.items():
            self.parts[name] = constant

    def bytes(self, head: bytes, count: int) -> memoryview:
        """Return a view of the header ``head`` and the first ``count`` parts, to send or to
        receive into.
        """
        start = self.ROOM - len(head)
        self._bytes[start : self.ROOM] = np.frombuffer(head, np.uint8)
        return self._bytes.data[start : self.ROOM + count * self.parts.itemsize]


class Redis(Peer):
    """One redis-server without persistence; a value is a row and its accumulator.

    A pull is one MGET of the distinct keys. A push is one MGET that reads the rows again, Adagrad
    in this process, and one MSET. With ``reread=False`` a push uses the rows of the pull, without
    the second MGET. It then overwrites updates that other trainers made between pull and push.
    """

    def __init__(self, work: Work, *, reread: bool = True) -> None:
        self.name = "redis" if reread else "redis, one trainer"
        program = shutil.which("redis-server")
        if program is None:
            raise Unavailable("apt-get install redis-server")
        self._dim = work.dim
        self._reread = reread
        self._keys = keys_of(np.arange(work.rows), work.seed)
        self._place = np.empty(
            work.rows, np.int64
        )  # position of an id among the distinct ids of a step
        length = 8 * work.dim
        value = ("value", ("<f4", 2 * work.dim))
        capacity = max(work.batch, CHUNK)
        self._get = Message(capacity, [("head", b"$8\r\n"), ("key", "<i8"), ("end", b"\r\n")])
        self._set = Message(
            capacity,
            [
                ("head", b"$8\r\n"),
                ("key", "<i8"),
                ("middle", b"\r\n$%d\r\n" % length),
                value,
                ("end", b"\r\n"),
            ],
        )
        self._got = Message(capacity, [("head", b"$%d\r\n" % length), value, ("end", b"\r\n")])
        port = free_port()
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._server = subprocess.Popen(
            [program, "--port", str(port), *options], stdout=subprocess.DEVNULL
        )
        atexit.register(self._server.kill)
        try:
            self._socket = self._connect(port)
            self._fill(initial_rows(work))
        except BaseException:
            self._stop()
            raise

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        keys = self._keys[distinct]
        values = self._mget(keys)
        self._place[distinct] = np.arange(len(distinct))
        rows = np.take(values[:, : self._dim], self._place[ids], axis=0)
        if self._reread:
            values = self._mget(keys)
        accumulator = values[:, self._dim :]
        accumulator += grads * grads
        values[:, : self._dim] -= LEARNING_RATE * grads / (np.sqrt(accumulator) + EPSILON)
        self._send_mset(keys, values)
        self._receive_ok()
        return rows

    def close(self) -> None:
        self._socket.close()
        self._stop()

    def _stop(self) -> None:
        atexit.unregister(self._server.kill)
        self._server.kill()
        self._server.wait()

    def _connect(self, port: int) -> socket.socket:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=START_TIMEOUT)
                break
            except ConnectionRefusedError as error:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"redis-server does not listen on port {port}") from error
                time.sleep(0.01)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _fill(self, rows: Rows) -> None:
        """Write all rows with zero accumulators; build each command while the last one runs."""
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            self._send_mset(
                self._keys[start : start + CHUNK], np.hstack([chunk, np.zeros_like(chunk)])
            )
            if start:
                self._receive_ok()
        self._receive_ok()

    def _mget(self, keys: Ids) -> Rows:
        """Read the values of u existing keys: float32[u, 2 * dim], rows and accumulators."""
        count = len(keys)
        self._get.parts["key"][:count] = keys
        self._socket.sendall(self._get.bytes(b"*%d\r\n$4\r\nMGET\r\n" % (count + 1), count))
        head = b"*%d\r\n" % count
        self._receive(self._got.bytes(head, count), head)
        parts = self._got.parts[:count]
        if not (parts["head"] == self._got.constants["head"]).all():
            raise RuntimeError("MGET returned a missing value or one of unexpected length")
        return np.array(parts["value"])

    def _send_mset(self, keys: Ids, values: Rows) -> None:
        count = len(keys)
        self._set.parts["key"][:count] = keys
        self._set.parts["value"][:count] = values
        self._socket.sendall(self._set.bytes(b"*%d\r\n$4\r\nMSET\r\n" % (2 * count + 1), count))

    def _receive_ok(self) -> None:
        self._receive(memoryview(bytearray(5)), b"+OK\r\n")

    def _receive(self, into: memoryview, head: bytes) -> None:
        """Receive a reply of len(into) bytes; RuntimeError unless it begins with ``head``."""
        got = 0
        while got < len(into):
            size = self._socket.recv_into(into[got:])
            if size == 0:
                raise RuntimeError("redis-server closed the connection")
            got += size
            start = bytes(into[: min(got, len(head))])
            if not head.startswith(start):
                answer = bytes(into[: min(got, 80)])
                raise RuntimeError(f"expected {head!r}, redis answered {answer!r}")
