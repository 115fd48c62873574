"""Count requests, bytes and errors of the service, for the collectors in metrics.py."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


@dataclass(slots=True)
class Traffic:
    """Counts of one method on one table."""

    requests: int = 0
    keys: int = 0
    bytes: int = 0  # of arrays, in and out
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def add(self, keys: int, size: int, seconds: float) -> None:
        """Count one request; ``seconds`` from decoding to result."""
        self.requests += 1
        self.keys += keys
        self.bytes += size
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS, seconds)] += 1


class ServiceStats:
    """Counts of the whole service. Only the event loop writes them; any thread may read."""

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}  # by method and table
        self.errors: dict[tuple[str, str, str], int] = {}  # by method, code and reason
        self.inflight_bytes = 0
        self.streams = 0

    def served(self, method: str, table: str, keys: int, size: int, seconds: float) -> None:
        """Count one pull, push or delete that succeeded."""
        traffic = self.traffic.get((method, table))
        if traffic is None:
            traffic = self.traffic[method, table] = Traffic()
        traffic.add(keys, size, seconds)

    def remove_table(self, table: str) -> None:
        """Remove the counts of a dropped table."""
        for where in [each for each in self.traffic if each[1] == table]:
            del self.traffic[where]

    def failed(self, method: str, code: str, reason: str) -> None:
        """Count one refused request."""
        self.errors[method, code, reason] = self.errors.get((method, code, reason), 0) + 1
