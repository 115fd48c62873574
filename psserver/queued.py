"""A request of a stream that waits for its turn, encoded as it came (see turns.py)."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from psserver.exchange import Begun, Exchanges, Read
from psserver.flow import NOTHING, Flow, Head
from psserver.limits import Reservation
from psserver.turns import Turns


class Queued:
    """A request that waits for its turn. Then it is decoded and started.

    data         the encoded request, of ``size`` bytes
    start        time of arrival, in seconds of ``time.perf_counter``
    reservation  bytes of the request in flight, and later of its reply

    begun  future of what ``Exchanges.begin`` returns; of NOTHING if nobody will read the reply
    """

    def __init__(
        self,
        exchanges: Exchanges,
        flow: Flow,
        data: Any,
        size: int,
        start: float,
        reservation: Reservation,
    ) -> None:
        self._exchanges = exchanges
        self._flow = flow
        self._data, self._size = data, size
        self._start = start
        self._reservation = reservation
        self.begun: asyncio.Future[Begun] = asyncio.get_running_loop().create_future()

    def enter(self, turns: Turns, head: Head) -> None:
        """Let the request wait. Raises Overloaded if it would wait for too long.

        head  header of the request
        """
        self._turns = turns
        wait = head.timeout_ms / 1000 if head.timeout_ms else math.inf
        self._until = time.monotonic() + wait
        client = self._flow.caller.client
        turns.enter(client, self._size, self._until, self._begin, self._refuse)

    def _refuse(self, error: Exception) -> None:
        """Answer with an error, because the deadline has passed."""
        self._flow.inflight -= self._size
        self._reservation.release()
        self.begun.set_result((self._start, None, error))

    def _begin(self) -> None:
        """Decode and start the request."""
        flow, turns = self._flow, self._turns
        if flow.gone or flow.broken is not None:
            self._drop()
            return
        try:
            read = self._exchanges.read_at_once(flow.caller.decode, self._data, self._size)
        except Exception as error:
            self._drop()
            flow.end(error.with_traceback(None))
            return
        if read is None:
            work = asyncio.ensure_future(self._begin_large())
            turns.block(flow.caller.client, work)
            turns.working(work, self._size)
            return
        running = self._begin_read(read)[2]
        if isinstance(running, asyncio.Future) and not running.done():
            turns.working(running, self._size)

    async def _begin_large(self) -> None:
        """Decode and start a large request, on a worker thread."""
        flow = self._flow
        try:
            work = self._exchanges.read_on_thread(flow.caller.decode, self._data, self._reservation)
            self._data = None
            self._begin_read(await work)
        except Exception as error:
            self._drop()
            flow.end(error.with_traceback(None))

    def _begin_read(self, read: Read) -> Begun:
        """Start the decoded request, and complete ``begun``."""
        self._data = None
        size, reservation, flow = self._reservation.size, self._reservation, self._flow
        begun = self._exchanges.begin(read[1], self._start, self._until, reservation, flow.lane)
        flow.inflight += reservation.size - size
        self.begun.set_result(begun)
        return begun

    def _drop(self) -> None:
        """Forget the request, because nobody will read its reply."""
        self._flow.inflight -= self._reservation.size
        self._reservation.release()
        self.begun.set_result(NOTHING)
