"""Check that this machine's processor can run kernels compiled for the one in NUMBA_CPU_NAME.

Numba compiles for the processor that it runs on, unless NUMBA_CPU_NAME names a different one. An
image is built with a name that all machines have in common, such as x86-64-v3. A machine whose
processor lacks instructions of the named one would end the process with the signal SIGILL.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
from numba.core import config

# Features of the levels of x86-64, each without those of the level before it, named as in LLVM
_LEVELS = {
    "x86-64": "cmov cx8 fxsr mmx sse sse2",
    "x86-64-v2": "cx16 popcnt sahf sse3 sse4.1 sse4.2 ssse3",
    "x86-64-v3": "avx avx2 bmi bmi2 f16c fma lzcnt movbe xsave",
    "x86-64-v4": "avx512bw avx512cd avx512dq avx512f avx512vl",
}
ADVICE = (
    "build the image with a lower NUMBA_CPU_NAME (x86-64-v2 suits all servers since 2010), or run"
    " on a machine with a newer processor"
)


class UnfitProcessor(RuntimeError):
    """This machine's processor cannot run kernels compiled for the one in NUMBA_CPU_NAME."""


def target() -> str:
    """Return the name of the processor for which kernels are compiled in this process."""
    return str(config.CPU_NAME or llvm.get_host_cpu_name())


def known(name: str) -> bool:
    """Return whether ``missing`` knows the features of the processor ``name``."""
    return name in (*_LEVELS, "generic", llvm.get_host_cpu_name())


def missing(name: str, features: str, host: Mapping[str, bool]) -> list[str]:
    """Return the features that kernels may use, but this machine's processor does not have.

    name      value of NUMBA_CPU_NAME; only levels of x86-64 are checked, such as "x86-64-v3"
    features  value of NUMBA_CPU_FEATURES, for example "+avx2,-fma"
    host      feature -> whether this machine's processor has it
    """
    needed: list[str] = []
    if name in _LEVELS:
        for level, added in _LEVELS.items():
            needed += added.split()
            if level == name:
                break
    changes = [each.strip() for each in features.split(",")]
    needed += [each[1:] for each in changes if each.startswith("+")]
    removed = {each[1:] for each in changes if each.startswith("-")}
    return [each for each in dict.fromkeys(needed) if each not in removed and not host.get(each)]


@cache
def problem() -> str | None:
    """Return an error message if kernels cannot run on this machine's processor, else None."""
    if config.CPU_NAME is None and config.CPU_FEATURES is None:
        return None
    name, features = target(), config.CPU_FEATURES or ""
    lacking = missing(name, features, llvm.get_host_cpu_features())
    if not lacking:
        return None
    wanted = f"NUMBA_CPU_NAME={name}" + (f", NUMBA_CPU_FEATURES={features}" if features else "")
    return (
        f"kernels are compiled for {wanted}, but this machine's processor, {model()}, does not have"
        f" {', '.join(lacking)}: {ADVICE}"
    )


def require() -> None:
    """Raise UnfitProcessor if kernels cannot run on this machine's processor."""
    if text := problem():
        raise UnfitProcessor(text)


def model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of this machine's processor, for example "AMD EPYC (znver4)"."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]} ({llvm.get_host_cpu_name()})"
