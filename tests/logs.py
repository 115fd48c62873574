"""Version logs of tests: filled, read, with disks that wait or fail."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storage.disk import Disk
from storage.segment import HEADER, Frame, frame_bytes
from storage.versionlog import VersionLog

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
