"""The ranks of torch.distributed, as a Checkpointer needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.slow
CODE = """
import sys
from torch import distributed
from psclient.torch import JobRanks

number = int(sys.argv[1])
store = "file://" + sys.argv[2]
distributed.init_process_group("gloo", rank=number, world_size=2, init_method=store)
ranks = JobRanks()
found, errors = ranks.gather({"of": number}), ranks.gather(ValueError("x"))
print(ranks.rank, ranks.size, found, errors[1 - number])
distributed.barrier()
distributed.destroy_process_group()
"""


def test_all_ranks_get_the_values_of_all(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(rank), str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    shown = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], shown
    assert [out for out, _ in shown] == [
        f"{rank} 2 [{{'of': 0}}, {{'of': 1}}] x\n" for rank in range(2)
    ]
