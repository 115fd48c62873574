"""Count measurements, such as latencies, in buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# upper bounds in seconds: of requests and system calls, and of work on all rows of a shard
SHORT = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
LONG = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
# upper bounds in bytes, of messages
SIZES = tuple(float(1 << power) for power in range(8, 31))


class Histogram:
    """Numbers of measurements by bucket, and their sum.

    Only one thread at a time may add measurements; any thread may read, and may find a measurement
    in ``counts`` that is not in ``sum`` yet.

    bounds  upper bounds of the buckets, ascending; a last bucket has all larger measurements
    counts  number of measurements in each bucket, ``len(bounds) + 1`` numbers
    sum     sum of all measurements
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SHORT) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one measurement."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def total(self) -> int:
        """Number of measurements."""
        return sum(self.counts)
