"""A server whose file system is read-only, apart from its data directory, as in a container."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import environment, free_ports

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("unshare") is None,
        reason="needs root and unshare, to mount the root read-only",
    ),
]
# Two levels, so that the second test finds no kernels next to the sources
FILLED = {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": ""}
EMPTY = {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""}
ISOLATED = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mount --bind "$2" "$2"
for each in / /tmp /dev/shm "$2"; do
    if mountpoint -q "$each"; then mount -o remount,bind,ro "$each"; fi
done
if touch "$2/written" 2>/dev/null; then echo "$2 is writable" >&2; exit 9; fi
shift 2
exec "$@"
"""


class Isolated:
    """Runs psserver where only the directory ``data`` can be written."""

    def __init__(self, directory: Path, variables: dict[str, str]) -> None:
        self.data, self.cache = directory / "data", directory / "cache"
        self.data.mkdir()
        self.cache.mkdir(exist_ok=True)
        self._environment = {
            **environment(),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(self.cache),
            **variables,
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        shell = ["unshare", "-m", "sh", "-c", ISOLATED, "sh", str(self.data), str(self.cache)]
        return subprocess.Popen(
            [*shell, sys.executable, "-m", "psserver", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )

    def warm(self) -> None:
        """Fill the cache, which is writable meanwhile."""
        words = [sys.executable, "-m", "psserver", "warm"]
        subprocess.run(words, env=self._environment, check=True)

    def serve(self) -> str:
        """Start a server and stop it once it is ready. Return its stderr."""
        flags = ["--port", str(free_ports(1)), "--metrics-port", "0"]
        process = self.start("serve", *flags, "--data-dir", str(self.data / "shard"))
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert (first, process.returncode) == ("ready\n", 0), err
        return err


def events(err: str, event: str) -> list[dict[str, object]]:
    lines = (json.loads(line) for line in err.splitlines() if line.startswith("{"))
    return [line for line in lines if str(line["event"]).startswith(event)]


def test_a_full_cache_that_cannot_be_written_is_loaded(tmp_path: Path) -> None:
    one = Isolated(tmp_path, FILLED)
    one.warm()
    err = one.serve()
    [told] = events(err, "kernels")
    assert (told["compiled"], told["cpu"]) == (0, "x86-64-v3")
    assert int(str(told["loaded"])) > 90
    assert "RuntimeWarning" not in err
    process = one.start("warm", "--check")
    assert process.communicate()[0] == "all kernels are in the cache\n"
    assert process.returncode == 0


def test_kernels_that_are_nowhere_are_compiled_in_memory_and_it_says_so(tmp_path: Path) -> None:
    one = Isolated(tmp_path, EMPTY)
    err = one.serve()
    told, warned = events(err, "kernels")
    assert int(str(told["compiled"])) > 90
    assert warned["event"] == (
        "kernels were compiled, which delayed this start: they cannot be saved, so each start"
        " compiles them"
    )
    assert "psserver warm" in str(warned["advice"])
    assert err.count("compiled kernels cannot be saved") == 1
    process = one.start("warm")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "could not be saved: see above" in err
