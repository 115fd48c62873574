"""Metrics of subscriptions to the log."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.feed import Feed
from psserver.metrics.samples import counter, gauge, histogram


class FeedCollector(Collector):
    """Collects number, lag and traffic of subscribers."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all subscriptions of the shard."""
        feed, lag = self._feed, self._feed.lag
        yield gauge("ps_subscribers", "Open subscriptions.", feed.subscribers)
        yield gauge(
            "ps_subscriber_lag_versions",
            "Number of versions that the slowest subscriber has not received yet.",
            lag.versions,
        )
        yield gauge(
            "ps_subscriber_lag_seconds",
            "Age of the oldest change that is being sent to a subscriber.",
            lag.seconds,
        )
        yield counter("ps_subscriber_bytes", "Bytes sent to subscribers.", feed.bytes)
        yield counter("ps_subscriber_messages", "Messages sent to subscribers.", feed.messages)
        yield histogram(
            "ps_freshness_seconds",
            "Time from the acknowledgement of a push until its change was written to a subscriber.",
            feed.freshness,
        )
