"""The pages of a server's HTTP port.

    /             status page, for people
    /status.json  live figures of all shards; with ?shard=self of this shard alone, with &tables=N
                  of at most N tables
    /metrics      for Prometheus
    /livez        200 while the server runs
    /readyz       200 while the shard accepts requests, else 503; the body is the phase

All are there from the start of the process on. Requests with a field Host that anybody could
register are refused (hostnames.py), and with http_token_file those without the token, except at
/livez and /readyz, which tell nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, make_wsgi_app

from psserver.hostnames import may_name
from psserver.livestatus import MOST_TABLES
from psserver.overview import Overview
from psserver.page.document import PAGE, POLICY
from psserver.phase import Phases
from psserver.pool import Pool
from psserver.security.httptoken import CHALLENGE, HttpToken
from psserver.webmessages import NO_STORE, Request, Response, text

LIVE_SECONDS = 4.0  # maximum time for the event loop of gRPC to show that it runs

_Page = Callable[[Request], Any]


class Site:
    """Answers the requests to one server's HTTP port.

    registry  metrics for /metrics
    overview  figures for /status.json
    phases    phase of the server, for /readyz
    loop      event loop of gRPC; /livez is refused while it does not run
    names     host names from the settings, in lower case, that requests may have
    token     token that requests need, except those of /livez and /readyz; None: they need none
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        overview: Overview,
        phases: Phases,
        loop: asyncio.AbstractEventLoop,
        names: Collection[str],
        token: HttpToken | None = None,
    ) -> None:
        self._scrape = make_wsgi_app(registry)
        self._collecting = Pool("metrics", 1)
        self._overview = overview
        self._phases = phases
        self._loop = loop
        self._names = names
        self._token = token
        self._pages: dict[str, _Page] = {
            "/": self._page,
            "/status.json": self._status,
            "/metrics": self._metrics,
            "/livez": self._livez,
            "/readyz": self._readyz,
        }

    async def answer(self, request: Request) -> Response:
        """Return the response to a request."""
        probe = request.path in ("/livez", "/readyz")
        if not probe and not may_name(request.fields.get("host"), self._names):
            return text(
                "421 Misdirected Request",
                "the host name in this URL is not known: use an address, or add the name to the"
                " setting http_names",
            )
        given, token = request.fields.get("authorization"), self._token
        if token is not None and not probe and not token.allows(given):
            return Response("401 Unauthorized", fields=(CHALLENGE, NO_STORE))
        page = self._pages.get(request.path)
        if page is None:
            return text("404 Not Found", f"the pages are {' '.join(self._pages)}")
        if request.method not in ("GET", "HEAD"):
            return Response("405 Method Not Allowed", fields=(("Allow", "GET, HEAD"), NO_STORE))
        response: Response = await page(request)
        return response

    async def _page(self, _: Request) -> Response:
        fields = (("Content-Type", "text/html; charset=utf-8"), NO_STORE)
        return Response("200 OK", PAGE, fields, POLICY)

    async def _status(self, request: Request) -> Response:
        """Answer /status.json."""
        query = parse_qs(request.query)
        try:
            tables = int(query.get("tables", [str(MOST_TABLES)])[-1])
        except ValueError:
            tables = -1
        shard = query.get("shard", ["all"])[-1]
        if shard not in ("all", "self") or not 0 <= tables <= MOST_TABLES:
            return text(
                "400 Bad Request", f"expected shard=self or shard=all, and tables=0..{MOST_TABLES}"
            )
        alone = shard == "self"
        body = await (self._overview.alone(tables) if alone else self._overview.all())
        return Response("200 OK", body, (("Content-Type", "application/json"), NO_STORE))

    async def _metrics(self, request: Request) -> Response:
        """Answer /metrics. A thread collects the metrics, because the disk may hang."""
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "HTTP_ACCEPT": request.fields.get("accept", ""),
            "HTTP_ACCEPT_ENCODING": request.fields.get("accept-encoding", ""),
        }
        status, headers = "", list[tuple[str, str]]()

        def start_response(line: str, fields: list[tuple[str, str]]) -> None:
            nonlocal status, headers
            status, headers = line, fields

        body = await asyncio.get_running_loop().run_in_executor(
            self._collecting, lambda: b"".join(self._scrape(environ, start_response))
        )
        return Response(status, body, tuple(headers))

    async def _livez(self, _: Request) -> Response:
        """Answer /livez: 200 if the event loop of gRPC runs a call within LIVE_SECONDS."""
        own, ran = asyncio.get_running_loop(), asyncio.Event()
        try:
            self._loop.call_soon_threadsafe(own.call_soon_threadsafe, ran.set)
            await asyncio.wait_for(ran.wait(), LIVE_SECONDS)
        except TimeoutError:
            return text("503 Service Unavailable", "the event loop of gRPC does not run")
        except RuntimeError:  # it is closed
            return text("503 Service Unavailable", "stopped")
        return text("200 OK", "alive")

    async def _readyz(self, _: Request) -> Response:
        """Answer /readyz with the phase. It agrees with gRPC's health check `readiness`."""
        ready = self._phases.serving
        return text("200 OK" if ready else "503 Service Unavailable", self._phases.name)
