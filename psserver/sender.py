"""One subscriber's stream, as the server writes it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from psserver.errors import Overloaded
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

    async def send(self, messages: list[bytes], patience: float | None = None) -> None:
        """Write messages in order.

        patience  seconds to wait for the subscriber to read one message; None: no limit

        Raises Overloaded after that. The subscriber may continue from its last token.
        """
        try:
            for message in messages:
                self.writing = True
                async with asyncio.timeout(patience):
                    await self._write(message)
                self.writing = False
                self._count(len(message))
        except TimeoutError as error:
            raise Overloaded(
                f"the subscriber did not read for {patience} seconds in the middle of a large"
                " change; continue from the last token"
            ) from error
