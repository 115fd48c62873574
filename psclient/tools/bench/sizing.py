"""How many shards a rate needs, in words.

Every request with many keys has a message for each shard. So the processor time of a shard per
request is that of a message, plus that of the keys that the shard owns:

    time(shards) = message + key * keys of the request / shards

Both are measured: the processor time of the shards per request, at two numbers of keys. More
shards divide the second part, but not the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from psclient.tools.figures import size

MOST_SHARDS = 4096  # that are considered
NOT_LIMITED = (
    "The shards were not busy at the knee, so something else limited the rate, and the shards may"
    " carry more. To find out how much, run the load generator on other machines, with more"
    " --processes and --clients."
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor time of a shard per request, in seconds."""

    message: float  # per request, whatever its number of keys: the work on its messages
    key: float  # per key that the shard owns

    def of(self, keys: float) -> float:
        """Return the time of a request with ``keys`` keys of the shard."""
        return self.message + self.key * keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What was measured, to compute the size of another cluster."""

    shards: int
    keys: int  # per request, of all tables together
    recommended: float  # requests per second of the measured cluster
    cost: Cost | None  # None: not measured
    row_bytes: float  # memory per row; 0.0: not known
    limited: bool = True  # whether the shards were what limited the rate; else more is possible

    def rate(self, shards: int) -> float:
        """Return the recommended rate of a cluster with ``shards`` shards, in requests/s."""
        if self.cost is None:
            return self.recommended * shards / self.shards
        now, then = self.cost.of(self.keys / self.shards), self.cost.of(self.keys / shards)
        return self.recommended * now / then

    def shards_for(self, rate: float) -> int | None:
        """Return how many shards a rate needs; None: no number of shards reaches it."""
        if not self.recommended:
            return None
        if self.rate(MOST_SHARDS) < rate:
            return None
        low, high = 0, MOST_SHARDS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.rate(middle) >= rate else (middle, high)
        return high


def cost_of(measured: Sequence[tuple[float, float]]) -> Cost | None:
    """Return the cost that fits (keys per shard, seconds per request) of two or more runs best.

    Returns None if there are fewer than two, or if they contradict the model.
    """
    if len({keys for keys, _ in measured}) < 2:
        return None
    count = len(measured)
    mean_keys = sum(keys for keys, _ in measured) / count
    mean = sum(seconds for _, seconds in measured) / count
    spread = sum((keys - mean_keys) ** 2 for keys, _ in measured)
    slope = sum((keys - mean_keys) * (seconds - mean) for keys, seconds in measured) / spread
    message = mean - slope * mean_keys
    if slope <= 0 or mean <= 0:
        return None
    return Cost(max(message, 0.0), slope)


def sentences(sizing: Sizing, *, wanted: float = 0.0) -> list[str]:
    """Return what the measured figures say about the size of a cluster, as sentences.

    wanted  rate that the cluster must carry, in requests per second; 0: not known
    """
    if not sizing.recommended:
        return [
            "No rate kept the objective, so there is no recommended rate: allow a longer latency"
            " (--p99-ms), or use smaller requests."
        ]
    said = []
    if sizing.cost is not None:
        said.append(_cost(sizing, sizing.cost))
    said += _scaling(sizing) if sizing.limited else [NOT_LIMITED]
    if wanted:
        said.append(_wanted(sizing, wanted))
    if sizing.row_bytes:
        rows = 2**30 / sizing.row_bytes
        said.append(
            f"A row takes {size(sizing.row_bytes)} of memory, so each GiB of the shards' budget for"
            f" tables (host_bytes) holds about {_rate(rows)} rows. Add shards, or memory, until all"
            " rows that are used often fit."
        )
    return said


def _cost(sizing: Sizing, cost: Cost) -> str:
    """Return what a request costs."""
    each = sizing.keys / sizing.shards
    return (
        f"A request costs a shard {_us(cost.of(each))} of processor time: {_us(cost.message)} for"
        f" its messages and {_us(cost.key * each)} for its {each:,.0f} keys. More shards divide the"
        " keys among them, but each of them still gets the messages of every request."
    )


def _scaling(sizing: Sizing) -> list[str]:
    """Return what more shards would carry."""
    if sizing.cost is None:
        return [
            "The cost of messages and keys was not measured, so this report assumes that the rate"
            " grows with the number of shards. It grows less: each request has a message for every"
            " shard."
        ]
    return [
        f"So twice as many shards carry about {_rate(sizing.rate(2 * sizing.shards))} requests per"
        f" second, and no number of shards carries more than {_rate(sizing.rate(MOST_SHARDS))}."
        " Requests with more keys use shards better."
    ]


def _wanted(sizing: Sizing, wanted: float) -> str:
    """Return how many shards the wanted rate needs."""
    one = sizing.shards == 1
    if not sizing.limited:
        if wanted <= sizing.recommended:
            have = "this shard suffices" if one else f"{sizing.shards} shards suffice; fewer may"
            return f"For {_rate(wanted)} requests per second, {have}."
        have = "this shard carries" if one else f"{sizing.shards} shards carry"
        return f"Whether {have} {_rate(wanted)} requests per second, this test cannot say."
    shards = sizing.shards_for(wanted)
    if shards is None:
        return (
            f"No number of shards carries {_rate(wanted)} such requests per second. Send fewer"
            " requests with more keys each, for example several batches in one."
        )
    noun = "shard" if shards == 1 else "shards"
    return (
        f"For {_rate(wanted)} requests per second, start {shards:,} {noun}, each with processors of"
        f" its own like those of this test; they carry about {_rate(sizing.rate(shards))}."
    )


def table(sizing: Sizing) -> list[tuple[str, str, str]]:
    """Return lines (shards, keys of a shard per request, requests per second) of other clusters.

    Returns [] if the figures do not say what other clusters carry.
    """
    if not sizing.recommended or not sizing.limited:
        return []
    counts = sorted({1, sizing.shards, *(2**power for power in range(1, 7))})
    return [
        (f"{count}", f"{sizing.keys / count:,.0f}", _rate(sizing.rate(count))) for count in counts
    ]


def _rate(value: float) -> str:
    """Format a rate with two or three significant digits: 12345 as "12,300"."""
    if value < 100:
        return f"{value:.3g}"
    digits = math.floor(math.log10(value))
    return f"{round(value, 2 - digits):,.0f}"


def _us(seconds: float) -> str:
    """Format a short duration: "123 us" or "1.23 ms"."""
    return f"{seconds * 1e6:,.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
