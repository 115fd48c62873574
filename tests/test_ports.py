"""Tests that run at the same time, even of several sessions, do not take each other's ports."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

SHOW = "import ports; print(ports.MINE.start, ports.MINE.stop, flush=True); input()"


def test_processes_that_run_at_once_have_different_ports() -> None:
    with ExitStack() as stack:
        running = []
        for _ in range(8):
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", SHOW],
                cwd=Path(__file__).parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            running.append(process)
        found = []
        for process in running:
            assert process.stdout is not None
            first, end = map(int, process.stdout.readline().split())
            found.append(range(first, end))
        for process in running:
            process.communicate("\n")
    assert all(len(each) > 300 for each in found)
    assert not any(set(one) & set(other) for one, other in combinations(found, 2))
