"""Temporary file systems for tests: small ones, and ones that simulate a power loss."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
NOLOGFLUSH = 2  # not even the journal is written


def command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def unmount(where: Path) -> None:
    subprocess.run(["umount", "-l", str(where)], capture_output=True, check=False)


@contextmanager
def small(mebibytes: int) -> Iterator[Path]:
    """Return a directory on a small file system. Skips the test where that is impossible."""
    if os.geteuid():
        pytest.skip("needs root, to mount a small tmpfs")
    with tempfile.TemporaryDirectory(prefix="ps-small-") as directory:
        try:
            command("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", directory)
        except OSError as error:
            pytest.skip(f"cannot mount a small tmpfs: {error}")
        try:
            yield Path(directory)
        finally:
            unmount(Path(directory))


class Battery:
    """An ext4 file system in a file, mounted at ``where``, that can simulate a power loss."""

    def __init__(self, image: Path, where: Path) -> None:
        self.where = where
        self._image = image

    def mount(self) -> None:
        command("mount", "-o", "loop", str(self._image), str(self.where))

    def cut(self) -> None:
        """Simulate a power loss: nothing reaches the disk from now on, not even the journal."""
        fd = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        command("umount", str(self.where))


@contextmanager
def battery(mebibytes: int) -> Iterator[Battery]:
    """Mount a file system, or skip the test where that is impossible."""
    if os.geteuid():
        pytest.skip("needs root, to mount an ext4 and cut its power")
    with tempfile.TemporaryDirectory(prefix="ps-power-") as directory:
        image, where = Path(directory) / "image", Path(directory) / "mounted"
        where.mkdir()
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        made = Battery(image, where)
        try:
            command("mkfs.ext4", "-q", "-F", str(image))
            made.mount()
        except OSError as error:
            pytest.skip(f"cannot mount an ext4 in a file: {error}")
        try:
            try:
                made.cut()
                made.unmount()
                made.mount()
            except OSError as error:
                pytest.skip(f"cannot cut the power of an ext4: {error}")
            yield made
        finally:
            unmount(where)
