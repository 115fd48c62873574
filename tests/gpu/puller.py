"""A process that pulls into GPU memory without end, until a test kills it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHILD = """
import sys
import numpy as np
address, device, table, rows = sys.argv[1:]
if device == "fake":
    from fakeipc import FakeCudaGpu, fake_cupy
    from psproto import cudaipc
    fake = FakeCudaGpu()
    cudaipc.gpu = lambda number=0: fake
    sys.modules["cupy"] = fake_cupy()
import cupy
from psclient import Client
with Client([address], timeout=60, lane="require") as client:
    table, keys = client.table(table), np.arange(int(rows))
    out = cupy.full((len(keys), table.dim), 0, np.float32)
    for i in range(1_000_000):
        table.pull(keys, out=out)
        if i == 3:
            print("ready", flush=True)
"""


@contextmanager
def pulling(address: str, device: str, table: str, rows: int) -> Iterator[subprocess.Popen[str]]:
    """Run the process during a block, which starts when it has pulled a few times.

    device  "fake" or "gpu"
    rows    number of keys of each pull
    """
    here = Path(__file__).parent
    paths = [str(here.parents[1] / "proto"), str(here.parents[1]), str(here)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, address, device, table, str(rows)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait(60)
        child.stdout.close()
