"""Serve HTTP from one thread, and limit what clients can occupy. site.py answers the requests.

A connection carries one request and has REQUEST_SECONDS to send it and read the answer. If there
are already MOST_CONNECTIONS, a new connection closes the oldest one, so that idle connections
cannot prevent a scrape or a probe.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Protocol

import structlog

from psserver import webmessages
from psserver.addresses import bind
from psserver.webmessages import Request, Response

REQUEST_SECONDS = 5.0  # maximum lifetime of a connection, in seconds
MOST_CONNECTIONS = 64  # maximum number of open connections
HEAD_BYTES = 16 << 10  # maximum size of the header of a request, in bytes

log = structlog.get_logger()


class Pages(Protocol):
    """Answers HTTP requests, on the event loop of the HTTP thread."""

    async def answer(self, request: Request) -> Response:
        """Return the response to ``request``."""
        ...


class Exposition:
    """HTTP server for ``pages``. Its thread runs from ``open`` to ``close``."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._connections: dict[asyncio.StreamWriter, None] = {}  # oldest first
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
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
                writer.write(await self._answer(head))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError):
            pass
        finally:
            self._connections.pop(writer, None)
            writer.transport.abort()

    async def _answer(self, head: bytes) -> bytes:
        """Return the complete response to a request.

        head  the request up to the empty line that ends its header
        """
        try:
            request = webmessages.parse(head)
        except ValueError:
            return Response("400 Bad Request").encode()
        try:
            response = await self._pages.answer(request)
        except Exception as error:
            log.error("HTTP request failed", path=request.path[:100], error=repr(error))
            response = Response("500 Internal Server Error")
        return response.encode(head_only=request.method == "HEAD")
