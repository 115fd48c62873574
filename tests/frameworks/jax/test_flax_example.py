"""The example with JAX and Flax: its AUC is that of the same network with rows in its process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a busy machine
def test_its_auc_is_that_of_its_twin() -> None:
    directory = os.environ.get("ADULT_DATA")
    if not directory:
        pytest.skip("ADULT_DATA names no directory with adult.data and adult.test: see adult.py")
    command = [sys.executable, EXAMPLES / "adult_flax.py", directory]
    run = subprocess.run(
        [*command, "--reference", "--epochs", "2"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    served, twin = map(float, re.findall(r"AUC (0\.\d+)", run.stdout))
    assert served > 0.9
    assert abs(served - twin) <= 0.002
