"""Latencies: a histogram of durations, with three significant digits, from 1 us to 1 hour.

HdrHistogram keeps the rare long durations as exactly as the frequent short ones. Histograms of
several processes are merged without loss, through their encoded form. Needs the package
hdrhistogram: pip install 'embedding-ps[load]'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument

LONGEST = 3_600_000_000  # us
DIGITS = 3
SHOWN = (50.0, 90.0, 99.0, 99.9)  # percentiles in tables


class Latencies:
    """Histogram of durations. All durations are in seconds."""

    def __init__(self) -> None:
        self._histogram: Any = _library()(1, LONGEST, DIGITS)

    @classmethod
    def merged(cls, encoded: Iterable[str]) -> Latencies:
        """Return the sum of histograms that ``encoded`` returned."""
        whole = cls()
        for each in encoded:
            whole.merge(each)
        return whole

    def __len__(self) -> int:
        """Return the number of durations."""
        return int(self._histogram.get_total_count())

    def record(self, seconds: NDArray[np.float64] | Sequence[float]) -> None:
        """Add durations. Those below 1 us count as 1 us, those above 1 hour as 1 hour."""
        us = np.clip(np.rint(np.asarray(seconds, np.float64) * 1e6), 1, LONGEST).astype(np.int64)
        values, counts = np.unique(us, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._histogram.record_value(value, count)

    def encoded(self) -> str:
        """Return the histogram as text, in the compressed format of HdrHistogram."""
        return str(self._histogram.encode().decode())

    def merge(self, encoded: str) -> None:
        """Add a histogram that ``encoded`` returned."""
        self._histogram.decode_and_add(encoded)

    def percentile(self, percent: float) -> float:
        """Return the duration that ``percent`` % of all durations do not exceed; 0.0: no data."""
        return self.percentiles([percent])[0]

    def percentiles(self, percents: Sequence[float]) -> list[float]:
        """Return ``percentile`` of each of ``percents``."""
        if not len(self):
            return [0.0] * len(percents)
        found = self._histogram.get_percentile_to_value_dict(list(percents))
        return [min(found[each] / 1e6, self.longest) for each in percents]

    @property
    def longest(self) -> float:
        """Return the longest duration; 0.0: there is none."""
        return float(self._histogram.get_max_value()) / 1e6 if len(self) else 0.0

    @property
    def mean(self) -> float:
        """Return the mean duration; 0.0: there is none."""
        return float(self._histogram.get_mean_value()) / 1e6 if len(self) else 0.0


def require() -> None:
    """Raise InvalidArgument if hdrhistogram is not installed."""
    _library()


def _library() -> Any:
    """Return the class HdrHistogram. Raises InvalidArgument if it is not installed."""
    try:
        from hdrh.histogram import HdrHistogram
    except ImportError as error:
        raise InvalidArgument(
            "a load test needs hdrhistogram: pip install 'embedding-ps[load]'"
        ) from error
    return HdrHistogram
