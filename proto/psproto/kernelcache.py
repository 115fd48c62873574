"""Cache of kernels that Numba compiled, which can be loaded even from read-only directories.

Numba's own cache uses the first writable directory, ignores filled directories that are read-only,
and fails at import if none is writable. This cache loads a kernel of this project from the first of
these directories that has it, and saves it to the first that can be written:

    NUMBA_CACHE_DIR     if it is set
    __pycache__         next to the source; ``psserver warm`` fills it while an image is built
    ~/.cache/numba      of the user, or below XDG_CACHE_HOME

If none can be written, each process compiles the kernels, and one warning is shown. A cached kernel
is used only if its source file, and all files of this project that it imports, have the same
contents as when it was compiled. File times and owners do not matter. It must also have been
compiled by the same release of Numba for the same type of processor. To build an image for several
types, name one whose instructions they all have: NUMBA_CPU_NAME=x86-64-v3 and NUMBA_CPU_FEATURES=
(empty). Where that is more than the machine's processor has, kernels raise UnfitProcessor.

Numba writes the index of a cache before the kernel. If it is interrupted between the two, the index
may refer to the file of an older kernel. So each kernel is saved with the checksum of its sources
and its key (signature and processor), and both are compared when it is loaded.

``install`` replaces Numba's cache only for functions of PACKAGES.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core import config, dispatcher
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.runtime import rtsys
from numba.misc.appdirs import AppDirs

from psproto import cpu

PACKAGES = ("psproto", "storage", "psserver", "psclient")
_IMPORTS = re.compile(r"^from ([\w.]+) import (\([^)]*\)|.*)$", re.M)


class NotCached(Exception):
    """Raised if a kernel is not in the cache and ``require`` has forbidden to compile it."""


class KernelCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Cache of the compiled versions of one kernel; Numba creates one per kernel."""

    required = False  # True: raise NotCached instead of compiling
    loaded, compiled, unsaved = 0, 0, 0  # kernels of this process; ``unsaved`` are compiled ones
    _warned = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = repr(function)
        self._py_func = function
        self._impl = _Impl(function)
        self._directories = directories(function)
        self._cache_path = str(self._directories[0])
        self._stamp = source_stamp(function.__module__)
        self._files = [
            IndexDataCacheFile(str(directory), self._impl.filename_base, self._stamp)
            for directory in self._directories
        ]
        self._cache_file = self._files[0]
        self.enable()

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Load a compiled kernel as ``_load_overload`` does. Numba calls this for each kernel.

        Numba's own method first looks for new rules of compilation. A compiled kernel needs none of
        them, only Numba's runtime, which allocates arrays.
        """
        rtsys.initialize(target)
        return self._load_overload(signature, target)

    def _load_overload(self, signature: Any, target: Any) -> Any:
        """Load a compiled kernel from the first directory that has it.

        signature  Numba's types of the kernel's arguments
        target     Numba's target context

        If no directory has it, returns None, so that Numba compiles it, or raises NotCached if
        ``required`` is set. Raises UnfitProcessor if the processor cannot run it.
        """
        cpu.require()
        if not self._enabled:
            return None
        key = self._index_key(signature, target.codegen())
        for file in self._files:
            try:
                stored = file.load(key)
                if stored is not None and stored[:2] == (self._stamp, key):
                    kernel = self._impl.rebuild(target, stored[2])
                    KernelCache.loaded += 1
                    return kernel
            except Exception:  # noqa: S112  # unreadable or damaged files are ignored
                continue
        if KernelCache.required:
            raise NotCached(
                f"{self._py_func.__module__}.{self._py_func.__qualname__} is not in any cache"
                f" directory: {', '.join(map(str, self._directories))}"
            )
        return None

    def _save_overload(self, signature: Any, result: Any) -> None:
        """Save a compiled kernel to the first writable directory; warn once if there is none.

        signature  Numba's types of the kernel's arguments
        result     Numba's CompileResult
        """
        if not self._enabled or not self._impl.check_cachable(result):
            return
        KernelCache.compiled += 1
        key, data = self._index_key(signature, result.codegen), self._impl.reduce(result)
        for directory, file in zip(self._directories, self._files, strict=True):
            try:
                directory.mkdir(parents=True, exist_ok=True)
                file.save(key, (self._stamp, key, data))
            except Exception:  # noqa: S112  # not writable, no space, or a damaged index
                continue
            return
        KernelCache.unsaved += 1
        if not KernelCache._warned:
            KernelCache._warned = True
            warnings.warn(
                "compiled kernels cannot be saved, so each process compiles them again: make one of"
                f" {', '.join(map(str, self._directories))} writable, or set NUMBA_CACHE_DIR",
                RuntimeWarning,
                stacklevel=2,
            )


class _Impl(CompileResultCacheImpl):  # type: ignore[misc]
    """Defines the file names of one kernel's cache, which differ from those of Numba's cache."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._lineno = function.__code__.co_firstlineno
        self._locator = self
        self._py_file = function.__code__.co_filename  # numba names it in warnings
        name = f"{function.__module__}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, getattr(sys, "abiflags", ""))

    def get_disambiguator(self) -> str:
        return str(self._lineno)


def directories(function: Callable[..., Any]) -> list[Path]:
    """Return the directories in which the cache looks for a kernel, in this order."""
    return _directories_of(Path(function.__code__.co_filename).absolute().parent, config.CACHE_DIR)


@functools.cache
def _directories_of(source: Path, named: str) -> list[Path]:
    """Return the directories for the kernels whose sources are in the directory ``source``.

    named  value of NUMBA_CACHE_DIR; "" if it is not set
    """
    below = f"{source.name}_{hashlib.sha256(bytes(source)).hexdigest()[:40]}"
    found = [Path(named) / below] if named else []
    user = Path(AppDirs(appname="numba", appauthor=False).user_cache_dir)
    return [*found, source / "__pycache__", user / below]


@functools.cache
def source_stamp(module: str) -> str:
    """Return a checksum of a module's source, and of all modules of PACKAGES that it imports.

    Imports are followed recursively, because a compiled kernel contains the code and constants of
    the kernels that it calls. ``__init__`` files are left out: they have no kernels.

    module  dotted name of the module
    """
    digest = hashlib.sha256()
    todo, seen = [module], set[str]()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += _imports(name)
    for name in sorted(seen):
        digest.update(_source(name))
    return digest.hexdigest()


def _imports(module: str) -> list[str]:
    """Return the names of the loaded modules of PACKAGES that a module imports directly."""
    return [each for each in _named(module) if each in sys.modules and each not in PACKAGES]


@functools.cache
def _named(module: str) -> list[str]:
    """Return the names of the modules of PACKAGES that the source of a module may import."""
    found = []
    for package, names in _IMPORTS.findall(_source(module).decode(errors="replace")):
        if package.partition(".")[0] in PACKAGES:
            found += [package, *(f"{package}.{name}" for name in re.findall(r"\w+", names))]
    return found


@functools.cache
def _source(module: str) -> bytes:
    """Return the source of a loaded module; b"" if it has no readable file."""
    try:
        return Path(getattr(sys.modules.get(module), "__file__", None) or os.devnull).read_bytes()
    except OSError:
        return b""


def _cache_for(function: Callable[..., Any]) -> FunctionCache:
    """Return a KernelCache if ``function`` belongs to PACKAGES, otherwise a cache of Numba."""
    ours = function.__module__.partition(".")[0] in PACKAGES
    return KernelCache(function) if ours else FunctionCache(function)


def install() -> None:
    """Make Numba use this cache for the kernels of PACKAGES. ``import psproto`` calls it."""
    dispatcher.FunctionCache = _cache_for  # type: ignore[attr-defined]


def require() -> None:
    """From now on, make this process raise NotCached instead of compiling a kernel."""
    KernelCache.required = True
