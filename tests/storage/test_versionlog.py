"""The version log: appended records are written in groups, synced, and read back."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from alone import alone
from logs import (
    SMALL,
    Opener,
    append,
    close_gate,
    everything,
    files,
    frame,
    gated,
    name,
    payload,
    refuse,
)

from storage.disk import Disk
from storage.segment import HEADER, Frame, frame_bytes
from storage.versionlog import RECORD_MEMORY, VersionLog


class TestAppend:
    def test_a_new_log_is_empty_and_has_a_lineage(self, opened: Opener, directory: Path) -> None:
        log = opened()
        assert (log.first, log.last, log.written, log.durable) == (1, 0, 0, 0)
        assert (log.torn_bytes, log.backlog) == (0, 0)
        assert files(directory) == [name(1), "SYNCED"]
        assert (directory / name(1)).stat().st_size == SMALL
        assert len(log.lineage) == 16
        assert log.lineage != opened(directory.with_name("other")).lineage
        assert everything(log) == []

    @pytest.mark.parametrize("size", [0, 1, 100, 1000, 3000, 5000, 100_000])
    def test_what_is_appended_is_read_now_and_after_a_restart(
        self, opened: Opener, size: int
    ) -> None:
        log = opened()
        append(log, *range(1, 51), size=size)
        log.sync(50)
        expected = [frame(version, size) for version in range(1, 51)]
        assert everything(log) == expected
        assert everything(log, max_bytes=1) == expected
        log.close()
        log = opened()
        assert (log.first, log.last, log.durable, log.torn_bytes) == (1, 50, 50, 0)
        assert everything(log) == expected
        append(log, 51, size=size)
        log.sync(51)
        assert everything(log, after=49) == [frame(50, size), frame(51, size)]

    def test_records_of_any_sizes_in_turn(self, opened: Opener) -> None:
        dice = random.Random(3)
        log = opened()
        sizes = [dice.choice((0, 5, 300, SMALL - 200, SMALL, 3 * SMALL)) for _ in range(200)]
        for version, size in enumerate(sizes, 1):
            append(log, version, size=size)
        log.close()
        assert everything(opened()) == [frame(v, s) for v, s in enumerate(sizes, 1)]

    def test_a_first_record_larger_than_its_segment_takes_the_segments_place(
        self, opened: Opener, directory: Path
    ) -> None:
        log = opened()
        append(log, 1, size=3 * SMALL)
        append(log, 2, size=4 * SMALL)
        log.close()
        assert files(directory) == [name(1), name(2), "SYNCED"]
        log = opened()
        assert everything(log) == [frame(1, 3 * SMALL), frame(2, 4 * SMALL)]

    def test_a_finished_segment_is_as_long_as_its_records(
        self, opened: Opener, directory: Path
    ) -> None:
        log = opened()
        append(log, 1, 2, 3, size=1500)
        log.sync(3)
        sizes = [(directory / name(first)).stat().st_size for first in (1, 3)]
        assert sizes == [HEADER.size + 2 * frame_bytes(1500), SMALL]

    def test_versions_must_follow_each_other(self, opened: Opener) -> None:
        log = opened()
        append(log, 1)
        for version in (0, 1, 3):
            with pytest.raises(ValueError, match=f"expected a record of version 2, got {version}"):
                log.append(version, 1, [])
        append(log, 2)
        assert log.last == 2

    def test_arrays_are_appended_as_they_lie_in_memory(self, opened: Opener) -> None:
        rows = np.arange(6, dtype=np.float32).reshape(2, 3)
        empty = np.empty((0, 4), np.float32)
        log = opened()
        log.append(1, 1, [b"ab", rows, empty, rows[1]])
        log.sync(1)
        assert log.read(0) == [Frame(1, 1, memoryview(b"ab" + rows.tobytes() + rows[1].tobytes()))]
        with pytest.raises(TypeError):
            log.append(2, 1, [rows[:, 1]])
        assert (log.last, log.backlog) == (1, 0)

    def test_a_large_payload_reaches_the_system_call_without_a_copy(self, opened: Opener) -> None:
        addresses = set()

        def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            addresses.update(np.frombuffer(each, np.uint8).ctypes.data for each in buffers)
            return os.pwritev(fd, buffers, offset)

        log = opened(disk=Disk(pwritev=pwritev))
        rows = np.zeros(100_000, np.float32)
        log.append(1, 1, [b"head", rows])
        log.sync(1)
        assert rows.ctypes.data in addresses

    def test_a_record_of_more_than_four_gigabytes_is_refused(self, opened: Opener) -> None:
        with pytest.raises(ValueError, match="a record may have at most 4294967295 bytes"):
            opened().reserve(1 << 32)

    def test_room_for_several_records_is_reserved_at_once(self, opened: Opener) -> None:
        calls: list[int] = []

        def fallocate(fd: int, offset: int, size: int) -> None:
            calls.append(size)
            os.posix_fallocate(fd, offset, size)

        log = opened(disk=Disk(posix_fallocate=fallocate))
        log.reserve(3000, 3000, 100_000)
        before = list(calls)
        for version, size in ((1, 3000), (2, 3000), (3, 100_000)):
            log.append(version, 1, [payload(version, size)])
        log.sync(3)
        assert calls[: len(before)] == before
        assert calls[len(before) :] in ([], [SMALL])  # the one prepared behind them
        assert [each.payload.nbytes for each in everything(log)] == [3000, 3000, 100_000]


class TestGroupCommit:
    def test_what_was_appended_meanwhile_is_written_at_once_and_synced_once(
        self, opened: Opener
    ) -> None:
        gate, disk = gated("pwritev", "fdatasync")
        log = opened(disk=disk, segment_bytes=1 << 20, sync_seconds=60)
        close_gate(gate)
        append(log, 1)
        assert gate.reached.wait(10)
        append(log, *range(2, 101))
        assert (log.written, log.durable) == (0, 0)
        assert log.backlog == 100 * frame_bytes(100)
        assert log.memory == log.backlog + 100 * RECORD_MEMORY
        waits = [threading.Event() for _ in range(100)]
        for version, each in enumerate(waits, 1):
            log.wait(version, False, each.set)
        gate.open.set()
        assert all(each.wait(10) for each in waits)
        assert gate.calls == [("pwritev", 1), ("pwritev", 99)]
        assert (log.written, log.durable, log.backlog) == (100, 0, 0)
        log.sync(100)
        assert [call for call, _ in gate.calls[2:]] == ["fdatasync", "pwritev"]  # and the mark

    def test_writing_goes_on_while_a_sync_takes_long(self, opened: Opener) -> None:
        gate, disk = gated("fdatasync")
        log = opened(disk=disk, sync_seconds=60)
        close_gate(gate)
        done = threading.Event()
        append(log, 1)
        log.wait(1, True, done.set)
        assert gate.reached.wait(10)
        written = threading.Event()
        append(log, 2)
        log.wait(2, False, written.set)
        assert written.wait(10)
        assert (log.written, log.durable, done.is_set()) == (2, 0, False)
        gate.open.set()
        assert done.wait(10)
        assert log.durable == 1
        log.sync(2)

    def test_waiters_are_called_once_each_in_the_order_of_versions(self, opened: Opener) -> None:
        log = opened(segment_bytes=1 << 20)
        order = list(range(1, 301))
        random.Random(1).shuffle(order)
        called: list[int] = []
        for version in order:
            log.wait(version, True, lambda version=version: called.append(version))  # type: ignore[misc]
        append(log, *range(1, 301))
        log.sync(300)
        log.close()
        assert called == list(range(1, 301))

    @pytest.mark.parametrize("durable", [False, True])
    def test_who_waits_for_what_is_there_is_called_at_once(
        self, opened: Opener, durable: bool
    ) -> None:
        log = opened()
        append(log, 1)
        log.sync(1)
        threads: list[threading.Thread] = []
        log.wait(1, durable, lambda: threads.append(threading.current_thread()))
        assert threads == [threading.current_thread()]

    def test_records_are_synced_in_time_though_nobody_waits(self, opened: Opener) -> None:
        woken = threading.Event()
        log = opened(sync_seconds=0.05, wake=woken.set)
        start = time.monotonic()
        append(log, 1)
        assert woken.wait(10)
        assert log.durable == 1
        assert time.monotonic() - start >= 0.04

    def test_who_waits_for_durable_does_not_wait_for_the_flush(self, opened: Opener) -> None:
        log = opened(sync_seconds=60)
        append(log, 1)
        start = time.monotonic()
        log.sync(1)
        done = threading.Event()
        append(log, 2)
        log.wait(2, True, done.set)
        assert done.wait(10)
        assert time.monotonic() - start < 10

    def test_threads_that_have_nothing_to_do_sleep(self, opened: Opener) -> None:
        log = opened()
        append(log, 1)
        log.sync(1)
        time.sleep(0.05)

        def switches() -> list[str]:
            tasks = [log._thread.native_id, log._syncer.native_id]
            status = [Path(f"/proc/self/task/{task}/status").read_text() for task in tasks]
            return [line for text in status for line in text.splitlines() if "ctxt" in line]

        before = switches()
        time.sleep(0.3)
        assert switches() == before

    def test_sync_asks_only_for_what_was_appended(self, opened: Opener) -> None:
        log = opened()
        append(log, 1)
        log.sync(0)
        with pytest.raises(ValueError, match="version 2: the newest appended version is 1"):
            log.sync(2)

    def test_close_syncs_everything_and_twice_does_no_harm(self, opened: Opener) -> None:
        log = opened(sync_seconds=60)
        called: list[int] = []
        append(log, *range(1, 200))
        log.wait(199, True, lambda: called.append(199))
        log.wait(200, True, lambda: called.append(200))
        log.close()
        log.close()
        assert (called, log.durable) == ([199], 199)
        with pytest.raises(ValueError, match="cannot sync version 200"):
            log.sync(200)


@alone
def test_a_closed_log_leaves_no_descriptor_thread_or_spare(directory: Path) -> None:
    descriptors, threads = os.listdir("/proc/self/fd"), threading.enumerate()
    log = VersionLog.open(directory, fail=refuse, wake=lambda: None, segment_bytes=SMALL)
    append(log, *range(1, 100))
    log.close()
    assert os.listdir("/proc/self/fd") == descriptors
    assert threading.enumerate() == threads
    assert not [each for each in files(directory) if each.endswith(".spare")]
