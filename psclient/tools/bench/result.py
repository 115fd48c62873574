"""Result: what a run of a load test measured, summed over its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from psclient.tools.bench.latencies import SHOWN, Latencies

BUSY = 0.85  # cores that a process uses at most; above, Python's lock makes it the bottleneck
LAG_SHARE = 0.25  # of the p99 latency: a lag beyond this is the generator's fault
WAITED = 0.01  # share of requests that may wait for others; more is a limit of its own
ANSWERED = 0.97  # share of requests that succeed while the servers keep up
LAG_SECONDS = 0.002  # a shorter lag does not matter


@dataclass(frozen=True, slots=True)
class Second:
    """Requests that ended in one second of a run, or in its warm-up (``second`` 0)."""

    second: int
    seconds: float  # duration
    offered: int
    ok: int
    refused: int  # requests that a server refused for now; ``errors`` has them too
    keys: int
    bytes: int
    errors: dict[str, int]
    latency: Latencies


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Figures of a run, without its warm-up. Rates are per second."""

    rate: float  # that was asked for; 0.0: closed loop
    seconds: float
    warmup: float
    offered: float  # rate of requests that were due
    achieved: float  # rate of requests that succeeded (goodput)
    keys: float  # rate of keys, duplicates included, of requests that succeeded
    bytes: float  # rate of bytes of distinct keys, rows and gradients
    refused: int  # requests that a server refused for now
    waited: int  # requests that were due while ``in_flight`` requests were unanswered
    latency: Latencies  # of requests that succeeded, from their intended start
    service: Latencies  # the same, from their actual start: without the wait for a free thread
    kinds: dict[str, Latencies]  # ``latency`` by kind of request
    errors: dict[str, Latencies]  # of requests that failed, by code
    lag: Latencies  # how late requests started although a thread was free
    cores: Sequence[float]  # processor time per second of each process
    series: Sequence[Second] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Return the number of requests that failed, refused ones included."""
        return sum(len(each) for each in self.errors.values())

    @property
    def failed_share(self) -> float:
        """Return the share of requests that failed, refused ones included."""
        return self.failed / max(self.failed + len(self.latency), 1)

    @property
    def refused_share(self) -> float:
        """Return the share of requests that a server refused for now."""
        return self.refused / max(self.failed + len(self.latency), 1)

    def doubts(self) -> list[str]:
        """Return why the load generator itself may have limited the figures; []: it did not."""
        found = []
        if self.cores and max(self.cores) > BUSY:
            found.append(
                f"a process of the load generator used {max(self.cores):.2f} cores, near the one"
                " core that a Python process can use: add --processes, or larger batches"
            )
        lag, slow = self.lag.percentile(99), self.latency.percentile(99)
        if lag > max(LAG_SECONDS, LAG_SHARE * slow):
            found.append(
                f"1 % of the requests started more than {lag * 1e3:.3g} ms late although the load"
                " generator had a free thread: its processors are busy, so part of the latency is"
                " its own; run it on another machine"
            )
        late = self.waited / max(self.failed + len(self.latency), 1)
        if self.rate and late > WAITED and self.achieved > ANSWERED * self.offered:
            found.append(
                f"{100 * late:.0f} % of the requests waited because as many as --in-flight allows"
                " were unanswered: part of the latency is this wait; allow more"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all figures, with encoded histograms; durations are in seconds."""
        return {
            **{
                name: getattr(self, name)
                for name in (
                    *("rate", "seconds", "warmup", "offered", "achieved", "keys", "bytes"),
                    *("refused", "waited", "failed"),
                )
            },
            "latency": shown(self.latency),
            "service": shown(self.service),
            "lag": shown(self.lag),
            "kinds": {name: shown(each) for name, each in self.kinds.items()},
            "errors": {name: shown(each) for name, each in self.errors.items()},
            "cores": list(self.cores),
            "doubts": self.doubts(),
            "series": [
                {
                    "second": each.second,
                    "seconds": each.seconds,
                    "offered": each.offered / each.seconds,
                    "achieved": each.ok / each.seconds,
                    "refused": each.refused / each.seconds,
                    "keys": each.keys / each.seconds,
                    "bytes": each.bytes / each.seconds,
                    "errors": each.errors,
                    **percentiles(each.latency),
                }
                for each in self.series
            ],
        }


def percentiles(latencies: Latencies) -> dict[str, float]:
    """Return the percentiles of tables, and the maximum, by name."""
    found = latencies.percentiles(SHOWN)
    return {f"p{percent:g}": each for percent, each in zip(SHOWN, found, strict=True)} | {
        "max": latencies.longest
    }


def shown(latencies: Latencies) -> dict[str, Any]:
    """Return a histogram as JSON: its count, mean and percentiles, and its encoded form."""
    return {
        "count": len(latencies),
        "mean": latencies.mean,
        **percentiles(latencies),
        "hdrhistogram": latencies.encoded(),
    }
