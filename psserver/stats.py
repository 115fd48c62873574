"""Count requests, bytes and errors of the service; psserver/metrics exports the counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from psserver.recent import RecentErrors
from storage.histogram import SIZES, Histogram

# numbers of clients: a request counts for the first of these that the number does not exceed
CROWDS = (1, 4, 16, 64, 256)


@dataclass(slots=True)
class Traffic:
    """Numbers of pulls, pushes or deletes on one table since the server started.

    Each pull and push of an exchange counts.
    """

    requests: int = 0
    keys: int = 0
    bytes: int = 0  # bytes of arrays, received and sent


@dataclass(slots=True)
class Requests:
    """Measurements of the requests of one kind that came over one lane, since the server started.

    A request is a message: an exchange counts once, whatever number of pulls and pushes it has.
    """

    seconds: Histogram = field(default_factory=Histogram)  # from decoding to the result
    received: Histogram = field(default_factory=lambda: Histogram(SIZES))  # bytes of its arrays
    sent: Histogram = field(default_factory=lambda: Histogram(SIZES))  # bytes of the reply's arrays
    keys: int = 0


@dataclass(slots=True)
class Crowd:
    """Requests that were served while the number of clients was in one range."""

    requests: int = 0
    seconds: float = 0.0  # sum of their latencies


class ServiceStats:
    """Counts of all requests and errors. Only the event loop writes them; any thread may read.

    traffic         pulls, pushes and deletes, by ("Pull", "Push" or "Delete", table)
    requests        requests, by ("Pull", "Push", "Exchange" or "Delete", lane)
    crowds          requests by number of clients: one entry for each number in CROWDS, and one for
                    larger numbers
    errors          failed requests, by (method, code, reason)
    recent          the last of these errors
    waits           seconds that requests waited for rows on disk, by table
    inflight_bytes  bytes reserved at present for requests and replies
    streams         streams open at present
    queued          seconds that requests waited for their turn, of those that had to
    waiting         returns the number of requests that wait for their turn at present
    """

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.requests: dict[tuple[str, str], Requests] = {}
        self.crowds = [Crowd() for _ in range(len(CROWDS) + 1)]
        self.errors: dict[tuple[str, str, str], int] = {}
        self.recent = RecentErrors()
        self.waits: dict[str, Histogram] = {}
        self.inflight_bytes = 0
        self.streams = 0
        self.queued = Histogram()
        self.waiting: Callable[[], int] = lambda: 0
        self._crowd = self.crowds[0]

    def count_clients(self, clients: int) -> None:
        """Set the number of connected clients. Any thread may call this."""
        self._crowd = self.crowds[bisect_left(CROWDS, clients)]

    def used(self, method: str, table: str, keys: int, size: int) -> None:
        """Count one successful pull, push or delete.

        method  "Pull", "Push" or "Delete"
        keys    number of keys in it
        size    bytes of its arrays, received and sent
        """
        traffic = self.traffic.get((method, table))
        if traffic is None:
            traffic = self.traffic[method, table] = Traffic()
        traffic.requests += 1
        traffic.keys += keys
        traffic.bytes += size

    def served(
        self, method: str, lane: str, keys: int, received: int, sent: int, seconds: float
    ) -> None:
        """Count one successful request.

        method    "Pull", "Push", "Exchange" or "Delete"
        lane      how it arrived: "unary", "stream", "shm" or "cuda"
        keys      number of keys in it
        received  bytes of its arrays
        sent      bytes of the arrays of the reply
        seconds   latency, from decoding to the result
        """
        requests = self.requests.get((method, lane))
        if requests is None:
            requests = self.requests[method, lane] = Requests()
        requests.keys += keys
        requests.seconds.add(seconds)
        requests.received.add(received)
        requests.sent.add(sent)
        crowd = self._crowd
        crowd.requests += 1
        crowd.seconds += seconds

    def waited(self, table: str, seconds: float) -> None:
        """Count one request that waited until rows were read from disk.

        seconds  time that it waited
        """
        self.waits.setdefault(table, Histogram()).add(seconds)

    def remove_table(self, table: str) -> None:
        """Delete the counts of a table that was dropped."""
        self.waits.pop(table, None)
        for where in [each for each in self.traffic if each[1] == table]:
            del self.traffic[where]

    def failed(self, method: str, code: str, reason: str) -> None:
        """Count one failed request.

        code    name of the gRPC status code
        reason  ErrorInfo reason, for example "TABLE_NOT_FOUND"
        """
        self.errors[method, code, reason] = self.errors.get((method, code, reason), 0) + 1
