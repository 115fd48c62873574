"""Write messages to one subscriber's stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from psserver.errors import Overloaded
from psserver.position import Position

Write = Callable[[bytes], Awaitable[None]]


class Sender:
    """Writes messages to one subscriber, and records its position in the shard's history.

    position  position after the messages written so far; set by the callers of ``send``
    since     time at which the oldest change that is being written was applied, in seconds since
              1970; infinite while no change is being written
    writing   True while a message waits for the subscriber to read
    """

    def __init__(self, position: Position, write: Write, count: Callable[[int], None]) -> None:
        """Store the arguments.

        position  where the subscription starts
        write     sends one message; waits while the subscriber does not read
        count     called after each sent message with its size in bytes
        """
        self.position = position
        self.since = float("inf")
        self.writing = False
        self._write = write
        self._count = count

    async def send(self, messages: list[bytes], patience: float | None = None) -> None:
        """Write messages in order.

        patience  maximum number of seconds to wait for the subscriber to read one message; None:
                  no limit

        Raises Overloaded if a message takes longer. The subscriber can subscribe again with the
        last token that it received.
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
                f"the subscriber did not read for {patience} seconds while a large change was being"
                " sent: read faster, and subscribe again with the last token received"
            ) from error
