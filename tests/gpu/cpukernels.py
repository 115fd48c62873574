"""The CUDA kernels, compiled with g++ for this CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from storage.gpu.source import cuda_source
from storage.optimizer import StepKernel

SHIM = Path(__file__).with_name("shim.h")
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror"]
C_TYPES: dict[type, Any] = {
    np.float32: ctypes.c_float,
    np.float64: ctypes.c_double,
    np.int32: ctypes.c_int32,
    np.int64: ctypes.c_int64,
    np.uint64: ctypes.c_uint64,
}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


class CpuKernels:
    """Launches kernels on this CPU. One launch at a time.

    reverse  run threads and blocks in descending order
    """

    def __init__(self, source: str, flags: Sequence[str] = ()) -> None:
        self.reverse = False
        self.names = re.findall(r'extern "C" __global__ void (\w+)\(', source)
        starts = "\n".join(
            f'extern "C" void start_{name}(unsigned g, unsigned b, int r, void** v)'
            f" {{ cpu::{_launcher(source, name)}({name}, g, b, r, v); }}"
            for name in self.names
        )
        text = f'#include "{SHIM}"\n{source}\n{starts}\n'
        self._library = ctypes.CDLL(str(_compiled(text, (*FLAGS, *flags))))

    def launch(self, name: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """Run a kernel. The arguments are numpy numbers of the types that it declares."""
        held = [C_TYPES[type(each)](each.item()) for each in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(each) for each in held))
        start = getattr(self._library, f"start_{name}")
        start(ctypes.c_uint(grid), ctypes.c_uint(block), ctypes.c_int(self.reverse), pointers)


def _launcher(source: str, kernel: str) -> str:
    """Return the function of the shim that launches a kernel: do its threads exchange values?"""
    names = kernel, kernel.replace("step_", "") + "_row"
    texts = (re.search(rf" {name}\(.*?^}}", source, re.M | re.S) for name in names)
    return "launch" if any(t and re.search(r"\w\(group\b", t[0]) for t in texts) else "launch_plain"


@cache
def cpu_kernels(steps: tuple[StepKernel, ...], flags: tuple[str, ...] = ()) -> CpuKernels:
    return CpuKernels(cuda_source(steps), flags)


def _compiled(text: str, flags: Iterable[str]) -> Path:
    """Return the library compiled from a source; it is kept for later runs."""
    found = compiler()
    assert found is not None
    directory = Path(tempfile.gettempdir()) / f"embedding-ps-cpu-kernels-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    made_of = "|".join([text, SHIM.read_text(), *flags]).encode()
    library = directory / f"{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not library.exists():
        unfinished = directory / f"{library.stem}.{os.getpid()}"
        source = unfinished.with_suffix(".cpp")
        source.write_text(text)
        command = [found, *flags, str(source), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        source.unlink()
        unfinished.replace(library)
    return library
