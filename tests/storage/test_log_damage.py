"""Damaged and torn logs, byte by byte, and processes that are killed."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from logs import (
    Opener,
    append,
    build,
    everything,
    files,
    frame,
    name,
)

from storage.disk import Disk
from storage.errors import Corrupt
from storage.segment import HEADER, frame_bytes


class TestBytes:
    """Every byte of a stopped log, changed or gone."""

    @pytest.mark.slow
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
