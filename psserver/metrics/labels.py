"""Give label values to tables, so that the number of series stays bounded.

A shard can have thousands of tables. A limited number of them have series of their own, under their
names. The numbers of all other tables are summed under the label value OTHER.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric

from psserver.errors import Refused
from psserver.metrics.samples import cumulative
from storage.errors import UnknownTable
from storage.histogram import Histogram

OTHER = "(other)"  # no table can have this name, because of the parentheses

Labels = tuple[str, ...]


class TableLabels:
    """The tables that have series of their own: the oldest ones, until they are dropped.

    A table that got its own series keeps them until it is dropped. Then the oldest table without
    series of its own gets some.

    most    maximum number of such tables
    number  returns the number of a table, which is larger for tables that were created later;
            raises UnknownTable or Refused if it was dropped
    """

    def __init__(self, most: int, number: Callable[[str], int]) -> None:
        self._most = most
        self._number = number
        self._own: dict[str, int] = {}  # name -> number

    def choose(self, tables: Sequence[str]) -> frozenset[str]:
        """Return the names of the tables that have series of their own.

        tables  names of all tables
        """
        numbers = {}
        for name in tables:
            try:
                numbers[name] = self._number(name)
            except (UnknownTable, Refused):  # dropped since
                continue
        own = {name: each for name, each in self._own.items() if numbers.get(name) == each}
        others = sorted((each, name) for name, each in numbers.items() if name not in own)
        for number, name in others[: max(self._most - len(own), 0)]:
            if name != OTHER:  # older releases allowed such names
                own[name] = number
        self._own = own
        return frozenset(own)


class Folded:
    """Counts of one metric by table, in which tables without series of their own are summed.

    The sum never falls, because Prometheus takes a counter that falls for one that began again at
    zero. So the counts of a table stay in the sum when it is dropped, or gets its own series.
    """

    def __init__(self) -> None:
        # as of the last call: (table, other label values) -> count of a table without own series
        self._last: dict[tuple[str, Labels], float] = {}
        self._gone: dict[Labels, float] = {}  # counts of tables that left the sum

    def fold(
        self, counts: Iterable[tuple[str, Labels, float]], own: frozenset[str]
    ) -> dict[Labels, float]:
        """Return label values, first that of the table -> count.

        counts  (table, values of the other labels, count)
        own     names of the tables with series of their own
        """
        found: dict[Labels, float] = {}
        present: dict[tuple[str, Labels], float] = {}
        for table, labels, count in counts:
            if table in own:
                found[table, *labels] = count
            else:
                present[table, labels] = count
        for key, before in self._last.items():
            if present.get(key, -1.0) < before:  # dropped, labelled, or created again
                self._gone[key[1]] = self._gone.get(key[1], 0.0) + before
        self._last = present
        for labels, count in self._gone.items():
            found[OTHER, *labels] = count
        for (_, labels), count in present.items():
            found[OTHER, *labels] = found.get((OTHER, *labels), 0.0) + count
        return found


def summed(sizes: Iterable[tuple[str, Labels, float]], own: frozenset[str]) -> dict[Labels, float]:
    """Return label values, first that of the table -> present size, which may also fall.

    sizes  (table, values of the other labels, size)
    own    names of the tables with series of their own; others are summed
    """
    found: dict[Labels, float] = {}
    for table, labels, size in sizes:
        key = (table if table in own else OTHER, *labels)
        found[key] = found.get(key, 0.0) + size
    return found


def fill(metric: Metric, values: Mapping[Labels, float]) -> Metric:
    """Add a sample for each (label values, value) to a gauge or a counter, and return it."""
    for labels, value in values.items():
        metric.add_metric(labels, value)  # type: ignore[attr-defined]
    return metric


class FoldedHistogram:
    """Measurements of one metric by table, in which tables without own series are summed.

    bounds  upper bounds of the buckets of all measurements
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [Folded() for _ in range(len(bounds) + 1)]  # one for each bucket
        self._sums = Folded()

    def fill(
        self,
        metric: HistogramMetricFamily,
        measured: Sequence[tuple[str, Histogram]],
        own: frozenset[str],
    ) -> Metric:
        """Add a sample for each table with series of its own, and one for all others.

        measured  (table, its measurements)
        own       names of the tables with series of their own
        """
        sums = self._sums.fold(((table, (), each.sum) for table, each in measured), own)
        counts = [
            folded.fold(((table, (), each.counts[at]) for table, each in measured), own)
            for at, folded in enumerate(self._counts)
        ]
        for labels, total in sums.items():
            found = [each[labels] for each in counts]
            metric.add_metric(labels, cumulative(self._bounds, found), total)
        return metric
