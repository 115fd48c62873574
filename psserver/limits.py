"""Admission of requests: the one place that decides whether a message may be worked on now.

A message is admitted before it is decoded. Its bytes count as in flight until its reply is sent,
and so do the bytes of the reply. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

from psserver.config import ServerConfig
from psserver.errors import Draining, Overloaded, Restoring, TooLarge
from psserver.restore import Restores
from psserver.stats import ServiceStats


class Reservation:
    """The bytes that one message and its reply have in flight."""

    __slots__ = ("_handed_over", "_limits", "size")

    def __init__(self, limits: Limits, size: int) -> None:
        self._limits = limits
        self._handed_over = False
        self.size = size

    def add(self, more: int) -> None:
        """Count ``more`` bytes of a reply; Overloaded if others are in flight and leave no room.

        A reply that is larger than the limit goes out when nothing else is in flight.
        """
        if self._limits.stats.inflight_bytes > self.size:
            self._limits.require_room(more)
        self._limits.stats.inflight_bytes += more
        self.size += more

    def resize(self, size: int) -> None:
        """Count ``size`` bytes from now on; never refused."""
        self._limits.stats.inflight_bytes += size - self.size
        self.size = size

    def release(self) -> None:
        """Return the bytes, unless another owner does so later."""
        if not self._handed_over:
            self.resize(0)

    def release_after(self, work: asyncio.Future[Any]) -> None:
        """Return the bytes when ``work`` ends, as it still uses the message."""
        self._handed_over = True
        work.add_done_callback(lambda _: self.resize(0))


class Limits:
    """What this server has in flight, and what it admits."""

    def __init__(self, config: ServerConfig, stats: ServiceStats, restores: Restores) -> None:
        self.stats = stats
        self.draining = False
        self._config = config
        self._restores = restores
        self._calls = 0  # in progress; subscriptions are not counted
        self._idle = asyncio.Event()  # set while there is no call
        self._idle.set()

    def admit(self, size: int, *, during_restore: bool = False) -> Reservation:
        """Admit a message of ``size`` bytes, or raise the reason why not."""
        self.require_open(during_restore=during_restore)
        most = self._config.max_message_bytes
        if size > most:
            raise TooLarge(
                "MESSAGE_TOO_LARGE", f"the message has {size} bytes, the limit is {most}"
            )
        self.require_room(size)
        self.stats.inflight_bytes += size
        return Reservation(self, size)

    def require_open(self, *, during_restore: bool = False) -> None:
        """Refuse work while the server stops or, but for some methods, is between restore steps."""
        if self.draining:
            raise Draining("the server is stopping")
        if self._restores.held and not during_restore:
            raise Restoring

    def require_room(self, size: int) -> None:
        """Refuse ``size`` more bytes in flight where they exceed the limit."""
        inflight, limit = self.stats.inflight_bytes, self._config.max_inflight_bytes
        if inflight + size > limit:
            raise Overloaded(
                f"in-flight limit reached: {inflight} bytes in flight + {size} requested >"
                f" max_inflight_bytes={limit}; retry later"
            )

    def begin_call(self) -> None:
        """Count a call until ``end_call``."""
        self._calls += 1
        self._idle.clear()

    def end_call(self) -> None:
        """Count a call no longer."""
        self._calls -= 1
        if not self._calls:
            self._idle.set()

    async def idle(self) -> None:
        """Return once no call is in progress."""
        await self._idle.wait()
