"""Decide when a request for rows may begin, in which order, and refuse it if that is too late.

While the server keeps up, a request begins as soon as it has arrived. When requests arrive faster,
they wait here, encoded as they came. Waiting is fair to clients: the next request to begin is that
of the client whose requests cost least lately (start-time fair queuing; Goyal, Vin, Cheng, 1996).
The requests of one client begin in the order of arrival. A client is a connection here. While a
policy is in force, all connections of a principal have one Share of the server, so that a principal
gets no more by opening more connections. The connections of a principal take turns, so that a
trainer does not wait for all requests of another trainer of its job.

The cost of a request is its size in bytes, and BASE for what any request takes. While requests
wait, the cost that begins per second is measured: the rate of the server. Cost divided by rate is
the time that a request will probably wait. A request is refused on arrival, before it is decoded

* if it would wait until its deadline has passed
* if its client would wait for more than TARGET, the server has been behind by TARGET for INTERVAL,
  and more than ALLOWED requests of the client wait already. So a trainer that sends a few requests
  ahead is not refused, however large they are
* if its client takes more than its share of max_inflight_bytes (limits.py)

A refusal asks the client to wait before it tries again: longer the longer requests wait here and
the more of them are refused, and not the same time for all clients.

Everything here happens on the event loop, in pieces of SLICE at most, so that the loop answers
health checks and administrators in between.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from psserver.errors import DeadlinePassed, Overloaded

BASE = 16 << 10  # cost of a request apart from its bytes
SLICE = 0.0001  # seconds for which waiting requests begin before the loop does something else
SHARE = 0.0002  # seconds in a round of the loop in which requests may begin without waiting
FREE = 4 << 20  # cost of the requests in the engine with which others may begin without waiting
MOST = 1 << 20  # the same for requests that wait: the less, the fairer; at least LEAST requests
LEAST = 2
TARGET = 0.5  # seconds that requests may wait
INTERVAL = 0.25  # seconds for which they may wait longer
ALLOWED = 8  # requests of a client that may wait as long as they like
MEASURED = 0.1  # seconds over which the rate is measured
SMOOTH = 0.3  # weight of the newest measurement of the rate
SHORTEST, LONGEST = 0.1, 2.0  # bounds of the seconds after which refused clients may try again
READS = 1  # requests that are read from one connection per round of the loop while others wait
AHEAD = 4 << 20  # cost of waiting requests from which on only clients without any are read
PARTS = 8  # one client alone may take all of max_inflight_bytes but this part of it


class Share:
    """What a principal uses of the server, over all its connections; without a policy, what one
    connection uses.

    inflight  bytes of its requests and replies in flight
    clients   number of its connections with requests that wait
    cost      cost of these requests
    tag       position of its next request in the order of requests; grows by the cost of each
              request that gets a place in the order
    """

    __slots__ = ("__weakref__", "clients", "cost", "inflight", "tag")

    def __init__(self) -> None:
        self.inflight = 0
        self.clients = 0
        self.cost = 0
        self.tag = 0.0


class Client:
    """One connection, and its requests that wait.

    share     what it uses of the server, together with other connections of its principal
    inflight  bytes of its requests and replies in flight
    waiting   its requests that wait, in the order of arrival
    cost      their cost
    blocked   whether its next request must not begin yet
    reads     number of requests that were read from its streams in this round of the loop
    readers   streams that read their next request in a later round
    """

    __slots__ = (
        "__weakref__", "blocked", "cost", "inflight", "readers", "reads", "share", "waiting",
    )  # fmt: skip

    def __init__(self, share: Share | None = None) -> None:
        self.share = Share() if share is None else share
        self.inflight = 0
        self.waiting: deque[Waiting] = deque()
        self.cost = 0
        self.blocked = False
        self.reads = 0
        self.readers: deque[asyncio.Future[None]] = deque()


class Waiting:
    """A request that waits for its turn.

    begin     called when it may begin; it must not raise
    refuse    called with an error instead, if its deadline passes before
    cost      its cost
    deadline  monotonic seconds
    since     time of arrival, in monotonic seconds
    """

    __slots__ = ("begin", "cost", "deadline", "refuse", "since")

    def __init__(
        self,
        begin: Callable[[], Any],
        refuse: Callable[[Exception], Any],
        cost: int,
        deadline: float,
        since: float,
    ) -> None:
        self.begin, self.refuse = begin, refuse
        self.cost, self.deadline, self.since = cost, deadline, since


class Turns:
    """The requests of all clients that wait for their turn. Must be used on the event loop.

    clock  returns monotonic seconds
    draw   returns random numbers in [0, 1), for the times after which clients may try again

    waiting   number of requests that wait
    cost      their cost
    rate      cost that begins per second while requests wait; 0: not measured yet
    observed  called with the seconds that a request waited when it begins
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.waiting = 0
        self.cost = 0
        self.rate = 0.0
        self.observed: Callable[[float], Any] | None = None
        self._clock, self._draw = clock, draw
        self._order: list[tuple[float, int, Client]] = []  # heap of clients whose turn may come
        self._crowd = 0  # number of shares with requests that wait
        self._number = 0  # distinguishes equal tags
        self._tag = 0.0  # tag of the client whose request began last
        self._used = 0.0  # seconds of requests in this round of the loop
        self._begun = 0  # requests that were begun and not finished by the engine
        self._begun_cost = 0
        self._read: list[Client] = []  # clients with ``reads`` or ``readers``
        self._called = False  # whether the loop will call ``_go_on``
        self._measured, self._since = 0, 0.0  # cost begun since a time, for ``rate``
        self._behind = math.inf  # since when requests wait for more than TARGET; inf: they do not
        self._refused = self._admitted = 0.0  # costs, lately; for the hint to clients

    # ---- a request arrives

    def free(self) -> bool:
        """Return whether a request that arrives now may begin at once: then call ``spent``."""
        return not self.waiting and self._used < SHARE and self._begun_cost < FREE

    def spent(self, seconds: float) -> None:
        """Count the time that it took on the event loop to begin a request without waiting."""
        if not self._used:
            self._call()
        self._used += seconds

    def working(self, work: asyncio.Future[Any], size: int) -> None:
        """Count a request as begun until ``work`` is done.

        size  bytes of the request
        """
        cost = size + BASE
        self._begun += 1
        self._begun_cost += cost

        def over(_: object) -> None:
            self._begun -= 1
            self._begun_cost -= cost
            if self.waiting or self._read:
                self._call()

        work.add_done_callback(over)

    def enter(
        self,
        client: Client,
        size: int,
        deadline: float,
        begin: Callable[[], Any],
        refuse: Callable[[Exception], Any],
    ) -> None:
        """Let a request wait for its turn. Raises Overloaded if that would take too long.

        size      bytes of the request
        deadline  monotonic seconds
        begin     called when it may begin; it must not raise
        refuse    called with DeadlinePassed instead, if the deadline passes before
        """
        now, cost = self._clock(), size + BASE
        if not self.waiting:
            self._measured, self._since = 0, now
        self._require_soon(client, cost, now, deadline)
        self._admitted += cost
        share = client.share
        if not client.waiting:
            self._crowd += not share.clients
            share.clients += 1
        client.waiting.append(Waiting(begin, refuse, cost, deadline, now))
        client.cost += cost
        share.cost += cost
        self.cost += cost
        self.waiting += 1
        if len(client.waiting) == 1 and not client.blocked:
            self._line_up(client)
        self._call()

    async def turn(self, client: Client, size: int, deadline: float) -> asyncio.Future[None]:
        """Wait for the turn of a request. Raises Overloaded or DeadlinePassed.

        The arguments are those of ``enter``. Returns a future to pass to ``passed``, or to cancel.
        """
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[None] = loop.create_future()
        over: asyncio.Future[None] = loop.create_future()

        def begin() -> None:
            if not granted.done():  # else the client is gone
                granted.set_result(None)
                self.working(over, size)

        def refuse(error: Exception) -> None:
            if not granted.done():
                granted.set_exception(error)

        self.enter(client, size, deadline, begin, refuse)
        try:
            await granted
        except asyncio.CancelledError:
            over.cancel()
            raise
        return over

    def passed(
        self, work: Any, size: int, seconds: float, over: asyncio.Future[None] | None
    ) -> None:
        """Count a request that was begun.

        work     future of its result, or an error
        size     bytes of the request
        seconds  time that it took on the event loop to begin the request
        over     result of ``turn``; None: the request did not wait
        """
        running = isinstance(work, asyncio.Future) and not work.done()
        if over is None:
            self.spent(seconds)
            if running:
                self.working(work, size)
        elif running:
            work.add_done_callback(lambda _: over.cancel())
        else:
            over.cancel()

    async def pause(self, client: Client) -> None:
        """Wait before the next request is read from a stream, if others wait for their turn and
        many were read from this client in this round of the loop, or if requests of this client
        wait and all that wait cost AHEAD.

        What a client sends beyond that stays in the transport, so that reading it, and refusing it,
        does not take the time of others, and what was read is still in the processor's caches when
        its turn comes.
        """
        if not client.reads and not client.readers:
            self._read.append(client)
        client.reads += 1
        if client.reads > READS or self._has_enough(client):
            reader: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            client.readers.append(reader)
            self._call()
            await reader

    def block(self, client: Client, work: asyncio.Future[Any]) -> None:
        """Begin no further request of a client until ``work`` is done."""
        client.blocked = True

        def over(_: object) -> None:
            client.blocked = False
            if client.waiting:
                self._line_up(client)
                self._call()

        work.add_done_callback(over)

    def overloaded(self, why: str, cost: int = BASE) -> Overloaded:
        """Return the error for a request that is refused: it asks to try again later.

        why   the reason, for people
        cost  cost of the request
        """
        self._refused += cost
        wait = self.cost / self.rate if self.rate else 0.0
        crowd = 1 + self._refused / max(self._admitted, BASE)
        seconds = wait * crowd * (0.5 + self._draw())
        error = Overloaded(f"{why}; retry later")
        error.retry_after = min(max(seconds, SHORTEST * (1 + self._draw())), LONGEST)
        return error

    def wait_of(self, client: Client, cost: int = 0) -> float:
        """Return the seconds that a request of a client will probably wait; 0.0: not known.

        cost  cost of the request
        """
        if not self.rate:
            return 0.0
        share = client.share
        crowd = self._crowd + (not share.clients)
        siblings = share.clients + (not client.waiting)
        before = min(share.cost + cost, (client.cost + cost) * siblings)
        return min(self.cost, before * crowd) / self.rate

    # ---- the loop calls

    def _call(self) -> None:
        if not self._called:
            self._called = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """Begin requests that wait, for SLICE at most, in a new round of the loop."""
        self._called, self._used = False, 0.0
        self._wake_readers()
        if not self.waiting:
            return
        now = self._clock()
        end = now + SLICE
        while self._order and now < end and (self._begun < LEAST or self._begun_cost < MOST):
            self._begin_next(now)
            now = self._clock()
        self._measure(now)
        more = self._order and (self._begun < LEAST or self._begun_cost < MOST)
        if more or (self._read and self.cost < AHEAD):
            self._call()

    def _wake_readers(self) -> None:
        """Let streams read on: of each client as many as may in this round of the loop."""
        clients, self._read = self._read, []
        for client in clients:
            client.reads = 0
            while client.readers and client.reads < READS and not self._has_enough(client):
                reader = client.readers.popleft()
                if not reader.done():
                    reader.set_result(None)
                    client.reads += 1
            if client.reads or client.readers:
                self._read.append(client)
        if any(client.reads for client in self._read):
            self._call()

    def _has_enough(self, client: Client) -> bool:
        """Return whether no further request of a client should be read for now."""
        return bool(client.waiting) and self.cost >= AHEAD

    def _begin_next(self, now: float) -> None:
        """Begin the request whose turn it is, or refuse it if its deadline has passed."""
        self._tag, _, client = heappop(self._order)
        request = client.waiting.popleft()
        share = client.share
        if not client.waiting:
            share.clients -= 1
            self._crowd -= not share.clients
        client.cost -= request.cost
        share.cost -= request.cost
        self.cost -= request.cost
        self.waiting -= 1
        if now > request.deadline:
            request.refuse(DeadlinePassed("the deadline passed before the work began"))
        else:
            self._measured += request.cost
            if self.observed is not None:
                self.observed(now - request.since)
            request.begin()
        if client.waiting and not client.blocked:
            self._line_up(client)

    def _line_up(self, client: Client) -> None:
        """Give the next request of a client its place in the order, behind earlier requests of its
        share.
        """
        share = client.share
        tag = max(share.tag, self._tag)
        share.tag = tag + client.waiting[0].cost
        self._number += 1
        heappush(self._order, (tag, self._number, client))

    def _measure(self, now: float) -> None:
        """Measure the rate, and note whether requests wait for too long."""
        seconds = now - self._since
        if seconds >= MEASURED:
            rate = self._measured / seconds
            self.rate = self.rate + SMOOTH * (rate - self.rate) if self.rate else rate
            self._measured, self._since = 0, now
            self._refused *= 1 - SMOOTH
            self._admitted *= 1 - SMOOTH

    def _require_soon(self, client: Client, cost: int, now: float, deadline: float) -> None:
        """Raise Overloaded if a request of a client should not wait for its turn."""
        if not self.rate:
            return
        total = self.cost / self.rate
        if total < TARGET / 2:
            self._behind = math.inf
        elif total > TARGET and self._behind == math.inf:
            self._behind = now
        wait = self.wait_of(client, cost)
        if now + wait > deadline:
            raise self.overloaded(
                f"the request would wait for {wait:.2g} s, until its deadline has passed", cost
            )
        if now - self._behind > INTERVAL and wait > TARGET and len(client.waiting) >= ALLOWED:
            raise self.overloaded(
                f"{len(client.waiting)} requests of this connection wait already, the last one"
                f" for {wait:.2g} s",
                cost,
            )
