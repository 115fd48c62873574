"""Counts of requests: by lane, by table and by the number of clients."""

from __future__ import annotations

import pytest

from psserver.metrics.traffic import CROWD_LABELS
from psserver.stats import ServiceStats


@pytest.mark.parametrize(
    ("clients", "label"),
    [
        *((0, "1"), (1, "1"), (2, "2-4"), (4, "2-4"), (5, "5-16"), (17, "17-64")),
        *((256, "65-256"), (257, "257+"), (10**6, "257+")),
    ],
)
def test_a_request_counts_for_the_number_of_clients(clients: int, label: str) -> None:
    stats = ServiceStats()
    stats.count_clients(clients)
    stats.served("Pull", "stream", 1, 8, 16, 0.25)
    counted = {
        label: (crowd.requests, crowd.seconds)
        for label, crowd in zip(CROWD_LABELS, stats.crowds, strict=True)
        if crowd.requests
    }
    assert counted == {label: (1, 0.25)}


def test_parts_count_by_table_and_the_request_once() -> None:
    stats = ServiceStats()
    for table in ("a", "b"):
        stats.used("Push", table, 3, 30)
        stats.used("Pull", table, 2, 20)
    stats.served("Exchange", "shm", 10, 60, 40, 0.5)
    assert {
        where: (each.requests, each.keys, each.bytes) for where, each in stats.traffic.items()
    } == {
        ("Push", "a"): (1, 3, 30),
        ("Pull", "a"): (1, 2, 20),
        ("Push", "b"): (1, 3, 30),
        ("Pull", "b"): (1, 2, 20),
    }
    (requests,) = stats.requests.values()
    assert (requests.keys, requests.received.sum, requests.sent.sum) == (10, 60, 40)
    assert (requests.seconds.total, requests.seconds.sum) == (1, 0.5)
    stats.remove_table("a")
    assert {table for _, table in stats.traffic} == {"b"}
