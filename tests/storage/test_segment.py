"""Frames in a file: what is written is read, and nothing else ever is."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from alone import alone

from storage.disk import CHUNK, MAX_BUFFERS, Disk, erase, preallocate, write_all
from storage.errors import Corrupt, DiskFull, UnknownFormat
from storage.segment import (
    FRAME,
    HEADER,
    LARGE_CHUNK,
    MAX_VERSION,
    SMALL,
    Frame,
    Header,
    Reader,
    encode,
    frame_bytes,
)
from storage.tail import Tail, find_tail

LINEAGE = bytes(range(16))
HEAD = Header(lineage=LINEAGE, first=7, previous=3)


def payload(version: int, size: int) -> bytes:
    period = bytes((version * 31 + i * 7) % 255 + 1 for i in range(255))
    return (period * (size // 255 + 1))[:size]


def segment(
    sizes: Sequence[int], *, synced: Sequence[int] | None = None, zeros: int = 512
) -> tuple[bytes, list[int]]:
    """A segment's bytes, with records of ``sizes`` from version 7 on, and where each begins."""
    whole, starts = HEAD.encode(), []
    for i, size in enumerate(sizes):
        starts.append(len(whole))
        parts = [memoryview(payload(7 + i, size))]
        whole += b"".join(encode(HEAD.seed, 7 + i, synced[i] if synced else 6, 1 + i, parts, size))
    return whole + bytes(zeros), [*starts, len(whole)]


def frames(sizes: Sequence[int]) -> list[Frame]:
    return [Frame(7 + i, 1 + i, memoryview(payload(7 + i, s))) for i, s in enumerate(sizes)]


def tail(path: Path, synced_end: int = 0) -> Tail:
    reader = Reader(path)
    try:
        return find_tail(reader, path.stat().st_size, synced_end)
    finally:
        reader.close()


def read_all(path: Path, *, max_bytes: int = 1 << 30) -> list[Frame]:
    reader = Reader(path)
    try:
        return reader.read(MAX_VERSION, path.stat().st_size, max_bytes)
    finally:
        reader.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "00000000000000000007.log"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


class TestFormat:
    def test_a_header_is_these_bytes(self) -> None:
        fields = b"PSLOG\r\n\x1a\1\0\0\0\0\0\0\0" + LINEAGE + b"\7" + bytes(7) + b"\3"
        whole = fields + bytes(7)
        whole += xxhash.xxh3_64_intdigest(whole).to_bytes(8, "little")
        assert (HEAD.encode(), len(whole)) == (whole, HEADER.size)
        assert Header.decode(whole, "x") == HEAD

    @pytest.mark.parametrize("size", [3, SMALL + 3])
    def test_a_frame_is_these_bytes_joined_or_not(self, size: int) -> None:
        body = payload(9, size)
        head = size.to_bytes(4, "little") + b"\5\0\0\0\x09" + bytes(7) + b"\x08" + bytes(7)
        checksum = xxhash.xxh3_64_intdigest(head + body, HEAD.seed).to_bytes(8, "little")
        parts = [memoryview(body)[:2], memoryview(body)[2:]]
        buffers = encode(HEAD.seed, 9, 8, 5, parts, size)
        assert b"".join(buffers) == checksum + head + body + bytes(-size % 8)
        assert frame_bytes(size) == len(b"".join(buffers))

    def test_a_large_payload_is_not_copied(self) -> None:
        part = memoryview(bytes(SMALL + 1))
        assert encode(1, 1, 0, 1, [part], SMALL + 1)[1] is part

    def test_segments_of_other_lineages_or_versions_have_other_seeds(self) -> None:
        seeds = {
            Header(lineage=lineage, first=first, previous=0).seed
            for lineage in (LINEAGE, bytes(16))
            for first in (1, 2, 1 << 40)
        }
        assert len(seeds) == 6

    def test_every_bit_of_a_header_counts(self) -> None:
        whole = HEAD.encode()
        for bit in range(8 * len(whole)):
            bad = bytearray(whole)
            bad[bit // 8] ^= 1 << bit % 8
            with pytest.raises(Corrupt, match=r"^f at byte 0: "):
                Header.decode(bytes(bad), "f at byte 0")

    def test_a_header_cut_short_is_corrupt(self) -> None:
        for size in range(HEADER.size):
            with pytest.raises(Corrupt, match=f"of 56 bytes, got {size} bytes"):
                Header.decode(HEAD.encode()[:size], "f")

    def test_another_format_is_named_and_no_damage(self) -> None:
        whole = bytearray(HEAD.encode())
        whole[8] = 2
        whole[-8:] = xxhash.xxh3_64_intdigest(bytes(whole[:-8])).to_bytes(8, "little")
        with pytest.raises(UnknownFormat, match="f: written in format 2, but this release reads 1"):
            Header.decode(bytes(whole), "f")


class TestReader:
    @pytest.mark.parametrize("max_bytes", [1, 100, CHUNK, 1 << 30])
    def test_what_was_written_is_read(self, path: Path, max_bytes: int) -> None:
        sizes = [0, 1, 7, 8, 9, SMALL, SMALL + 1, CHUNK // 3, CHUNK, 3, CHUNK + 1, 40, 0]
        whole, starts = segment(sizes)
        path.write_bytes(whole)
        reader, got = Reader(path), []
        while reader.version < 7 + len(sizes):
            got += reader.read(6 + len(sizes), starts[-1], max_bytes)
        assert got == frames(sizes)
        assert reader.offset == starts[-1]
        reader.close()

    def test_payloads_are_aligned_and_read_only(self, path: Path) -> None:
        path.write_bytes(segment([8, 1, 24, CHUNK, 16])[0])
        reader = Reader(path)
        for frame in reader.read(11, path.stat().st_size, 1 << 30):
            array = np.frombuffer(frame.payload, np.uint8)
            assert array.ctypes.data % 8 == 0
            assert not array.flags.writeable
        reader.close()

    def test_equal_large_frames_are_read_without_reading_any_twice(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size, count = 600_000, 12
        whole, starts = segment([size] * count, zeros=0)
        path.write_bytes(whole)
        asked: list[int] = []
        pread = os.pread

        def counted(fd: int, size: int, offset: int) -> bytes:
            asked.append(size)
            return pread(fd, size, offset)

        reader = Reader(path)
        monkeypatch.setattr(os, "pread", counted)
        assert len(reader.read(6 + count, starts[-1], 1 << 30)) == count
        reader.close()
        assert sum(asked) <= starts[-1] + 2 * LARGE_CHUNK
        assert max(asked) <= LARGE_CHUNK

    def test_nothing_behind_the_end_or_above_the_version_is_returned(self, path: Path) -> None:
        whole, starts = segment([100] * 5)
        path.write_bytes(whole)
        reader = Reader(path)
        assert reader.read(8, starts[4], 1 << 20) == frames([100] * 5)[:2]
        assert reader.read(8, starts[4], 1 << 20) == []
        assert reader.read(10, starts[4], 1 << 20) == frames([100] * 5)[2:4]
        with pytest.raises(Corrupt, match="the next frame has 32 bytes, but 0 are left"):
            reader.read(11, starts[4], 1 << 20)
        assert reader.read(11, starts[5], 1 << 20) == frames([100] * 5)[4:]
        reader.close()

    @pytest.mark.parametrize("target", [7, 8, 15, 26])
    def test_skipping_leads_to_the_frame(self, path: Path, target: int) -> None:
        sizes = [10, 100_000, 20, 300] * 5
        path.write_bytes(segment(sizes)[0])
        reader = Reader(path)
        reader.skip(target, path.stat().st_size)
        assert reader.read(26, path.stat().st_size, 1 << 30) == frames(sizes)[target - 7 :]
        reader.close()

    def test_skipping_beyond_the_last_frame_is_corrupt(self, path: Path) -> None:
        whole, starts = segment([10, 10])
        path.write_bytes(whole)
        reader = Reader(path)
        with pytest.raises(Corrupt) as caught:
            reader.skip(10, len(whole))
        assert (
            str(caught.value)
            == f"{path} at byte {starts[2]}: expected a frame of version 9, found none"
        )
        reader.close()

    def test_the_good_frames_before_a_bad_one_come_first(self, path: Path) -> None:
        whole, starts = segment([50, 50, 50])
        bad = bytearray(whole)
        bad[starts[2] + FRAME.size + 5] ^= 1
        path.write_bytes(bad)
        reader = Reader(path)
        assert reader.read(9, len(bad), 1 << 20) == frames([50, 50])
        for _ in range(2):  # and it stays
            with pytest.raises(Corrupt) as caught:
                reader.read(9, len(bad), 1 << 20)
            assert str(caught.value) == (
                f"{path} at byte {starts[2]}: the checksum of the frame of version 9 does not match"
                " its bytes"
            )
        reader.close()

    def test_every_bit_of_a_frame_counts_but_those_of_its_padding(self, path: Path) -> None:
        whole, starts = segment([13, 5])
        path.write_bytes(whole)
        good = frames([13, 5])
        assert read_all(path)[:2] == good
        padding = {*range(starts[0] + 32 + 13, starts[1]), *range(starts[1] + 32 + 5, starts[2])}
        for bit in range(8 * starts[0], 8 * starts[2]):
            bad = bytearray(whole)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            reader, got, caught = Reader(path), list[Frame](), False
            try:
                while reader.version < 9:
                    got += reader.read(8, starts[2], 1 << 20)
            except Corrupt:
                caught = True
            reader.close()
            if bit // 8 in padding:
                assert (got, caught) == (good, False)
            else:
                assert (got, caught) == (good[: bit // 8 >= starts[1]], True)

    def test_a_frame_of_another_segment_does_not_pass(self, path: Path) -> None:
        other = Header(lineage=LINEAGE, first=8, previous=3)
        body = memoryview(b"x" * 10)
        path.write_bytes(HEAD.encode() + b"".join(encode(other.seed, 7, 6, 1, [body], 10)))
        with pytest.raises(Corrupt, match="the checksum of the frame of version 7 does not match"):
            read_all(path)

    def test_a_frame_that_claims_four_gigabytes_is_refused_before_memory_is_taken(
        self, path: Path
    ) -> None:
        path.write_bytes(HEAD.encode() + FRAME.pack(0, 0xFFFFFFFF, 1, 7, 6) + bytes(100))
        with pytest.raises(Corrupt, match="the next frame has 4294967327 bytes, but 132 are left"):
            read_all(path)

    def test_a_file_shorter_than_it_was_is_corrupt(self, path: Path) -> None:
        whole, starts = segment([100])
        path.write_bytes(whole[: starts[1] - 60])
        reader = Reader(path)
        with pytest.raises(Corrupt, match="the file ends 56 bytes before the frame's end"):
            reader.read(7, starts[1], 1 << 20)
        reader.close()

    @alone
    def test_a_file_that_is_no_segment_leaves_no_descriptor(self, path: Path) -> None:
        path.write_bytes(b"x" * 100)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(Corrupt, match="not a segment of a version log"):
            Reader(path)
        assert os.listdir("/proc/self/fd") == before


class TestTail:
    def test_a_clean_tail_is_found(self, path: Path) -> None:
        for sizes in ([], [5], [5, 3000, 0]):
            for zeros in (0, 8, 31, 32, 33, 5000):
                whole, starts = segment(sizes, zeros=zeros)
                path.write_bytes(whole)
                end = starts[-1]
                assert tail(path, end) == Tail(last=6 + len(sizes), end=end, dirty=end)

    def test_holes_behind_the_frames_are_clean(self, path: Path) -> None:
        whole, starts = segment([5, 5])
        path.write_bytes(whole)
        os.truncate(path, 64 << 20)
        assert tail(path) == Tail(last=8, end=starts[2], dirty=starts[2])

    def test_a_last_frame_cut_anywhere_is_torn(self, path: Path) -> None:
        whole, starts = segment([20, 30])
        for cut in range(starts[1] + 1, starts[2] - 2):  # the last two bytes are padding
            for filled in (whole[:cut], whole[:cut] + bytes(len(whole) - cut)):
                path.write_bytes(filled)
                dirty = len(filled.rstrip(b"\0"))
                found = tail(path, starts[1])
                assert found == Tail(last=7, end=starts[1], dirty=max(dirty, starts[1]))

    def test_a_bad_frame_that_was_synced_is_damage_though_it_is_the_last(self, path: Path) -> None:
        whole, starts = segment([20, 30])
        bad = bytearray(whole)
        bad[starts[2] - 5] ^= 1
        path.write_bytes(bad)
        assert tail(path, starts[1]).last == 7
        with pytest.raises(Corrupt) as caught:
            tail(path, starts[1] + 1)
        assert str(caught.value) == (
            f"{path} at byte {starts[1]}: the checksum of the frame of version 8 does not match its"
            " bytes; this is damage, because the frame had been synced"
        )

    def test_a_later_frame_testifies_that_a_bad_one_was_synced(self, path: Path) -> None:
        """Frame 8 is bad. Those behind it say what was on disk when they were written."""
        for testimony in range(6, 11):
            synced = [6, 6, 6, min(9, testimony), testimony]
            whole, starts = segment([40, 40, 40, 40, 40], synced=synced)
            bad = bytearray(whole)
            bad[starts[1] + 33] ^= 0x10
            path.write_bytes(bad)
            if testimony >= 8:
                with pytest.raises(Corrupt, match=f"at byte {starts[1]}: "):
                    tail(path)
            else:  # a power failure that kept later pages, and not an earlier one
                assert tail(path) == Tail(last=7, end=starts[1], dirty=starts[5])

    def test_a_witness_far_behind_is_found(self, path: Path) -> None:
        sizes = [CHUNK - 100, 1000, CHUNK + 50, 2 * CHUNK, 8]
        whole, starts = segment(sizes, synced=[6, 6, 6, 6, 8])
        for lost in (range(starts[1], starts[2]), range(starts[1], starts[4])):
            bad = bytearray(whole)
            bad[lost.start : lost.stop] = bytes(len(lost))
            path.write_bytes(bad)
            with pytest.raises(
                Corrupt, match=f"{starts[1]}: expected a frame of version 8, found none"
            ):
                tail(path)

    def test_bytes_that_look_like_a_witness_are_none_without_its_checksum(self, path: Path) -> None:
        whole, starts = segment([40])
        fake = FRAME.pack(123, 8, 1, 9, 8) + bytes(8)
        path.write_bytes(whole[: starts[1]] + bytes(64) + fake * 3)
        assert tail(path) == Tail(last=7, end=starts[1], dirty=starts[1] + 64 + 2 * 40 + 25)

    def test_a_whole_frame_out_of_order_is_damage(self, path: Path) -> None:
        whole, starts = segment([40, 40])
        for version in (7, 9, 1000):
            extra = b"".join(encode(HEAD.seed, version, 0, 1, [memoryview(b"abc")], 3))
            path.write_bytes(whole[: starts[1]] + extra + bytes(100))
            with pytest.raises(Corrupt, match=f"a frame of version 8, found {version}"):
                tail(path)

    def test_random_bytes_are_never_more_than_a_torn_tail(self, path: Path) -> None:
        dice = random.Random(5)
        whole, starts = segment([40])
        for _ in range(200):
            path.write_bytes(whole[: starts[1]] + dice.randbytes(dice.randrange(1, 3000)))
            found = tail(path)
            assert (found.last, found.end) == (7, starts[1])

    def test_an_erased_tail_is_clean(self, path: Path) -> None:
        whole, starts = segment([40], zeros=0)
        path.write_bytes(whole + b"\xff" * (2 * CHUNK + 77))
        found = tail(path)
        fd = os.open(path, os.O_RDWR)
        erase(Disk(), fd, found.end, found.dirty)
        os.close(fd)
        assert path.read_bytes() == whole + bytes(2 * CHUNK + 77)
        assert tail(path) == Tail(last=7, end=starts[1], dirty=starts[1])


class TestWriting:
    BUFFERS = tuple(memoryview(bytes([i % 251]) * (i % 7)) for i in range(3000))
    WHOLE = b"".join(BUFFERS)

    @pytest.mark.parametrize("limit", [1, 5, 6, 7, 100, 1 << 20])
    def test_partial_writes_are_completed(self, file: int, limit: int) -> None:
        def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            assert 0 < len(buffers) <= MAX_BUFFERS
            return os.pwrite(fd, b"".join(buffers)[:limit], offset)

        end = write_all(Disk(pwritev=pwritev), file, self.BUFFERS, 10)
        assert end == 10 + len(self.WHOLE)
        assert os.pread(file, 1 << 20, 0) == bytes(10) + self.WHOLE

    def test_more_buffers_than_a_call_takes_are_written(self, file: int) -> None:
        assert write_all(Disk(), file, self.BUFFERS, 0) == len(self.WHOLE)
        assert os.pread(file, 1 << 20, 0) == self.WHOLE

    def test_a_call_that_writes_nothing_is_an_error_and_no_loop(self, file: int) -> None:
        with pytest.raises(OSError, match="wrote 0 bytes"):
            write_all(Disk(pwritev=lambda fd, buffers, offset: 0), file, [memoryview(b"x")], 0)

    def test_preallocated_bytes_are_there_and_zero(self, file: int, tmp_path: Path) -> None:
        preallocate(Disk(), file, tmp_path / "file", 0, 1 << 20)
        assert os.pread(file, 2 << 20, 0) == bytes(1 << 20)
        assert os.fstat(file).st_blocks * 512 >= 1 << 20
        preallocate(Disk(), file, tmp_path / "file", 1 << 20, 3 << 20)
        assert os.fstat(file).st_size == 3 << 20

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_no_room_is_a_full_disk_and_the_file_stays(
        self, file: int, tmp_path: Path, code: int
    ) -> None:
        def refuse(fd: int, offset: int, size: int) -> None:
            os.ftruncate(fd, offset + size // 2)  # as far as it came
            raise OSError(code, os.strerror(code))

        disk = Disk(posix_fallocate=refuse)
        with pytest.raises(DiskFull) as caught:
            preallocate(disk, file, tmp_path / "file", 0, 4096)
        assert str(caught.value) == f"no room for 4096 more bytes in {tmp_path}"
        assert os.fstat(file).st_size == 0

    def test_another_error_of_the_disk_is_itself(self, file: int, tmp_path: Path) -> None:
        def refuse(fd: int, offset: int, size: int) -> None:
            raise OSError(errno.EIO, "broken")

        with pytest.raises(OSError, match="broken"):
            preallocate(Disk(posix_fallocate=refuse), file, tmp_path / "file", 0, 4096)

    def test_what_cannot_fit_is_refused_without_asking(
        self, file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        room = SimpleNamespace(f_blocks=100, f_bfree=1, f_frsize=4096)
        monkeypatch.setattr(os, "fstatvfs", lambda fd: room)
        calls: list[int] = []
        disk = Disk(posix_fallocate=lambda *_: calls.append(1))
        with pytest.raises(DiskFull):
            preallocate(disk, file, tmp_path / "file", 0, 4097)
        assert not calls
        preallocate(disk, file, tmp_path / "file", 0, 4096)
        assert calls == [1]

    def test_a_limit_on_the_size_of_files_is_a_full_disk(self, file: int, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            with pytest.raises(DiskFull):
                preallocate(Disk(), file, tmp_path / "file", 0, 16384)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.fstat(file).st_size == 0


def test_a_reader_that_is_idle_keeps_no_large_frame(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    large = bytes(LARGE_CHUNK * 3)
    header = Header(lineage=LINEAGE, first=1, previous=0)
    frame = b"".join(encode(header.seed, 1, 0, 1, [memoryview(large)], len(large)))
    path.write_bytes(header.encode() + frame)
    reader = Reader(path)
    assert len(reader.read(1, path.stat().st_size, 1)) == 1
    assert len(reader._chunk) <= LARGE_CHUNK
    reader.close()
