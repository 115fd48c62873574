"""The version log on a disk that fails or is full: nobody is acknowledged wrongly."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
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
)

from storage.disk import Disk
from storage.errors import DiskFull, LogFailed


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
