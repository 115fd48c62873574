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

CONTROL_BYTES = 256 << 10  # of a message that carries no arrays


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
        """Return the bytes, unless they were handed over."""
        if not self._handed_over:
            self.resize(0)

    def hand_over(self) -> None:
        """Let another owner return the bytes, with ``end``."""
        self._handed_over = True

    def end(self) -> None:
        """Return the bytes after they were handed over."""
        self.resize(0)

    def release_after(self, work: asyncio.Future[Any]) -> None:
        """Return the bytes when ``work`` ends, as it still uses the message."""
        self.hand_over()
        work.add_done_callback(lambda _: self.end())


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

    def admit(self, size: int, *, arrays: bool = True, during_restore: bool = False) -> Reservation:
        """Admit a message of ``size`` bytes, or raise the reason why not.

        arrays  false for a message of a kind that carries none: it must be small
        """
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
        """Count a call until ``end_call``; Overloaded if there are too many."""
        if self._calls >= self._config.max_calls:
            raise Overloaded(f"max_calls={self._config.max_calls} calls in progress; retry later")
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
