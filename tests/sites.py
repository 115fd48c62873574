"""The HTTP port of a server, made for a test: a Site behind an Exposition, without a shard."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry
from servers import free_ports

from psproto import ps_pb2 as pb
from psserver.exposition import Exposition
from psserver.overview import Overview
from psserver.phase import Phases
from psserver.security.httptoken import HttpToken
from psserver.site import Site

HOST = "127.0.0.1"


class Figures:
    """Live figures as a test wants them, in place of those of a shard.

    reads  number of times that they were read
    """

    def __init__(self, shard: int = 0, **fields: Any) -> None:
        self.phases = Phases(pb.PHASE_READY)
        self.status = pb.GetStatusResponse(shard=shard, phase=pb.PHASE_READY, **fields)
        self.reads = 0

    def read(self, most_tables: int = 256) -> pb.GetStatusResponse:
        self.reads += 1
        return self.status


@contextmanager
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread, as that of gRPC."""
    found = asyncio.new_event_loop()
    thread = threading.Thread(target=found.run_forever)
    thread.start()
    try:
        yield found
    finally:
        found.call_soon_threadsafe(found.stop)
        thread.join()
        found.close()


@contextmanager
def site(
    figures: Figures,
    addresses: Sequence[str] = ("",),
    *,
    names: Sequence[str] = (),
    grpc: asyncio.AbstractEventLoop | None = None,
    registry: CollectorRegistry | None = None,
    port: int = 0,
    token: HttpToken | None = None,
) -> Iterator[int]:
    """Serve the pages of a shard with these figures. Yields the port.

    addresses  of the HTTP ports of all shards
    names      host names that requests may have
    grpc       event loop that /livez asks
    token      token that requests need
    """
    shard = figures.status.shard
    overview = Overview(figures, shard, addresses, token)  # type: ignore[arg-type]
    registry = registry or CollectorRegistry()
    with loop() as running:
        pages = Site(registry, overview, figures.phases, grpc or running, names, token)
        server, port = Exposition(pages), port or free_ports(1)
        server.open(HOST, port)
        try:
            yield port
        finally:
            server.close()


def get(port: int, path: str = "/", **fields: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, header fields by lower-case name, and body of the answer to a GET."""
    return request(port, "GET", path, **fields)


def request(port: int, method: str, path: str, **fields: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, header fields by lower-case name, and body of an answer.

    fields  header fields of the request
    """
    url = f"http://{HOST}:{port}{path}"
    asked = urllib.request.Request(url, headers=fields, method=method)
    try:
        answer = urllib.request.urlopen(asked, timeout=60)  # noqa: S310
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        found = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, found, answer.read()


def document(port: int, query: str = "", **fields: str) -> Any:
    """Return the document at /status.json.

    fields  header fields of the request
    """
    return json.loads(get(port, f"/status.json{query}", **fields)[2])
