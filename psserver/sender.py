"""One subscriber's stream, as the server writes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from psserver.position import Position

Write = Callable[[bytes], Awaitable[None]]


class Sender:
    """Writes messages to one subscriber.

    position  after what was written
    since     seconds since 1970 when the oldest change being written was applied; infinite if none
    writing   a message waits for the subscriber to read
    """

    def __init__(self, position: Position, write: Write, count: Callable[[int], None]) -> None:
        """Store the parts.

        write  sends one message, and waits while the subscriber does not read
        count  called with the bytes of each message sent
        """
        self.position = position
        self.since = float("inf")
        self.writing = False
        self._write = write
        self._count = count

    async def send(self, messages: list[bytes]) -> None:
        """Write messages in order."""
        for message in messages:
            self.writing = True
            await self._write(message)
            self.writing = False
            self._count(len(message))
