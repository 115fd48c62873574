"""Prefetches that wait for the engine, and calls to a thread pool that is closed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from psserver.coldruns import MOST_PREFETCHES, ColdRuns
from psserver.pool import Pool
from psserver.requests import Pull


def test_prefetches_that_wait_are_few_and_do_not_keep_their_messages() -> None:
    posted: list[Callable[[], None]] = []
    asked: list[Pull] = []

    def cold_reads(_: Any, pulls: list[Pull], prefetch: bool) -> list[Any]:
        asked.extend(pulls)
        return []

    shard: Any = SimpleNamespace(
        budget=SimpleNamespace(cold_rows=1),
        exchange=lambda *_, **__: None,
        cold_reads=cold_reads,
        gpu=None,
    )
    engine: Any = SimpleNamespace(post=posted.append)
    runs = ColdRuns(shard, engine, 1, None, None)  # type: ignore[arg-type]
    message = np.arange(1000, dtype=np.uint64)
    pull = Pull("t", message[:10], 1, "train", False, 0, prefetch=True)
    for _ in range(2 * MOST_PREFETCHES):
        runs._run([], [pull])
    assert len(posted) == MOST_PREFETCHES
    posted[0]()
    assert asked[0].keys.tolist() == list(range(10))
    assert not np.shares_memory(asked[0].keys, message)
    runs.close(60)
    for each in posted[1:]:
        each()
    assert len(asked) == 1, "nothing is read after the end"
    assert runs._prefetching == 0


def test_a_closed_pool_runs_no_calls_and_starts_no_threads() -> None:
    pool = Pool("closed pool", 8)
    assert pool.submit(lambda: 1).result(60) == 1
    pool.close(60)
    with pytest.raises(CancelledError):
        pool.submit(lambda: 1).result(60)
    assert "closed pool" not in [each.name for each in threading.enumerate()]
