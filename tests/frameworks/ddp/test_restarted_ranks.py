"""torchrun restarts a job: a process of the first attempt that lives on cannot push any more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import restarted
from numpy.testing import assert_array_equal
from servers import eventually

ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_process_that_outlives_its_rank_is_fenced(
    cluster2: Any, connect: Any, name: str, tmp_path: Path
) -> None:
    table = connect(cluster2).create_table(name, 2, optimizer="sgd", lr=1.0, initializer="zeros")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", restarted.__file__]
    command += [",".join(cluster2.addresses), name, str(tmp_path)]
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    eventually((tmp_path / "note").exists, restarted.SECONDS)
    assert (tmp_path / "note").read_text().startswith("SessionExpired: ")
    assert_array_equal(table.pull(restarted.KEYS), -3.0)  # one of the former process, two later
    identities = {
        (again, rank): json.loads((tmp_path / f"{again}.{rank}.json").read_text())
        for again in range(2)
        for rank in range(2)
    }
    for rank in range(2):
        former, later = identities[0, rank], identities[1, rank]
        assert former["client_id"] == later["client_id"]
        assert former["incarnation"] < later["incarnation"]
    assert identities[0, 0]["client_id"] != identities[0, 1]["client_id"]
