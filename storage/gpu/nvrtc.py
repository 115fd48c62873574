"""Compile CUDA C to machine code with NVRTC, NVIDIA's compiler as a library. No GPU is needed.

CuPy could compile too, but it always adds -ftz=true, which makes the smallest numbers 0. Then rows
would have other bits on a GPU than on the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

OPTIONS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "-default-device")


class CannotCompile(Exception):
    """NVRTC is not installed, or it refused the source; the message has its reasons."""


def machine_code(source: str, capability: int, major: int | None = None) -> bytes:
    """Return the machine code of some kernels, from the cache if they were compiled before.

    capability  compute capability of the GPU, for example 90
    major       major version of CUDA that NVRTC should have

    The cache is $XDG_CACHE_HOME/embedding-ps, or ~/.cache/embedding-ps. Compiling takes seconds.
    Without a cache that can be written, every process compiles.
    """
    key = repr((source, OPTIONS, capability, _version(major)))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedding-ps"
    cached = home / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    with suppress(OSError):  # it is not there, or cannot be read
        return cached.read_bytes()
    code, _ = compile_source(source, capability, major=major)
    with suppress(OSError):  # for example a read-only file system
        _save(code, cached)
    return code


def _save(code: bytes, path: Path) -> None:
    """Write a file that is either whole or absent, even if the machine crashes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(code)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def compile_source(
    source: str, capability: int, *options: str, major: int | None = None
) -> tuple[bytes, str]:
    """Compile a source; return (machine code, log of the compiler).

    For a GPU that is newer than NVRTC, the result is PTX, which the driver compiles to machine code
    when it is loaded.
    """
    library, program = _library(major), ctypes.c_void_p()
    named = ctypes.byref(program), source.encode(), b"rows.cu"
    _check(library.nvrtcCreateProgram(*named, 0, None, None), "nvrtcCreateProgram")
    try:
        known = max(
            (each for each in _capabilities(library) if each <= capability), default=capability
        )
        kind = "sm" if known == capability else "compute"
        given = [f"-arch={kind}_{known}", *OPTIONS, *options]
        array = (ctypes.c_char_p * len(given))(*(each.encode() for each in given))
        status = library.nvrtcCompileProgram(program, len(given), array)
        log = _text(library, program, "ProgramLog").decode(errors="replace").strip("\0\n")
        if status:
            raise CannotCompile(f"NVRTC refused the kernels for capability {capability}: {log}")
        return _text(library, program, "CUBIN" if kind == "sm" else "PTX"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def find_library(major: int | None = None) -> str | None:
    """Return the path of NVRTC's library: from a Python package, or from a CUDA toolkit.

    If there are several: one of CUDA ``major``, else the newest.
    """
    folders = [Path(each) / "nvidia" for each in sys.path if each]
    toolkit = Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"))
    found = [path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")]
    found += [path for at in ("lib64", "lib") for path in (toolkit / at).glob("libnvrtc.so.*")]
    names = re.compile(r"libnvrtc\.so\.(\d+)(\.\d+)*")
    matches = ((names.fullmatch(path.name), str(path)) for path in found)
    known = [(int(match[1]), path) for match, path in matches if match]
    return max(known, key=lambda each: (each[0] == major, each[0]), default=(0, None))[1]


@cache
def _library(major: int | None) -> Any:
    path = find_library(major)
    if path is None:
        raise CannotCompile(
            "NVRTC is not installed: install embedding-ps[gpu13], or [gpu12] for drivers of CUDA 12"
        )
    return ctypes.CDLL(path)


@cache
def _version(major: int | None) -> tuple[int, int]:
    first, second = ctypes.c_int(), ctypes.c_int()
    status = _library(major).nvrtcVersion(ctypes.byref(first), ctypes.byref(second))
    _check(status, "nvrtcVersion")
    return first.value, second.value


@cache
def _capabilities(library: Any) -> tuple[int, ...]:
    """Return the compute capabilities that NVRTC knows."""
    count = ctypes.c_int()
    _check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    known = (ctypes.c_int * count.value)()
    _check(library.nvrtcGetSupportedArchs(known), "nvrtcGetSupportedArchs")
    return tuple(known)


def _text(library: Any, program: Any, what: str) -> bytes:
    """Return a result of a compilation; ``what`` ends the name of NVRTC's function for it."""
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _check(status: int, function: str) -> None:
    if status:
        raise CannotCompile(f"{function} of NVRTC failed with status {status}")
