"""A TCP proxy that behaves as badly as a network can.

Connections pass through; ``cut`` makes each one end after a random number of bytes, ``hold`` lets
nothing through until ``release``. Seeded, so a failure can be replayed.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK = 16_384  # bytes


class Proxy:
    """Listens on a port of its own and forwards to ``address``."""

    def __init__(self, address: str, seed: int) -> None:
        host, port = address.split(":")
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flowing = threading.Event()
        self._flowing.set()
        self._most = 0  # bytes until a connection is cut; 0: never
        self.cuts = 0
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, most: int) -> None:
        """Cut every later connection after at most so many bytes; 0: no more."""
        self._most = most

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let nothing through meanwhile."""
        self._flowing.clear()
        try:
            yield
        finally:
            self._flowing.set()

    def close(self) -> None:
        self._closed = True
        self._flowing.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                continue
            left = [self._random.randrange(1, self._most)] if self._most else None
            for source, target in ((near, far), (far, near)):
                threading.Thread(
                    target=self._forward, args=(source, target, left), daemon=True
                ).start()

    def _forward(
        self, source: socket.socket, target: socket.socket, left: list[int] | None
    ) -> None:
        try:
            while data := source.recv(CHUNK):
                self._flowing.wait()
                if left is not None:
                    data = data[: left[0]]
                    left[0] -= len(data)
                target.sendall(data)
                if left is not None and left[0] <= 0:
                    self.cuts += 1
                    break
        except OSError:
            pass
        finally:
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
            source.close()
