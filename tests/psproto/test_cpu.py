"""Kernels for a named processor: refused where instructions are missing, before they are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import environment

from psproto import cpu

SINCE_2003 = "cmov cx8 fxsr mmx sse sse2"
SINCE_2009 = "cx16 popcnt sahf sse3 sse4.1 sse4.2 ssse3"
SINCE_2013 = "avx avx2 bmi bmi2 f16c fma lzcnt movbe xsave"
OLD = dict.fromkeys(SINCE_2003.split(), True)
HASWELL = dict.fromkeys(f"{SINCE_2003} {SINCE_2009} {SINCE_2013}".split(), True)
ABSENT = "+tbm"  # no processor of the last ten years has it
RUN = """
import numpy as np
from psproto import routing
routing.owners(np.arange(4, dtype=np.uint64), routing.even_map(2))
"""


@pytest.mark.parametrize(
    ("name", "features", "host", "lacking"),
    [
        ("x86-64", "", OLD, []),
        ("x86-64-v3", "", HASWELL, []),
        ("x86-64-v4", "", HASWELL, ["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"]),
        ("x86-64-v2", "", OLD, SINCE_2009.split()),
        ("x86-64-v3", "", {**HASWELL, "fma": False}, ["fma"]),
        ("x86-64-v3", "-fma", {**HASWELL, "fma": False}, []),
        ("x86-64-v2", "+avx2, +sha,-sse3", HASWELL, ["sha"]),
        ("generic", "", {}, []),
        ("znver4", "", {}, []),  # what it needs is not known here
    ],
)
def test_features_that_the_processor_lacks(
    name: str, features: str, host: dict[str, bool], lacking: list[str]
) -> None:
    assert cpu.missing(name, features, host) == lacking


def test_the_model_of_the_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\n" * 2)
    assert cpu.model(tmp_path / "cpuinfo").startswith("Some CPU @ 2 GHz (")
    assert cpu.model(tmp_path / "none").endswith(")")


def test_a_kernel_for_a_better_processor_is_not_run() -> None:
    named = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ABSENT}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(
        command, env={**environment(), **named}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1  # not killed by SIGILL
    assert "UnfitProcessor: kernels are compiled for NUMBA_CPU_NAME=x86-64," in done.stderr
    assert "does not have tbm" in done.stderr


@pytest.mark.parametrize(
    "command", [["serve"], ["warm"], pytest.param(["warm", "--check"], marks=pytest.mark.slow)]
)
def test_a_server_names_the_processor_and_what_it_lacks(command: list[str], tmp_path: Path) -> None:
    named = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ABSENT}
    words = [sys.executable, "-m", "psserver", *command]
    done = subprocess.run(
        [*words, "--data-dir", str(tmp_path / "data")] if command == ["serve"] else words,
        env={**os.environ, **environment(), **named},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"this machine's processor, {cpu.model()}, does not have tbm" in done.stderr
    assert cpu.ADVICE in done.stderr
    assert not (tmp_path / "data").exists()
