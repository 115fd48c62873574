"""Fetch the live figures of other shards from their HTTP ports, for the status page.

The addresses come from the setting http_peers alone, never from a viewer. Each request asks a shard
for its own figures only, so requests cannot go round in circles.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from psserver.hostnames import host_of
from psserver.pool import Pool
from psserver.security.httptoken import HttpToken

FETCH_SECONDS = 2.0  # maximum time for a peer's answer
ANSWER_BYTES = 1 << 20  # maximum size of a peer's answer
TOGETHER = 32  # maximum number of requests in progress

Figures = dict[str, Any]


class Unanswered(Exception):
    """A peer did not answer as expected. The message is shown to viewers."""


class Peer:
    """Another shard: its address, and its newest answer.

    shard     number of the shard
    address   HOST:PORT of its HTTP port; "": unknown
    token     token that its HTTP port needs; None: it needs none
    answered  monotonic time of the newest answer, in seconds; None: it has never answered
    figures   the newest answer
    problem   why the newest request was not answered; "": it was, or there was none
    """

    def __init__(self, shard: int, address: str, token: HttpToken | None = None) -> None:
        self.shard = shard
        self.address = address
        self._token = token
        self.answered: float | None = None
        self.figures: Figures | None = None
        self.problem = "" if address else "its address is not in the setting http_peers"
        self._asked: asyncio.Task[None] | None = None

    def ask(self, slots: asyncio.Semaphore, names: Pool, tables: int) -> asyncio.Task[None] | None:
        """Return the request in progress; if there is none, send one. None: no address is known.

        slots   limits the requests in progress
        names   threads that look up host names
        tables  maximum number of tables in the answer
        """
        if self.address and (self._asked is None or self._asked.done()):
            self._asked = asyncio.create_task(self._ask(slots, names, tables))
        return self._asked

    def stop(self) -> None:
        """Cancel the request in progress."""
        if self._asked is not None:
            self._asked.cancel()

    async def _ask(self, slots: asyncio.Semaphore, names: Pool, tables: int) -> None:
        """Ask the peer once, and record its answer or the problem."""
        async with slots:
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    authorization = None if self._token is None else self._token.header
                    body = await _get(self.address, tables, names, authorization)
                self.figures = _figures(body, self.shard, self.address)
                self.answered, self.problem = time.monotonic(), ""
            except TimeoutError:
                self.problem = f"nothing came within {FETCH_SECONDS:g} seconds"
            except socket.gaierror:
                self.problem = f"the host name of {self.address} is not known"
            except OSError as error:
                self.problem = os.strerror(error.errno) if error.errno else str(error)
            except Unanswered as error:
                self.problem = str(error)


async def _get(address: str, tables: int, names: Pool, authorization: str | None) -> bytes:
    """Return the body of a peer's answer. Raises OSError or Unanswered.

    tables         maximum number of tables in the answer
    names          threads that look up host names, which may hang
    authorization  value of the field Authorization of the request; None: it has none
    """
    loop, host, port = asyncio.get_running_loop(), host_of(address), address.rpartition(":")[2]
    found: Sequence[Any] = await loop.run_in_executor(
        names, lambda: socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    )
    reader, writer = await _connect([each[4][:2] for each in found])
    try:
        target = f"/status.json?shard=self&tables={tables}"
        fields = [f"GET {target} HTTP/1.1", f"Host: {address}", "Connection: close"]
        if authorization is not None:
            fields.append(f"Authorization: {authorization}")
        writer.write("\r\n".join([*fields, "", ""]).encode("latin-1"))
        answer = bytearray()
        while data := await reader.read(1 << 16):
            answer += data
            if len(answer) > ANSWER_BYTES:
                raise Unanswered(f"its answer has more than {ANSWER_BYTES} bytes")
    finally:
        writer.transport.abort()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    line = head.partition(b"\r\n")[0].decode("latin-1")
    if line.split(" ")[1:2] != ["200"]:
        raise Unanswered(
            f"it answered {line[:60]!r} instead of its figures: is it an older release?"
        )
    return body


async def _connect(
    places: Sequence[tuple[str, int]],
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the first of some addresses (IP address, port) that accepts. Raises OSError."""
    for place in places[:-1]:
        with suppress(OSError):
            return await asyncio.open_connection(*place)
    return await asyncio.open_connection(*places[-1])


def _figures(body: bytes, shard: int, address: str) -> Figures:
    """Return the figures in a peer's answer.

    shard    number that the peer must have

    Raises Unanswered if the answer is malformed or comes from a different shard.
    """
    try:
        figures = json.loads(body, parse_constant=_no_constant)["shards"][0]["status"]
        number = figures["shard"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Unanswered("its answer is not the JSON of /status.json") from error
    if number != shard or not isinstance(figures, dict):
        raise Unanswered(
            f"the server at {address} is shard {str(number)[:20]}: correct the setting http_peers"
        )
    return figures


def _no_constant(name: str) -> float:
    """Raise ValueError: NaN and Infinity are not JSON."""
    raise ValueError(f"{name} is not JSON")
