"""The version log: nothing acknowledged is lost, and nothing lost is passed over in silence."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.disk import Disk
from storage.errors import Compacted, Corrupt, DiskFull, LogFailed, UnknownFormat
from storage.marks import SLOT
from storage.segment import HEADER, Frame, Header, frame_bytes
from storage.versionlog import RECORD_MEMORY, VersionLog

LINEAGE = bytes(range(16))
SMALL = HEADER.size + 30 * frame_bytes(100)  # bytes of a segment


def payload(version: int, size: int = 100) -> bytes:
    return random.Random(version).randbytes(size)


def frame(version: int, size: int = 100) -> Frame:
    return Frame(version, 1 + version % 5, memoryview(payload(version, size)))


def append(log: VersionLog, *versions: int, size: int = 100) -> None:
    for version in versions:
        whole = payload(version, size)
        log.reserve(size)
        log.append(version, 1 + version % 5, [whole[:7], memoryview(whole)[7:], b""])


def everything(log: VersionLog, after: int | None = None, **options: Any) -> list[Frame]:
    with contextlib.closing(log.cursor(log.first - 1 if after is None else after)) as cursor:
        return [each for batch in iter(lambda: cursor.read(**options), []) for each in batch]


def files(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def name(first: int) -> str:
    return f"{first:020}.log"


def refuse(error: Exception) -> None:
    raise AssertionError("the log failed") from error


Opener = Callable[..., VersionLog]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def opened(directory: Path) -> Iterator[Opener]:
    """Opens logs and closes what the test leaves open."""
    logs: list[VersionLog] = []

    def make(where: Path = directory, **options: Any) -> VersionLog:
        defaults: dict[str, Any] = {"fail": refuse, "wake": lambda: None, "segment_bytes": SMALL}
        logs.append(VersionLog.open(where, **(defaults | options)))
        return logs[-1]

    yield make
    for log in logs:
        with contextlib.suppress(LogFailed):
            log.close()


def build(directory: Path, count: int, *, size: int = 100, step: int = 1, **options: Any) -> None:
    """A stopped log of versions 1..count, synced every ``step`` versions."""
    options = {"segment_bytes": SMALL, "lineage": LINEAGE} | options
    log = VersionLog.open(directory, fail=refuse, wake=lambda: None, **options)
    for version in range(1, count + 1):
        append(log, version, size=size)
        if version % step == 0:
            log.sync(version)
    log.close()


class Gate:
    """System calls that wait to be let through, or fail."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.calls: list[tuple[str, int]] = []
        self.error: OSError | None = None

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return int(self.through("pwritev", len(buffers), lambda: os.pwritev(fd, buffers, offset)))

    def fdatasync(self, fd: int) -> None:
        self.through("fdatasync", 0, lambda: os.fdatasync(fd))

    def fsync(self, fd: int) -> None:
        self.through("fsync", 0, lambda: os.fsync(fd))

    def through(self, call: str, count: int, do: Callable[[], Any]) -> Any:
        self.calls.append((call, count))
        self.reached.set()
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        return do()


def gated(*names: str) -> tuple[Gate, Disk]:
    """A gate that is open, before the named calls."""
    gate = Gate()
    gate.open.set()
    return gate, Disk(**{each: getattr(gate, each) for each in names})


def close_gate(gate: Gate) -> None:
    gate.open.clear()
    gate.reached.clear()
    gate.calls.clear()


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
            with pytest.raises(ValueError, match=f"version {version} appended after version 1"):
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
        with pytest.raises(ValueError, match="a record takes at most 4294967295 bytes"):
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
        with pytest.raises(ValueError, match="version 2 awaited, 1 is the newest appended"):
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
        with pytest.raises(ValueError, match="awaited"):
            log.sync(200)

    def test_a_closed_log_leaves_no_descriptor_thread_or_spare(
        self, opened: Opener, directory: Path
    ) -> None:
        descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        log = opened()
        append(log, *range(1, 100))
        log.close()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert threading.active_count() == threads
        assert not [each for each in files(directory) if each.endswith(".spare")]


class TestFailure:
    @pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
    def test_a_failing_disk_stops_the_log_and_acknowledges_nobody(
        self, opened: Opener, call: str
    ) -> None:
        gate, disk = gated(call)
        failures: list[Exception] = []
        failed, called = threading.Event(), list[str]()

        def fail(error: Exception) -> None:
            failures.append(error)
            failed.set()

        log = opened(disk=disk, fail=fail, sync_seconds=60, wake=lambda: called.append("wake"))
        append(log, 1)
        log.sync(1)
        called.clear()
        gate.error = OSError(errno.EIO, "the disk is gone")
        append(log, 2)
        log.wait(2, True, lambda: called.append("durable"))
        log.wait(3, False, lambda: called.append("written"))
        assert failed.wait(10)
        log.append(3, 1, [b"x"])  # after a reserve that came before the failure
        gate.error = None  # the disk is well again: it is not asked
        log.wait(2, True, lambda: called.append("durable"))
        log.wait(2, False, lambda: called.append("written"))
        for act in (lambda: log.sync(2), lambda: log.reserve(1), log.close):
            with pytest.raises(LogFailed, match="the disk is gone"):
                act()
        assert (called, log.durable, len(failures)) == ([], 1, 1)
        reopened = opened()
        assert 1 <= reopened.last <= 2
        assert everything(reopened) == [frame(1), frame(2)][: reopened.last]

    def test_a_sync_that_is_under_way_when_the_disk_fails_is_not_left_waiting(
        self, opened: Opener
    ) -> None:
        gate, disk = gated("fdatasync")
        log = opened(disk=disk, fail=lambda error: None)
        close_gate(gate)
        gate.error = OSError(errno.EIO, "the disk is gone")
        append(log, 1)
        errors: list[Exception] = []

        def checkpoint() -> None:
            try:
                log.sync(1)
            except LogFailed as error:
                errors.append(error)

        threads = [threading.Thread(target=checkpoint) for _ in range(3)]
        for each in threads:
            each.start()
        assert gate.reached.wait(10)
        gate.open.set()
        for each in threads:
            each.join(10)
        assert [str(each) for each in errors] == 3 * [
            "the version log has failed: [Errno 5] the disk is gone"
        ]

    @pytest.mark.parametrize("call", ["pwritev", "fdatasync", "fsync"])
    @pytest.mark.parametrize("after", range(4))
    def test_a_failure_while_changing_segments_loses_nothing_durable(
        self, opened: Opener, call: str, after: int
    ) -> None:
        """The calls of a roll, one failing after the other."""
        gate, disk = gated(call)
        failed = threading.Event()
        log = opened(disk=disk, fail=lambda error: failed.set(), sync_seconds=60)
        append(log, 1, 2, size=1500)
        log.sync(2)
        left = [after]
        real = gate.through

        def through(kind: str, count: int, do: Callable[[], Any]) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "the disk is gone")
            return real(kind, count, do)

        gate.through = through  # type: ignore[method-assign]
        with contextlib.suppress(LogFailed):
            append(log, 3, 4, 5, 6, size=1500)
            log.sync(6)
        durable = log.durable
        with contextlib.suppress(LogFailed):
            log.close()
        reopened = opened()
        assert durable <= reopened.last
        assert everything(reopened) == [frame(v, 1500) for v in range(1, reopened.last + 1)]

    def test_a_waiter_that_raises_is_a_failure_of_the_log(self, opened: Opener) -> None:
        failures: list[Exception] = []
        failed = threading.Event()

        def fail(error: Exception) -> None:
            failures.append(error)
            failed.set()

        log = opened(fail=fail)
        log.wait(1, False, lambda: 1 // 0)
        append(log, 1)
        assert failed.wait(10)
        assert [type(each) for each in failures] == [ZeroDivisionError]

    def test_partial_writes_are_completed(self, opened: Opener) -> None:
        def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            return os.pwrite(fd, b"".join(buffers)[:333], offset)

        log = opened(disk=Disk(pwritev=pwritev))
        append(log, *range(1, 40), size=700)
        log.close()
        assert everything(opened()) == [frame(version, 700) for version in range(1, 40)]


class TestFullDisk:
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_a_full_disk_refuses_a_record_and_changes_nothing(
        self, opened: Opener, directory: Path, code: int
    ) -> None:
        full = False

        def fallocate(fd: int, offset: int, size: int) -> None:
            if full:
                os.ftruncate(fd, offset + size // 2)
                raise OSError(code, os.strerror(code))
            os.posix_fallocate(fd, offset, size)

        log = opened(disk=Disk(posix_fallocate=fallocate))
        full = True
        append(log, 1, size=2500)
        for _ in range(3):
            with pytest.raises(DiskFull) as caught:
                append(log, 2, size=2500)
            assert (caught.value.directory, caught.value.wanted) == (str(directory), SMALL)
        append(log, 2, size=1000)  # the segment has room for this one
        log.sync(2)
        assert everything(log) == [frame(1, 2500), frame(2, 1000)]
        assert files(directory) == [name(1), "SYNCED"]
        full = False
        append(log, 3, size=2500)
        log.close()
        assert everything(opened()) == [frame(1, 2500), frame(2, 1000), frame(3, 2500)]

    def test_a_spare_that_cannot_grow_stays(self, opened: Opener, directory: Path) -> None:
        def fallocate(fd: int, offset: int, size: int) -> None:
            if offset + size > 2 * SMALL:
                os.ftruncate(fd, offset + size // 2)
                raise OSError(errno.ENOSPC, "full")
            os.posix_fallocate(fd, offset, size)

        log = opened(disk=Disk(posix_fallocate=fallocate))
        append(log, 1, size=3500)
        log.reserve(2000)
        (spare,) = directory.glob("*.spare")
        with pytest.raises(DiskFull):
            log.reserve(3 * SMALL)
        assert spare.stat().st_size == SMALL
        append(log, 2, size=2000)
        log.close()
        assert everything(opened()) == [frame(1, 3500), frame(2, 2000)]

    def test_a_log_that_has_no_room_to_begin_is_refused_whole(
        self, opened: Opener, directory: Path
    ) -> None:
        def fallocate(fd: int, offset: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        with pytest.raises(DiskFull):
            opened(disk=Disk(posix_fallocate=fallocate))
        assert files(directory) == []
        assert opened().last == 0

    def test_a_full_file_system_refuses_and_recovers(self, opened: Opener, tmp_path: Path) -> None:
        mount = tmp_path / "disk"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small tmpfs needs root")
        try:
            log, version = opened(mount / "log", segment_bytes=64 << 10), 1
            with contextlib.suppress(DiskFull):
                for version in range(1, 1000):
                    append(log, version, size=1000)
            assert version < 300
            log.sync(version - 1)
            assert version > 100
            expected = [frame(each, 1000) for each in range(1, version)]
            assert everything(log) == expected
            assert log.truncate(version - 1) > 0
            append(log, version, size=1000)
            log.sync(version)
            first = log.first
            log.close()
            log = opened(mount / "log", segment_bytes=64 << 10)
            assert everything(log) == [*expected, frame(version, 1000)][first - 1 :]
            log.close()
        finally:
            subprocess.run(["umount", str(mount)], check=True)


class TestCursor:
    def test_only_what_is_durable_is_read_unless_asked(self, opened: Opener) -> None:
        log = opened(sync_seconds=60)
        append(log, 1, 2)
        log.sync(2)
        append(log, 3, 4)
        done = threading.Event()
        log.wait(4, False, done.set)
        assert done.wait(10)
        assert log.read(0) == [frame(1), frame(2)]
        assert log.read(0, upto=3) == [frame(1), frame(2), frame(3)]
        assert log.read(1, upto=99) == [frame(2), frame(3), frame(4)]
        assert log.read(2) == log.read(4, upto=99) == log.read(77, upto=99) == []

    def test_a_read_stops_at_its_bytes_but_returns_one_frame_at_least(self, opened: Opener) -> None:
        log = opened(segment_bytes=1 << 20)
        append(log, *range(1, 11))
        log.sync(10)
        with contextlib.closing(log.cursor(0)) as cursor:
            two = frame_bytes(100) + 1
            counts = [len(cursor.read(max_bytes=size)) for size in (1, two, 0, two - 1, 1 << 20)]
        assert counts == [1, 2, 1, 1, 5]

    @pytest.mark.parametrize("size", [10, 3000])
    def test_a_cursor_begins_anywhere(self, opened: Opener, size: int) -> None:
        log = opened(segment_bytes=1 << 20)
        for version in range(1, 1001):
            append(log, version, size=size)
            if version % 50 == 0:
                log.sync(version)
        for again in range(2):
            for after in (0, 1, 349, 350, 500, 777, 998, 999):
                assert log.read(after, max_bytes=1) == [frame(after + 1, size)]
            if not again:
                log.close()
                log = opened(segment_bytes=1 << 20)

    def test_a_cursor_that_waits_at_the_end_goes_on(self, opened: Opener) -> None:
        log = opened()
        with contextlib.closing(log.cursor(0)) as cursor:
            for version in range(1, 150):
                assert cursor.read() == []
                append(log, version)
                log.sync(version)
                assert cursor.read() == [frame(version)]
                assert cursor.after == version

    def test_readers_beside_a_writer_see_every_version_once(self, opened: Opener) -> None:
        log, count = opened(segment_bytes=64 << 10, sync_seconds=0.002), 3000
        sizes = [v * 37 % 700 for v in range(count + 1)]
        wrong: list[str] = []

        def follow(written: bool) -> None:
            seen = 0
            with contextlib.closing(log.cursor(0)) as cursor:
                while seen < count:
                    for each in cursor.read(upto=log.written if written else None):
                        seen += 1
                        if each != frame(seen, sizes[seen]):
                            wrong.append(f"{each.version} where {seen} should be")
                            return
                    time.sleep(0.001)

        readers = [threading.Thread(target=follow, args=(i % 2 == 0,)) for i in range(3)]
        for each in readers:
            each.start()
        for version in range(1, count + 1):
            append(log, version, size=sizes[version])
        for each in readers:
            each.join(30)
        assert wrong == []
        assert not any(each.is_alive() for each in readers)

    def test_damage_is_found_by_reading(self, opened: Opener, directory: Path) -> None:
        log = opened()
        append(log, *range(1, 101))
        log.sync(100)
        with (directory / name(1)).open("r+b") as file:
            file.seek(HEADER.size + frame_bytes(100) + 50)
            file.write(b"\xff\0\xff")
        with contextlib.closing(log.cursor(0)) as cursor:
            assert cursor.read() == [frame(1)]
            for _ in range(2):
                with pytest.raises(Corrupt) as caught:
                    cursor.read()
        at = HEADER.size + frame_bytes(100)
        assert caught.value.where == f"{directory / name(1)} at byte {at}"

    def test_a_segment_that_somebody_removed_is_corrupt(
        self, opened: Opener, directory: Path
    ) -> None:
        log = opened()
        append(log, *range(1, 101))
        log.sync(100)
        (directory / name(1)).unlink()
        with pytest.raises(Corrupt, match="is gone"):
            log.read(0)


class TestCut:
    @pytest.fixture
    def log(self, opened: Opener) -> VersionLog:
        """Segments of versions 1..30, 31..60, 61..90 and 91..100."""
        log = opened()
        append(log, *range(1, 101))
        log.sync(100)
        return log

    def firsts(self, directory: Path) -> list[int]:
        return [int(each[:20]) for each in files(directory) if each.endswith(".log")]

    @pytest.mark.parametrize(
        ("version", "left"),
        [
            (0, [1, 31, 61, 91]),
            (29, [1, 31, 61, 91]),
            (30, [31, 61, 91]),
            (89, [61, 91]),
            (90, [91]),
            (100, [91]),
        ],
    )
    def test_whole_segments_below_the_version_go(
        self, log: VersionLog, directory: Path, version: int, left: list[int], opened: Opener
    ) -> None:
        size = HEADER.size + 30 * frame_bytes(100)
        assert log.truncate(version) == (4 - len(left)) * size
        assert self.firsts(directory) == left
        assert log.first == left[0]
        expected = [frame(each) for each in range(left[0], 101)]
        assert everything(log) == expected
        if left[0] > 1:
            with pytest.raises(Compacted) as caught:
                log.read(left[0] - 2)
            assert caught.value.first == left[0]
        log.close()
        reopened = opened()
        assert (reopened.first, reopened.last) == (left[0], 100)
        assert everything(reopened) == expected

    def test_the_newest_bytes_are_kept(self, log: VersionLog, directory: Path) -> None:
        size, rest = HEADER.size + 30 * frame_bytes(100), HEADER.size + 10 * frame_bytes(100)
        for keep, left in (
            (3 * size + rest, [1, 31, 61, 91]),
            (2 * size + rest + 1, [1, 31, 61, 91]),
            (2 * size + rest, [31, 61, 91]),
            (rest + 1, [61, 91]),
            (rest, [91]),
            (0, [91]),
        ):
            log.truncate(100, keep_bytes=keep)
            assert self.firsts(directory) == left

    def test_what_was_written_lately_is_kept(self, opened: Opener, directory: Path) -> None:
        now = time.time()
        log = opened(clock=lambda: now)
        append(log, *range(1, 101))
        log.sync(100)
        for first, age in ((1, 300), (31, 200), (61, 100)):
            os.utime(directory / name(first), (now - age, now - age))
        for keep, left in ((301, [1, 31, 61, 91]), (250, [31, 61, 91]), (150, [61, 91])):
            log.truncate(100, keep_seconds=keep)
            assert self.firsts(directory) == left
        log.truncate(60, keep_seconds=1)
        assert self.firsts(directory) == [61, 91]
        log.truncate(100, keep_seconds=99)
        assert self.firsts(directory) == [91]

    def test_a_cursor_reads_its_cut_segment_to_the_end_and_then_says_compacted(
        self, log: VersionLog
    ) -> None:
        with contextlib.closing(log.cursor(0)) as inside, contextlib.closing(log.cursor(0)) as out:
            assert inside.read(max_bytes=1) == [frame(1)]
            log.truncate(60)
            assert inside.read() == [frame(version) for version in range(2, 31)]
            for cursor in (inside, out):
                with pytest.raises(Compacted) as caught:
                    cursor.read()
                assert caught.value.first == 61

    def test_cursors_beside_a_cut_have_no_gap(self, opened: Opener) -> None:
        log, wrong, done = opened(sync_seconds=0.001), list[str](), threading.Event()

        def follow() -> None:
            cursor = log.cursor(0)
            while not done.is_set() or cursor.after < log.durable:
                try:
                    for each in cursor.read():
                        if each != frame(each.version):
                            wrong.append(f"version {each.version}")
                except Compacted as error:
                    if error.first <= cursor.after + 1:
                        wrong.append(f"compacted to {error.first} at {cursor.after}")
                    cursor.close()
                    cursor = log.cursor(log.first - 1)
                except Exception as error:
                    wrong.append(repr(error))
                    break
                time.sleep(0.0005)
            cursor.close()

        readers = [threading.Thread(target=follow) for _ in range(2)]
        for each in readers:
            each.start()
        for version in range(1, 2001):
            append(log, version)
            if version % 40 == 0:
                log.sync(version)
                log.truncate(version - 50)
        log.sync(2000)
        done.set()
        for each in readers:
            each.join(20)
        assert wrong == []

    @pytest.mark.parametrize("call", ["fsync", "unlink"])
    def test_a_cut_that_may_come_back_in_part_is_a_failure_of_the_log(
        self, opened: Opener, directory: Path, call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else the next cut leaves a gap behind what comes back, and the next start refuses it."""
        failures: list[Exception] = []
        gate, disk = gated("fsync")
        log = opened(disk=disk, fail=failures.append)
        append(log, *range(1, 101))
        log.sync(100)
        with monkeypatch.context() as patch:
            if call == "unlink":
                patch.setattr(Path, "unlink", lambda _: gate.through("unlink", 0, lambda: None))
            gate.error = OSError(errno.EIO, "the disk is gone")
            with pytest.raises(LogFailed, match="the disk is gone"):
                log.truncate(100)
        gate.error = None
        assert [str(each) for each in failures] == ["[Errno 5] the disk is gone"]
        with pytest.raises(LogFailed):
            log.reserve(1)
        with pytest.raises(LogFailed):
            log.close()
        reopened = opened()
        assert everything(reopened) == [frame(each) for each in range(reopened.first, 101)]

    def test_the_directory_is_synced_after_each_segment_that_goes(
        self, opened: Opener, directory: Path
    ) -> None:
        seen: list[list[int]] = []

        def fsync(fd: int) -> None:
            seen.append(self.firsts(directory))
            os.fsync(fd)

        log = opened(disk=Disk(fsync=fsync))
        append(log, *range(1, 101))
        log.sync(100)
        seen.clear()
        log.truncate(100)
        assert seen == [[31, 61, 91], [61, 91], [91]]


class TestRecovery:
    def test_a_restart_keeps_lineage_and_goes_on(self, opened: Opener, directory: Path) -> None:
        build(directory, 40)
        log = opened(lineage=LINEAGE, after=25)
        assert (log.lineage, log.first, log.last) == (LINEAGE, 1, 40)
        append(log, *range(41, 100))
        log.close()
        assert everything(opened()) == [frame(version) for version in range(1, 100)]

    def test_a_log_may_begin_after_a_base(self, opened: Opener, directory: Path) -> None:
        log = opened(lineage=LINEAGE, after=500)
        assert (log.lineage, log.first, log.last, log.durable) == (LINEAGE, 501, 500, 500)
        append(log, 501)
        log.close()
        assert files(directory) == [name(501), "SYNCED"]
        log = opened(after=500)
        assert everything(log) == [frame(501)]

    def test_a_base_beyond_the_log_or_before_it_is_refused(
        self, opened: Opener, directory: Path
    ) -> None:
        log = opened()
        append(log, *range(1, 101))
        log.sync(100)
        log.truncate(60)
        log.close()
        for after in (59, 101):
            with pytest.raises(Corrupt) as caught:
                opened(after=after)
            assert str(caught.value) == (
                f"{directory}: versions 61 to 100, but the base stands at version {after}"
            )
        for after in (60, 100):
            opened(after=after).close()

    def test_another_lineage_is_refused(self, opened: Opener, directory: Path) -> None:
        build(directory, 5)
        with pytest.raises(Corrupt) as caught:
            opened(lineage=bytes(16))
        assert str(caught.value) == (
            f"{directory / name(1)}: of lineage {LINEAGE.hex()}, not of {bytes(16).hex()}"
        )
        with pytest.raises(ValueError, match="a lineage has 16 bytes, not 3"):
            opened(directory.with_name("other"), lineage=b"abc")

    def test_a_segment_of_another_log_is_refused(self, opened: Opener, directory: Path) -> None:
        build(directory, 70)
        other = directory.with_name("other")
        build(other, 70, lineage=bytes(16))
        shutil.copy(other / name(31), directory / name(31))
        with pytest.raises(Corrupt, match="of lineage 0000"):
            opened()

    def test_another_format_is_refused_by_name(
        self, opened: Opener, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(directory, 5)
        monkeypatch.setattr("storage.segment.FORMAT", 2)
        header = Header(lineage=LINEAGE, first=1, previous=0).encode()
        monkeypatch.undo()
        with (directory / name(1)).open("r+b") as file:
            file.write(header)
        with pytest.raises(UnknownFormat, match="written in format 2, this release reads 1"):
            opened()

    @pytest.mark.parametrize(
        ("gone", "why"),
        [
            ([31], f"{name(61)}: follows segment 31, but 1 is before it"),
            ([31, 61], f"{name(91)}: follows segment 61, but 1 is before it"),
            ([91], f"segment {name(91)} is gone, and it was synced"),
            ([1, 31, 61, 91], "no segment is left of a log that was synced"),
        ],
    )
    def test_a_missing_segment_is_noticed(
        self, opened: Opener, directory: Path, gone: list[int], why: str
    ) -> None:
        build(directory, 100)
        for first in gone:
            (directory / name(first)).unlink()
        with pytest.raises(Corrupt) as caught:
            opened()
        assert str(caught.value).endswith(why)

    def test_a_segment_under_another_name_is_noticed(self, opened: Opener, directory: Path) -> None:
        build(directory, 100)
        (directory / name(91)).rename(directory / name(92))
        with pytest.raises(Corrupt, match="begins with version 91, says its header"):
            opened()

    def test_leftover_spares_are_removed_and_strangers_are_not(
        self, opened: Opener, directory: Path
    ) -> None:
        build(directory, 5)
        (directory / "00000000000000000001.spare").write_bytes(bytes(100))
        (directory / "notes.txt").write_text("mine")
        assert opened().last == 5
        assert files(directory) == [name(1), "SYNCED", "notes.txt"]

    def test_versions_that_do_not_follow_each_other_are_refused(
        self, opened: Opener, directory: Path
    ) -> None:
        """A whole frame is cut out of the middle, and the mark is gone."""
        build(directory, 20, step=100)
        whole = bytearray((directory / name(1)).read_bytes())
        start = HEADER.size + 7 * frame_bytes(100)
        del whole[start : start + frame_bytes(100)]
        (directory / name(1)).write_bytes(whole)
        (directory / "SYNCED").unlink()
        with pytest.raises(Corrupt, match=f"byte {start}: a frame of version 9 instead of 8"):
            opened()

    def test_a_frame_missing_at_the_end_of_a_middle_segment_is_found_by_replay(
        self, opened: Opener, directory: Path
    ) -> None:
        build(directory, 100)
        os.truncate(directory / name(31), HEADER.size + 29 * frame_bytes(100))
        log = opened()
        with contextlib.closing(log.cursor(0)) as cursor:
            while cursor.after < 59:
                cursor.read()
            with pytest.raises(Corrupt, match="0 bytes left, the next frame takes 32"):
                cursor.read()

    def test_the_mark_file_may_be_missing_or_empty_but_not_rotten(
        self, opened: Opener, directory: Path
    ) -> None:
        expected = [frame(version) for version in range(1, 41)]
        build(directory, 40)
        synced = directory / "SYNCED"
        for content in (None, b"", bytes(100), bytes(2 * SLOT)):
            synced.unlink()
            if content is not None:
                synced.write_bytes(content)
            log = opened()
            assert everything(log) == expected
            log.close()
        good = synced.read_bytes()
        for slot in (0, 1):  # one good mark is enough
            bad = bytearray(good)
            bad[slot * SLOT] ^= 1
            synced.write_bytes(bad)
            log = opened()
            assert everything(log) == expected
            log.close()
        bad = bytearray(good)
        bad[0] ^= 1
        bad[SLOT] ^= 1
        synced.write_bytes(bad)
        with pytest.raises(Corrupt, match="SYNCED: no mark in it has the right checksum"):
            opened()

    def test_bytes_that_were_erased_never_come_back(self, opened: Opener, directory: Path) -> None:
        """A power failure keeps records 12 to 20 but loses 11; a later 11 must not revive them."""
        build(directory, 20, step=100, sync_seconds=60)
        start = HEADER.size + 10 * frame_bytes(100)
        with (directory / name(1)).open("r+b") as file:
            file.seek(start)
            file.write(bytes(frame_bytes(100)))
        (directory / "SYNCED").unlink()
        log = opened()
        assert (log.last, log.torn_bytes) == (10, 9 * frame_bytes(100) + frame_bytes(100) - 4)
        log.append(11, 1, [bytes(100)])
        log.close()
        log = opened()
        assert (log.last, log.torn_bytes) == (11, 0)
        assert log.read(10) == [Frame(11, 1, memoryview(bytes(100)))]

    def test_damage_among_synced_records_is_told_without_any_mark(
        self, opened: Opener, directory: Path
    ) -> None:
        build(directory, 20, step=5)
        start = HEADER.size + 10 * frame_bytes(100)
        with (directory / name(1)).open("r+b") as file:
            file.seek(start + 40)
            file.write(b"rotten")
        (directory / "SYNCED").unlink()
        with pytest.raises(Corrupt) as caught:
            opened()
        assert caught.value.where == f"{directory / name(1)} at byte {start}"
        assert "and that is no torn tail" in caught.value.what


class TestBytes:
    """Every byte of a stopped log, changed or gone."""

    def test_a_last_record_cut_anywhere_is_torn_or_if_synced_damage(
        self, opened: Opener, tmp_path: Path
    ) -> None:
        good = tmp_path / "good"
        build(good, 3, step=100, sync_seconds=60)
        whole = (good / name(1)).read_bytes()
        start, end = (HEADER.size + count * frame_bytes(100) for count in (2, 3))
        expected = [frame(1), frame(2)]
        for cut in range(start, end - 4):  # four bytes of padding
            for content in (whole[:cut], whole[:cut] + bytes(len(whole) - cut)):
                where = tmp_path / "torn"
                shutil.copytree(good, where)
                (where / name(1)).write_bytes(content)
                with pytest.raises(Corrupt, match=f" at byte {start}: "):
                    opened(where)
                (where / "SYNCED").unlink()
                log = opened(where)
                assert (log.last, log.torn_bytes) == (2, len(content[start:].rstrip(b"\0")))
                if cut % 16 == 0:
                    assert everything(log) == expected
                    append(log, 3, 4)
                    log.close()
                    log = opened(where)
                    assert everything(log) == [*expected, frame(3), frame(4)]
                log.close()
                shutil.rmtree(where)

    @pytest.mark.slow
    def test_every_flipped_byte_is_noticed_or_does_not_matter(
        self, opened: Opener, tmp_path: Path
    ) -> None:
        """Thousands of single flips over segments and marks. What may not be noticed is named."""
        dice = random.Random(2024)
        directory, size = tmp_path / "log", 61
        build(directory, 100, size=size, step=9)
        expected = [frame(version, size) for version in range(1, 101)]
        names = files(directory)
        held = {each: (directory / each).read_bytes() for each in names}
        last = names[-2]
        end = HEADER.size + frame_bytes(size) * (100 - int(last[:20]) + 1)
        noticed = quiet = 0
        flips, fast = 4000, Disk(fdatasync=lambda fd: None, fsync=lambda fd: None)
        for _ in range(flips):
            each = dice.choice([*names, last, last])
            at = dice.randrange(len(held[each]))
            with (directory / each).open("r+b") as file:
                file.seek(at)
                file.write(bytes([held[each][at] ^ 1 << dice.randrange(8)]))
            try:
                log = opened(directory, disk=fast)
                try:
                    assert everything(log) == expected
                finally:
                    log.close()
            except Corrupt as error:
                noticed += each in error.where
            else:
                quiet += 1
                inside = (at - HEADER.size) % frame_bytes(size)
                padding = at >= HEADER.size and inside >= 32 + size
                assert each == "SYNCED" or padding or (each == last and at >= end)
            for changed in {each, last, "SYNCED"}:
                (directory / changed).write_bytes(held[changed])
        assert noticed + quiet == flips
        assert min(noticed, quiet) > flips // 20


WRITER = """
import sys, random
from pathlib import Path
from storage.versionlog import VersionLog

log = VersionLog.open(Path(sys.argv[1]), fail=print, wake=lambda: None, segment_bytes=1 << 16,
                      sync_seconds=0.003)
for version in range(log.last + 1, 1 << 30):
    size = version * 37 % 3000
    payload = random.Random(version).randbytes(size)
    log.reserve(size)
    log.append(version, 1 + version % 5, [payload])
    log.wait(version, False, lambda v=version: print(v, log.durable, flush=True))
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_it_acknowledged(
    opened: Opener, directory: Path
) -> None:
    dice, root = random.Random(7), Path(__file__).parents[2]
    written = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(dice.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        for line in lines[:-1]:  # the last may be cut
            written = max(written, int(line.split()[0]))
        log = opened()
        assert log.last >= written > 0
        log.close()
    log = opened()
    assert everything(log) == [frame(v, v * 37 % 3000) for v in range(1, log.last + 1)]
