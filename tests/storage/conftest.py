"""Fixtures of the tests of log and base."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from logs import SMALL, Opener, refuse
from shelves import Shelf

from storage.errors import LogFailed
from storage.versionlog import VersionLog


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


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a sync costs nothing."""
    if not os.access("/dev/shm", os.W_OK):  # noqa: S108
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def shelf(memory: Path) -> Iterator[Shelf]:
    """Blocks in a base of their own."""
    shelf = Shelf(memory)
    yield shelf
    shelf.close()
