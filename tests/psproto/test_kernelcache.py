"""The cache of kernels: used where it cannot be written, never trusted when sources change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.caching import FunctionCache, NullCache
from numba.core.dispatcher import Dispatcher

import psclient  # noqa: F401  # its kernels
import psserver.process  # noqa: F401
from psproto import kernelcache
from psproto.kernelcache import KernelCache

ROOT = Path(__file__).parents[2]
NOBODY = 65534
# Runs as root until numba has compiled something, as the interpreter's own files may be private.
SCRIPT = """
import os, sys, warnings
from numba import njit
from psproto import kernelcache
kernelcache.PACKAGES += ("kernels",)
njit(lambda x: x + 1)(1)
if {user}:
    os.setgroups([]); os.setgid({user}); os.setuid({user})
for step in {steps!r}:
    exec(step)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from kernels import outer, inner
    result = outer.double(2) + outer.double(2.0)
hits = sum(outer.double.stats.cache_hits.values())
print(result, hits, *[w.category.__name__ + ": " + str(w.message) for w in caught], sep="|")
"""
RESULT = "20.0"


@pytest.fixture
def source(public_path: Path) -> Path:
    """A package with a kernel that calls one of another file, in a tree that all may read."""
    package = public_path / "kernels"
    package.mkdir()
    jit = "from numba import njit\n{}\n@njit(cache=True)\n"
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(jit.format("") + "def add(a, b):\n    return a + b + 1\n")
    (package / "outer.py").write_text(
        jit.format("from kernels.inner import add") + "def double(x):\n    return 2 * add(x, x)\n"
    )
    return package


def run(source: Path, *steps: str, user: int = 0, **environment: str) -> tuple[str, int, str]:
    """Import and call the kernels; the sum of two results, cache hits, warnings."""
    script = SCRIPT.format(user=user, steps=steps)
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.pathsep.join(map(str, (ROOT / "proto", ROOT, source.parent)))
    home = {"HOME": str(source.parent / "home")}
    environment = {**keep, **home, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result, hits, *warned = done.stdout.strip().split("|")
    return result, int(hits), "|".join(warned)


def cached(source: Path) -> list[Path]:
    return sorted((source / "__pycache__").glob("*.nb?"))


@pytest.mark.slow
def test_the_second_process_compiles_nothing(source: Path) -> None:
    assert run(source) == (RESULT, 0, "")
    assert run(source) == (RESULT, 2, "")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


@needs_root
class TestAnotherUser:
    """What root has filled while an image was built."""

    @pytest.mark.slow
    def test_a_filled_cache_that_cannot_be_written_is_used(self, source: Path) -> None:
        run(source)
        for path in source.rglob("*"):
            os.utime(path, (0, 0))  # an image may have other times
        nowhere = {"HOME": "/nonexistent", "XDG_CACHE_HOME": ""}
        assert run(source, user=NOBODY, **nowhere) == (RESULT, 2, "")
        assert run(source, "os.environ.pop('HOME')", user=NOBODY) == (RESULT, 2, "")

    @pytest.mark.slow
    def test_so_is_a_directory_that_a_variable_names(self, source: Path, public_path: Path) -> None:
        named = {"NUMBA_CACHE_DIR": str(public_path / "cache")}
        run(source, **named)
        assert cached(source) == []
        assert run(source, user=NOBODY, **named) == (RESULT, 2, "")

    def test_where_nothing_can_be_written_the_import_works_with_one_warning(
        self, source: Path
    ) -> None:
        result, hits, warned = run(source, user=NOBODY, HOME="/nonexistent")
        assert (result, hits) == (RESULT, 0)
        assert warned.startswith("RuntimeWarning: compiled kernels cannot be saved")
        assert "set NUMBA_CACHE_DIR" in warned
        assert "|" not in warned

    @pytest.mark.slow
    def test_what_a_read_only_cache_lacks_is_saved_for_the_user(
        self, source: Path, public_path: Path
    ) -> None:
        run(source)
        for path in cached(source):
            path.unlink()
        home = public_path / "home"
        home.mkdir()
        os.chown(home, NOBODY, NOBODY)
        assert run(source, user=NOBODY, HOME=str(home)) == (RESULT, 0, "")
        assert run(source, user=NOBODY, HOME=str(home)) == (RESULT, 2, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inner", "outer"])
def test_a_change_of_any_source_of_a_kernel_compiles_it_anew(source: Path, name: str) -> None:
    run(source)
    path = source / f"{name}.py"
    before = path.stat()
    path.write_text(path.read_text().replace("return ", "return 0 + "))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(source)[1] == 0
    assert run(source)[1] == 2


STOP_AT_THE_KERNEL = """
from numba.core.caching import IndexDataCacheFile
def fail(*_): raise OSError(28, "No space left on device")
IndexDataCacheFile._save_data = fail
"""


@pytest.mark.slow
def test_an_index_without_its_new_kernel_does_not_revive_the_old_one(source: Path) -> None:
    run(source)
    path = source / "inner.py"
    path.write_text(path.read_text().replace("b + 1", "b + 2"))
    assert run(source, STOP_AT_THE_KERNEL)[:2] == ("24.0", 0)
    assert run(source)[:2] == ("24.0", 0)
    assert run(source)[:2] == ("24.0", 2)


@pytest.mark.slow
def test_a_kernel_in_the_file_of_another_signature_is_not_used(source: Path) -> None:
    run(source)
    one, two = source.glob("__pycache__/*double*.nbc")  # as two processes may leave them
    swapped = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(swapped)
    assert run(source)[:2] == (RESULT, 0)


@pytest.mark.slow
def test_a_damaged_cache_is_as_none(source: Path) -> None:
    run(source)
    for path in cached(source):
        path.write_bytes(path.read_bytes()[:20])
    assert run(source)[:2] == (RESULT, 0)


@pytest.mark.slow
def test_a_required_cache_names_the_kernel_and_where_it_looked(source: Path) -> None:
    step = """
kernelcache.require()
from kernels import outer
try:
    outer.double(2)
except kernelcache.NotCached as error:
    print(error)
    sys.exit(0)
"""
    script = SCRIPT.format(user=0, steps=[step])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(source.parent / "cache")}
    path = os.pathsep.join(map(str, (ROOT / "proto", ROOT, source.parent)))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    said = f"kernels.outer.double is not in any cache directory: {source.parent}/cache/kernels_"
    assert done.stdout.startswith(said)
    assert f", {source}/__pycache__, " in done.stdout


def test_every_kernel_of_ours_has_this_cache_and_no_other() -> None:
    assert type(kernelcache._cache_for(run)) is FunctionCache
    caches = {
        f"{name}.{kernel}": type(found._cache)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in kernelcache.PACKAGES
        for kernel, found in vars(module).items()
        if isinstance(found, Dispatcher) and not isinstance(found._cache, NullCache)
    }
    assert len(caches) > 40
    assert {name for name, kind in caches.items() if kind is not KernelCache} == set()


@pytest.mark.slow
@pytest.mark.parametrize(("processor", "status"), [("", 0), ("generic", 1)])
def test_the_check_of_a_warm_cache_is_its_exit_status(processor: str, status: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "proto", ROOT)))}
    if processor:
        environment |= {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    else:
        subprocess.run([sys.executable, "-m", "psserver", "warm"], env=environment, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "psserver", "warm", "--check"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert ("all kernels are in the cache" in done.stdout) is not bool(status)
    assert ("kernels would be compiled at each start" in done.stderr) is bool(status)
