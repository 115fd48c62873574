"""Measurements counted in buckets, and those that the version log takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from logs import append, refuse

from storage.disk import Disk
from storage.histogram import Histogram
from storage.versionlog import VersionLog

SLOW = 0.02  # seconds


def test_a_measurement_is_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    counts = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        counts.add(value)
    assert (counts.counts, counts.sum, counts.total) == ([2, 2, 1], 7.5, 5)


def test_the_log_measures_its_writes_and_syncs(tmp_path: Path) -> None:
    pause = threading.Event()

    def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        pause.wait(SLOW)
        return os.pwritev(fd, buffers, offset)

    def fdatasync(fd: int) -> None:
        pause.wait(2 * SLOW)
        os.fdatasync(fd)

    log = VersionLog.open(
        tmp_path,
        fail=refuse,
        wake=lambda: None,
        segment_bytes=1 << 20,
        disk=Disk(pwritev=pwritev, fdatasync=fdatasync),
    )
    before = log.written_bytes
    assert (log.writes.total, log.syncs.total) == (0, 0)
    append(log, 1, size=5000)
    log.sync(1)
    assert (log.writes.total, log.syncs.total) == (1, 1)
    assert log.writes.sum >= SLOW
    assert log.syncs.sum >= 2 * SLOW
    assert log.written_bytes - before >= 5000
    log.close()
