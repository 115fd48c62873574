"""Metrics of certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.metrics.samples import gauge

# returns use of a certificate -> Unix time at which it expires; empty without TLS
Expiries = Callable[[], Mapping[str, float]]


class CertificateCollector(Collector):
    """Collects the times at which the certificates of the server expire."""

    def __init__(self, expiries: Expiries) -> None:
        self._expiries = expiries

    def collect(self) -> Iterator[Metric]:
        """Yield ps_certificate_expiry_timestamp_seconds, without samples if there is no TLS."""
        metric = gauge(
            "ps_certificate_expiry_timestamp_seconds",
            "Unix time at which a certificate expires: of the server, or of the authority that"
            " clients' certificates must come from.",
            labels=("certificate",),
        )
        for use, expiry in self._expiries().items():
            metric.add_metric((use,), expiry)
        yield metric
