"""Keep an event loop awake for a short time, to answer the next request with less latency."""

from __future__ import annotations

import asyncio


class BusyPoll:
    """Keeps an event loop from sleeping for some time after each request.

    A core that sleeps adds latency: an interrupt must wake it, its clock is slow, and its caches
    are cold. If the next request comes soon, polling for it avoids this latency, but keeps one core
    busy.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Create the poller of ``loop``.

        seconds  time for which ``stay`` keeps the loop from sleeping; 0: ``stay`` does nothing
        """
        self._loop = loop
        self._seconds = seconds
        self._end = 0.0  # time at which polling ends, on the clock of the loop
        self._polling = False

    def stay(self) -> None:
        """Keep the loop from sleeping for the next ``seconds`` seconds."""
        if self._seconds:
            self._end = self._loop.time() + self._seconds
            if not self._polling:
                self._polling = True
                self._poll()

    def _poll(self) -> None:
        self._polling = self._loop.time() < self._end
        if self._polling:
            self._loop.call_soon(self._poll)  # a loop with something to call does not sleep
