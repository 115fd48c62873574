"""Proxies that imitate a bad network. They are seeded, so a failure can be repeated.

Proxy     forwards TCP connections. ``cut`` ends each one after a random number of bytes, ``delay``
          delays data by random times, ``hold`` blocks all data
Repeater  forwards gRPC calls, each of them twice, and returns either reply
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

CHUNK = 16_384  # bytes


class Proxy:
    """A proxy that listens on a port of its own and forwards to ``address``."""

    def __init__(self, address: str, seed: int) -> None:
        host, port = address.split(":")
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flowing = threading.Event()
        self._flowing.set()
        self._most = 0  # bytes until a connection is cut; 0: never
        self._longest = 0.0  # seconds that some bytes are held up
        self.cuts = 0
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, most: int) -> None:
        """Cut every later connection after at most this number of bytes. 0 stops cutting."""
        self._most = most

    def delay(self, longest: float) -> None:
        """Delay all data by at most this number of seconds. 0 stops delaying."""
        self._longest = longest

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Block all data during the with statement."""
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
                if self._longest:
                    time.sleep(self._random.uniform(0, self._longest))
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


class Repeater(grpc.GenericRpcHandler):
    """A proxy that makes every unary call to ``address`` twice."""

    def __init__(self, address: str, seed: int) -> None:
        self.repeated = 0
        self._random = random.Random(seed)
        self._channel = grpc.insecure_channel(address)
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()
        self._channel.close()

    def service(self, details: Any) -> Any:
        call = self._channel.unary_unary(details.method)

        def twice(request: bytes, context: grpc.ServicerContext) -> Any:
            at_once = self._random.random() < 0.5
            calls = [call.future(request, timeout=30)]
            if not at_once:
                calls[0].exception()
            calls.append(call.future(request, timeout=30))
            self.repeated += 1
            for each in calls:
                each.exception()
            answer = self._random.choice(calls)
            if answer.exception() is None:
                return answer.result()
            context.set_trailing_metadata(answer.trailing_metadata())
            context.abort(answer.code(), answer.details())

        return grpc.unary_unary_rpc_method_handler(twice)
