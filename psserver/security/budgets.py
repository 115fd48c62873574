"""Budgets: limit the requests per second, bytes per second and bytes in flight of a principal.

Rates are limited by token buckets. A bucket holds at most the amount of one second, so that a
principal that was idle may send a burst of that size. A request is accepted if each bucket has at
least 1: one request, one byte. It may take more bytes than are left, because a message may be
larger than the bucket, and the size of a reply is not known before. The next one then waits until
the debt is paid. If a large message had to wait for a full bucket instead, smaller ones of the same
principal could overtake it for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from psserver.errors import BudgetExceeded

SHORTEST = 0.01  # seconds; minimum of the delays that clients are asked to wait
LONGEST = 60.0
LEAST = 1.0 - 1e-6  # of requests or bytes: 1, apart from rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The budget of one principal; 0: no limit."""

    requests: float = 0.0  # per second
    bytes: float = 0.0  # of requests and replies, per second
    inflight: float = 0.0  # bytes of requests and replies in flight

    @property
    def unlimited(self) -> bool:
        """Whether nothing is limited."""
        return not (self.requests or self.bytes or self.inflight)


class _Bucket:
    """A token bucket: fills with ``rate`` per second, up to the amount of one second, at least 1.

    Must be used on the event loop.
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self._most = max(rate, 1.0)
        self._left = self._most
        self._since = now

    def wait(self, now: float) -> float:
        """Return the seconds until the bucket has at least 1; 0: it has now."""
        self._left = min(self._most, self._left + (now - self._since) * self.rate)
        self._since = now
        return 0.0 if self._left >= LEAST else (1.0 - self._left) / self.rate + 1e-3

    def take(self, amount: float) -> None:
        """Take an amount out of the bucket, which may leave it with a debt."""
        self._left -= amount


class Budget:
    """Counts what one principal uses, over all its connections, and refuses what exceeds its limit.

    principal   name, for errors
    on_refused  called for each request that is refused
    clock       returns monotonic seconds

    inflight  bytes of requests and replies in flight

    Must be used on the event loop.
    """

    def __init__(
        self,
        principal: str,
        limit: Limit,
        on_refused: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inflight = 0
        self._on_refused = on_refused
        self._principal = principal
        self._clock = clock
        self.limit(limit)

    def limit(self, limit: Limit) -> None:
        """Use other limits from now on."""
        now = self._clock()
        self.limits = limit
        self._requests = _Bucket(limit.requests, now) if limit.requests else None
        self._bytes = _Bucket(limit.bytes, now) if limit.bytes else None

    def begin(self, size: int) -> None:
        """Count a request of ``size`` bytes. Raises BudgetExceeded with the delay for a retry."""
        now, limits = self._clock(), self.limits
        if limits.inflight and self.inflight and self.inflight + size > limits.inflight:
            raise self._exceeded(
                f"{self.inflight} bytes in flight + {size} requested >"
                f" inflight_bytes={limits.inflight:.0f}",
                0.1,
            )
        if self._requests is not None and (wait := self._requests.wait(now)):
            raise self._exceeded(f"more than requests_per_second={limits.requests:g}", wait)
        if self._bytes is not None and (wait := self._bytes.wait(now)):
            raise self._exceeded(f"more than bytes_per_second={limits.bytes:.0f}", wait)
        if self._requests is not None:
            self._requests.take(1)
        self.add(size)

    def add(self, size: int) -> None:
        """Count ``size`` more bytes in flight, for example of a reply."""
        self.inflight += size
        if self._bytes is not None:
            self._bytes.take(size)

    def end(self, size: int) -> None:
        """Count ``size`` bytes as no longer in flight."""
        self.inflight -= size

    def _exceeded(self, what: str, wait: float) -> BudgetExceeded:
        self._on_refused()
        seconds = min(max(wait, SHORTEST), LONGEST)
        return BudgetExceeded(
            f"budget of principal {self._principal!r} exceeded: {what}; retry after"
            f" {seconds:.2f} s",
            seconds,
        )
