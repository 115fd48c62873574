"""Cursors: records in order, without a gap, while the log is written and truncated."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import pytest
from logs import (
    Opener,
    append,
    everything,
    files,
    frame,
    gated,
    name,
)

from storage.disk import Disk
from storage.errors import Compacted, Corrupt, LogFailed
from storage.segment import HEADER, frame_bytes
from storage.versionlog import VersionLog


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
        with pytest.raises(Corrupt, match="the log file is missing"):
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
