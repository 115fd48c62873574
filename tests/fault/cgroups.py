"""Memory cgroups for tests: a group with a limit, and below it a group without one."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Group:
    """A memory cgroup with a limit.

    inner  directory of a group below it, which has no limit; processes must be put there
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._outer, self.inner = directory, directory / "inner"
        self.version = 1 if (directory / "memory.limit_in_bytes").exists() else 2
        if self.version == 2:
            (directory / "cgroup.subtree_control").write_text("+memory")
        name = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        (directory / name).write_text(str(limit))
        self.inner.mkdir()

    def enter(self) -> None:
        """Move this process into the inner group."""
        (self.inner / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def kills(self) -> int:
        """Number of processes that the kernel killed because of the limit."""
        groups = (self._outer, self.inner)
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        found = [re.search(r"^oom_kill (\d+)$", (at / name).read_text(), re.M) for at in groups]
        assert all(found)
        counts = [int(each[1]) for each in found if each]
        return sum(counts) if self.version == 1 else counts[0]  # v2 counts those below, too

    @property
    def anonymous(self) -> int:
        """Bytes that the kernel cannot reclaim: heaps and stacks, not the contents of files."""
        name = r"total_rss" if self.version == 1 else r"anon"
        found = re.search(rf"^{name} (\d+)$", (self._outer / "memory.stat").read_text(), re.M)
        assert found
        return int(found[1])

    def remove(self) -> None:
        """Remove both groups. Their processes must have ended."""
        for directory in (self.inner, self._outer):
            for _ in range(100):
                try:
                    directory.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)


@contextmanager
def limited(size: int) -> Iterator[Group]:
    """Yield a group with a limit of ``size`` bytes. Skips the test where that is impossible."""
    if os.geteuid():
        pytest.skip("needs root, to make a memory cgroup")
    version1 = (V1 / "memory.limit_in_bytes").exists()
    directory = (V1 if version1 else V2) / f"ps-test-{secrets.token_hex(4)}"
    try:
        if not version1:
            (V2 / "cgroup.subtree_control").write_text("+memory")
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a memory cgroup: {error}")
    try:
        group = Group(directory, size)
    except OSError as error:
        directory.rmdir()
        pytest.skip(f"cannot limit the memory of a cgroup: {error}")
    try:
        yield group
    finally:
        group.remove()
