"""Serve the page /metrics over HTTP from one thread, and limit what clients can occupy.

A connection carries one request and has REQUEST_SECONDS to send it and read the answer. If there
are already MOST_CONNECTIONS, a new connection closes the oldest one, so that idle connections
cannot prevent a scrape.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from psserver.addresses import bind

REQUEST_SECONDS = 5.0  # maximum lifetime of a connection, in seconds
MOST_CONNECTIONS = 64  # maximum number of open connections
HEAD_BYTES = 16 << 10  # maximum size of the header of a request, in bytes

log = structlog.get_logger()


class Exposition:
    """HTTP server for the metrics in ``registry``. Its thread runs from ``open`` to ``close``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._page = make_wsgi_app(registry)
        self._connections: dict[asyncio.StreamWriter, None] = {}  # oldest first
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._listeners: list[socket.socket] = []
        self._running = threading.Event()

    def open(self, host: str, port: int) -> None:
        """Listen and start the thread. Raises OSError if the address cannot be used."""
        self._listeners = bind(host, port)
        self._thread.start()
        self._running.wait()

    def close(self) -> None:
        """Stop the thread and close all connections."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        servers = [
            await asyncio.start_server(self._serve, sock=listener, limit=HEAD_BYTES)
            for listener in self._listeners
        ]
        self._running.set()
        await self._stop.wait()
        for server in servers:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MOST_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.transport.abort()
        self._connections[writer] = None
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError):
            pass
        finally:
            self._connections.pop(writer, None)
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        """Return the complete response to a request.

        head  the request up to the empty line that ends its header
        """
        try:
            environ = _environ(head)
        except ValueError:
            return _response("400 Bad Request", [], b"")
        if environ["PATH_INFO"] not in ("/", "/metrics"):
            return _response("404 Not Found", [], b"metrics are at /metrics\n")
        status, headers = "", list[tuple[str, str]]()

        def start_response(line: str, fields: list[tuple[str, str]]) -> None:
            nonlocal status, headers
            status, headers = line, fields

        try:
            body = b"".join(self._page(environ, start_response))
        except Exception as error:
            log.error("metrics failed", error=repr(error))
            return _response("500 Internal Server Error", [], b"")
        return _response(status, headers, b"" if environ["REQUEST_METHOD"] == "HEAD" else body)


def _environ(head: bytes) -> dict[str, Any]:
    """Convert the header of an HTTP request to a WSGI environment.

    Raises ValueError if ``head`` is not HTTP.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    path, _, query = target.partition("?")
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
    for line in lines:
        name, _, value = line.partition(":")
        environ["HTTP_" + name.strip().upper().replace("-", "_")] = value.strip()
    return environ


def _response(status: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """Return an encoded HTTP response.

    status   code and reason, for example "404 Not Found"
    headers  (name, value) of each header field; the length of the body is added
    """
    fields = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body
