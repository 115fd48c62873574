"""Compile and load kernels.cpp, if a compiler is installed.

The result is cached per source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("kernels.cpp")
# Without the errno of sqrt, whose results stay what they are, its loops can be vectorized.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC"]

_i64, _u64, _f32, _f64 = ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_double


def _array(dtype: type[np.generic]) -> type:
    """Return the ctypes argument type for contiguous arrays of a dtype.

    ctypes checks each array at every call, which takes 1-2 microseconds.
    """
    return np.ctypeslib.ndpointer(dtype, flags="C_CONTIGUOUS")


_U64s, _I64s, _I32s = _array(np.uint64), _array(np.int64), _array(np.int32)
_F32s, _U8s = _array(np.float32), _array(np.uint8)

# name: (result type, argument types); kernels.cpp explains the arguments
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "index_find": (None, [_U64s, _u64, _U64s, _i64, _I64s]),
    "index_insert": (_i64, [_U64s, _u64, _U64s, _I64s, _i64]),
    "gather": (None, [_F32s, _i64, _i64, _I64s, _i64, _F32s]),
    "find_gather": (None, [_U64s, _u64, _U64s, _i64, _F32s, _i64, _i64, _F32s]),
    "adagrad": (None, [_F32s, _i64, _i64, _I64s, _F32s, _i64, _f32, _f32]),
    "unique_sum": (_i64, [_U64s, _i64, _F32s, _i64, _U64s, _I64s, _F32s, _I32s, _u64]),
    "random_access_roof": (_f64, [_U64s, _u64, _i64, _u64]),
    "copy_roof": (_f64, [_U8s, _U8s, _i64, _i64]),
}


def load() -> ctypes.CDLL | None:
    """Return the library of compiled kernels, with declared signatures; None without a compiler.

    The compiler is $CXX, or g++. The library is stored in a directory of this user below the
    directory for temporary files. Raises PermissionError if another user owns that directory.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    directory = Path(tempfile.gettempdir()) / f"parameter-server-kernels-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user: delete it, or set TMPDIR")
    made_of = [SOURCE.read_bytes(), " ".join(FLAGS).encode(), _version(compiler), _processor()]
    target = directory / f"{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(target)
    library = ctypes.CDLL(str(target))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout


def _processor() -> bytes:
    """Return the processor's model and features, on which -march=native depends."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags"))})).encode()
