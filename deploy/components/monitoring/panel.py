"""A panel of the dashboard, and parts of PromQL expressions that many panels use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

HERE = 'job=~"$job",shard=~"$shard"'  # the series that the two selection fields of the page allow
SHARD = "shard {{shard}}"  # legend of an expression that has one series for each shard


class Kind(Enum):
    """How a panel is drawn: as lines, as areas on top of each other, or a histogram over time."""

    LINES = "lines"
    STACKED = "stacked"
    HEATMAP = "heatmap"


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram over time.

    unit   Grafana's name of the unit, for example "s", "bytes" or "cps" (counts per second)
    help   explanation that Grafana shows next to the title
    lines  legend -> PromQL expression; a legend may contain labels, for example {{shard}}
    limit  value of a red line, for example the threshold of an alert; None: no line
    """

    title: str
    unit: str
    help: str
    lines: Mapping[str, str]
    kind: Kind = Kind.LINES
    limit: float | None = None


def of(metric: str, matchers: str = "") -> str:
    """Return the selector of a metric, for the selected shards.

    matchers  further label matchers, for example 'method="Pull"'
    """
    return f"{metric}{{{HERE}{',' if matchers else ''}{matchers}}}"


def rate(metric: str, by: str, matchers: str = "") -> str:
    """Return the expression for the increase of a counter per second, summed by labels."""
    return f"sum by ({by}) (rate({of(metric, matchers)}[$__rate_interval]))"


def quantile(fraction: float, metric: str, by: str, matchers: str = "") -> str:
    """Return the expression for a quantile of a histogram, by labels."""
    return f"histogram_quantile({fraction}, {rate(metric + '_bucket', f'le, {by}', matchers)})"


def mean(metric: str, by: str, window: str) -> str:
    """Return the expression for the mean of a histogram over a time, by labels.

    window  the time, for example "1h"
    """
    total, number = (
        f"sum by ({by}) (increase({of(metric + part)}[{window}]))" for part in ("_sum", "_count")
    )
    return f"{total} / {number}"
