"""The servers that tests start end with the tests; with --cold their rows leave memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import squeeze
from servers import SETPRIV, Cluster, alive, eventually, free_ports
from tables import summing

STARTS = """
import sys, time
from servers import serve
print(serve("--port", sys.argv[1], "--metrics-port", "0").pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not SETPRIV, reason="needs setpriv")
def test_a_server_ends_with_the_process_that_started_it() -> None:
    tests = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(free_ports(1))],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with tests:
        assert tests.stdout is not None
        server = int(tests.stdout.readline())
        eventually(lambda: b"psserver" in Path(f"/proc/{server}/cmdline").read_bytes())
        assert alive(server)
        tests.kill()
        eventually(lambda: not alive(server))


@pytest.mark.slow
def test_rows_of_a_cold_server_are_on_disk(
    monkeypatch: pytest.MonkeyPatch, start_cluster: Any, connect: Any, name: str
) -> None:
    monkeypatch.setitem(squeeze._state, "active", True)
    cluster: Cluster = start_cluster(1, metrics=True)
    table = summing(connect(cluster), name)
    table.push(np.arange(1000), np.ones((1000, table.dim), np.float32))

    def rows(tier: str) -> float:
        samples = cluster.metrics(0, name).items()
        return sum(value for (sample, labels), value in samples if _is(sample, labels, tier))

    eventually(lambda: (rows("host"), rows("lmdb")) == (0, 1000))


def _is(sample: str, labels: Any, tier: str) -> bool:
    return sample == "ps_table_rows" and labels["tier"] == tier
