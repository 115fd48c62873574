"""The files of a version log at an opening: nothing lost is passed over in silence."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from logs import (
    LINEAGE,
    Opener,
    append,
    build,
    everything,
    files,
    frame,
    name,
)

from storage.errors import Corrupt, UnknownFormat
from storage.marks import SLOT
from storage.segment import HEADER, Frame, Header, frame_bytes


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
                f"{directory}: the log has versions 61 to 100, but the base is at version {after}"
            )
        for after in (60, 100):
            opened(after=after).close()

    def test_another_lineage_is_refused(self, opened: Opener, directory: Path) -> None:
        build(directory, 5)
        with pytest.raises(Corrupt) as caught:
            opened(lineage=bytes(16))
        assert str(caught.value) == (
            f"{directory / name(1)}: expected a segment of lineage {bytes(16).hex()}, got"
            f" {LINEAGE.hex()}"
        )
        with pytest.raises(ValueError, match="lineage must have 16 bytes, got 3"):
            opened(directory.with_name("other"), lineage=b"abc")

    def test_a_segment_of_another_log_is_refused(self, opened: Opener, directory: Path) -> None:
        build(directory, 70)
        other = directory.with_name("other")
        build(other, 70, lineage=bytes(16))
        shutil.copy(other / name(31), directory / name(31))
        with pytest.raises(Corrupt, match=", got 0000"):
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
        with pytest.raises(UnknownFormat, match="written in format 2, but this release reads 1"):
            opened()

    @pytest.mark.parametrize(
        ("gone", "why"),
        [
            ([31], f"{name(61)}: expected segment 31 before this segment, found 1"),
            ([31, 61], f"{name(91)}: expected segment 61 before this segment, found 1"),
            ([91], f"segment {name(91)} is missing, although it was synced"),
            ([1, 31, 61, 91], "all segments of an existing log are missing"),
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
        with pytest.raises(Corrupt, match="first version 92, but the file's header has 91"):
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
        with pytest.raises(Corrupt, match=f"byte {start}: expected a frame of version 8, found 9"):
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
            with pytest.raises(Corrupt, match="the next frame has 32 bytes, but 0 are left"):
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
        with pytest.raises(
            Corrupt, match="SYNCED: neither of the two marks has a correct checksum"
        ):
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
        assert "this is damage" in caught.value.what
