"""Count requests, bytes and errors of the gRPC service; metrics.py exports the counts."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from psserver.recent import RecentErrors

# upper bounds of the latency histogram's buckets, in seconds
BOUNDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


@dataclass(slots=True)
class Traffic:
    """Numbers of requests, keys and bytes, and latencies, of one gRPC method on one table since the
    server started.
    """

    requests: int = 0
    keys: int = 0
    bytes: int = 0  # bytes of arrays, received and sent
    seconds: float = 0.0  # sum of the latencies
    # number of requests in each bucket of the latency histogram; see BOUNDS
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def add(self, keys: int, size: int, seconds: float) -> None:
        """Count one request.

        keys     number of keys in it
        size     bytes of its arrays, received and sent
        seconds  latency, from decoding to the result
        """
        self.requests += 1
        self.keys += keys
        self.bytes += size
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS, seconds)] += 1


class ServiceStats:
    """Counts of all requests and errors. Only the event loop writes them; any thread may read."""

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}  # by method and table
        self.errors: dict[tuple[str, str, str], int] = {}  # by method, code and reason
        self.recent = RecentErrors()  # the last of them
        self.waits: dict[str, Traffic] = {}  # requests that waited for the disk, by table
        self.inflight_bytes = 0  # reserved at present for requests and replies
        self.streams = 0  # open at present

    def served(self, method: str, table: str, keys: int, size: int, seconds: float) -> None:
        """Count one successful pull, push or delete.

        method   "Pull", "Push" or "Delete"
        keys     number of keys in it
        size     bytes of its arrays, received and sent
        seconds  latency, from decoding to the result
        """
        traffic = self.traffic.get((method, table))
        if traffic is None:
            traffic = self.traffic[method, table] = Traffic()
        traffic.add(keys, size, seconds)

    def waited(self, table: str, seconds: float) -> None:
        """Count one request that waited until rows were read from disk.

        seconds  time that it waited
        """
        self.waits.setdefault(table, Traffic()).add(0, 0, seconds)

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
