"""Admit requests: limit the bytes and the number of requests in flight.

Every message passes through here before it is decoded. The bytes of a message and of its reply
count as in flight until the reply is sent. All functions must run on the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakValueDictionary

from psserver.config import ServerConfig
from psserver.errors import Draining, Restoring, TooLarge
from psserver.restore import Restores
from psserver.security.budgets import Budget
from psserver.stats import ServiceStats
from psserver.turns import PARTS, Client, Share, Turns

CONTROL_BYTES = 256 << 10  # maximum size of a message without arrays, in bytes


class Reservation:
    """Counts the bytes of one message and its reply as in flight, until ``release`` or ``end``.

    client  the connection that sent the message; None: its bytes are not counted for a share
    budget  budget of the principal that sent the message; None: it has no limits
    """

    __slots__ = ("_budget", "_handed_over", "_limits", "client", "size")

    def __init__(
        self,
        limits: Limits,
        size: int,
        client: Client | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._limits = limits
        self.client = client
        self._budget = budget
        self._handed_over = False
        self.size = size

    def add(self, more: int) -> None:
        """Add ``more`` bytes for the reply. Raises Overloaded if the limit would be exceeded.

        A reply larger than the limit is allowed if nothing else is in flight.
        """
        stats = self._limits.stats
        if stats.inflight_bytes > self.size:
            self._limits.require_room(more)
        self._count(more)
        if self._budget is not None:
            self._budget.add(more)

    def release(self) -> None:
        """Release all bytes. Does nothing if ``hand_over`` was called before."""
        if not self._handed_over:
            self.end()

    def hand_over(self) -> None:
        """Make ``release`` do nothing, because the message is still in use.

        The caller must call ``end`` later.
        """
        self._handed_over = True

    def end(self) -> None:
        """Release all bytes after ``hand_over``."""
        if self._budget is not None:
            self._budget.end(self.size)
        self._count(-self.size)

    def release_after(self, work: asyncio.Future[Any], size: int | None = None) -> None:
        """Release all bytes when ``work``, which still uses the message, is done.

        size  bytes to keep reserved until then, even beyond max_inflight_bytes; None: all
        """
        if size is not None:
            if self._budget is not None:
                self._budget.end(self.size - size)
            self._count(size - self.size)
        self._handed_over = True
        work.add_done_callback(self._ended)

    def _ended(self, _: asyncio.Future[Any]) -> None:
        self.end()

    def _count(self, more: int) -> None:
        """Count ``more`` bytes; less if it is negative."""
        self._limits.stats.inflight_bytes += more
        self.size += more
        if self.client is not None:
            self.client.inflight += more
            self.client.share.inflight += more


class Limits:
    """Admits messages and calls of one server, and counts those in flight.

    config    the limits are max_message_bytes, max_inflight_bytes and max_calls
    stats     contains the number of bytes in flight
    restores  knows whether a restore blocks the shard
    draining  set to True when the server stops; then all messages are refused
    turns     requests for rows that wait for their turn
    """

    def __init__(self, config: ServerConfig, stats: ServiceStats, restores: Restores) -> None:
        self.stats = stats
        self.draining = False
        self.turns = Turns()
        self.turns.observed = stats.queued.add
        stats.waiting = lambda: self.turns.waiting
        self._clients: WeakValueDictionary[tuple[str, str], Client] = WeakValueDictionary()
        self._shares: WeakValueDictionary[str, Share] = WeakValueDictionary()  # of principals
        self._config = config
        self._restores = restores
        self._calls = 0  # running calls, without subscriptions
        self._idle: asyncio.Event | None = None  # ``idle`` waits for it; set when no call runs

    def client(self, peer: str, principal: str = "") -> Client:
        """Return the client on a connection.

        peer       name of the connection, from gRPC's ``context.peer()``
        principal  name of the principal that calls; "": there is no policy
        """
        client = self._clients.get((peer, principal))
        if client is None:
            client = self._clients[peer, principal] = Client(self.share(principal))
        return client

    def share(self, principal: str) -> Share:
        """Return what a principal uses of the server, over all its connections; a new Share for a
        connection without a principal ("").
        """
        if not principal:
            return Share()
        share = self._shares.get(principal)
        if share is None:
            share = self._shares[principal] = Share()
        return share

    def admit(
        self,
        size: int,
        *,
        client: Client | None = None,
        arrays: bool = True,
        during_restore: bool = False,
        budget: Budget | None = None,
    ) -> Reservation:
        """Admit a message of ``size`` bytes. Returns the reservation of its bytes.

        client          the connection that sent it, if it can have large messages
        arrays          the message may contain arrays; a message without arrays must be small
        during_restore  admit the message even while a restore blocks the shard
        budget          budget of the principal that sent it; None: it has no limits

        Raises Draining, Restoring, TooLarge, Overloaded or BudgetExceeded.
        """
        if self.draining or self._restores.held:
            self.require_open(during_restore=during_restore)
        most = self._config.max_message_bytes
        if size > most:
            raise TooLarge(
                "MESSAGE_TOO_LARGE", f"message of {size} bytes > max_message_bytes={most}"
            )
        if size > CONTROL_BYTES and not arrays:
            raise TooLarge(
                "MESSAGE_TOO_LARGE",
                f"message of {size} bytes > {CONTROL_BYTES}, the limit for messages without arrays",
            )
        inflight = self.stats.inflight_bytes + size
        if inflight > self._config.max_inflight_bytes:
            self.require_room(size)
        if client is not None and client.inflight:
            self._require_share(client.inflight, size, "connection")
            if client.share.inflight > client.inflight:
                self._require_share(client.share.inflight, size, "principal")
        if budget is not None:
            budget.begin(size)
        if client is not None:
            client.inflight += size
            client.share.inflight += size
        self.stats.inflight_bytes = inflight
        return Reservation(self, size, client, budget)

    def require_open(self, *, during_restore: bool = False) -> None:
        """Raise Draining if the server is stopping, or Restoring if a restore blocks the shard.

        during_restore  do not raise Restoring
        """
        if self.draining:
            raise Draining("the server is stopping")
        if self._restores.held and not during_restore:
            raise Restoring

    def require_room(self, size: int) -> None:
        """Raise Overloaded if max_inflight_bytes does not allow ``size`` more bytes in flight."""
        inflight, limit = self.stats.inflight_bytes, self._config.max_inflight_bytes
        if inflight + size > limit:
            raise self.turns.overloaded(
                f"in-flight limit reached: {inflight} bytes in flight + {size} requested >"
                f" max_inflight_bytes={limit}",
                size,
            )

    def _require_share(self, held: int, size: int, owner: str) -> None:
        """Raise Overloaded if a client with ``held`` bytes in flight may not have ``size`` more.

        owner  "connection", or "principal" with all its connections

        It may have as many as remain free for others (dynamic thresholds; Choudhury, Hahne, 1998).
        While it is alone, it may have all but a part, so that a second client finds room.
        """
        total, limit = self.stats.inflight_bytes, self._config.max_inflight_bytes
        share = limit - limit // PARTS if total == held else limit - total
        if held + size > share:
            raise self.turns.overloaded(
                f"this {owner} has {held} bytes in flight + {size} requested >"
                f" {share}, its share of max_inflight_bytes={limit}",
                size,
            )

    def begin_call(self) -> None:
        """Count a running call. Raises Overloaded if max_calls are running already."""
        if self._calls >= self._config.max_calls:
            raise self.turns.overloaded(
                f"{self._config.max_calls} calls are in progress, the limit max_calls"
            )
        self._calls += 1

    def end_call(self) -> None:
        """Count a running call as ended."""
        self._calls -= 1
        if self._idle is not None and not self._calls:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no call is running. Subscriptions do not count."""
        if self._calls:
            self._idle = self._idle or asyncio.Event()
            self._idle.clear()
            await self._idle.wait()
