"""Shards that start in a tenth of a second, forked from a process with all modules loaded.

python nursery.py     prints "ready"; then, for each line of JSON, starts `psserver serve FLAGS` and
                      prints its pid. The line is a dict with the arguments of Nursery.start
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs by itself
sys.path.extend(str(Path(__file__).parents[2] / each) for each in ("", "proto"))

from fault import moments

DIE_WITH_PARENT = 1  # of prctl


class Nursery:
    """The parent process, from open() to close(). It ends all shards that it started."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def start(self, flags: list[str], out: Path, broken: Path, order: Path, cold: bool) -> int:
        """Start a shard and return its pid.

        flags   of `psserver serve`
        out     file for its output
        broken  file with the names of the system calls that fail while the file exists
        order   file that orders it to kill itself: see moments.py
        cold    flush all the time, and give up all rows in memory after each flush
        """
        assert self._process.stdin is not None
        paths = {"out": str(out), "broken": str(broken), "order": str(order)}
        self._process.stdin.write(json.dumps({"flags": flags, **paths, "cold": cold}) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Shard:
    """A shard's server process. It can be killed and started again.

    cold  it flushes all the time, and gives up all rows in memory after each flush
    """

    def __init__(self, nursery: Nursery, out: Path, *flags: str, cold: bool = False) -> None:
        self.out = out
        self.flags = list(flags)
        self.broken = out.with_suffix(".broken")
        self.order = out.with_suffix(".order")
        self.cold = cold
        self.starts = 0
        self._nursery = nursery

    def start(self) -> Shard:
        self.starts += 1
        self.pid = self._nursery.start(self.flags, self.out, self.broken, self.order, self.cold)
        return self

    def wait(self, seconds: float = 60.0) -> None:
        """Wait until the server is ready. AssertionError with its last lines if it ends."""
        deadline = time.monotonic() + seconds
        while not self.said("ready"):
            assert self.alive(), f"{self.flags} ended:\n{self.tail()}"
            assert time.monotonic() < deadline, f"{self.flags} is not ready:\n{self.tail()}"
            time.sleep(0.005)

    def alive(self) -> bool:
        with suppress(OSError):
            os.kill(self.pid, 0)
            return True
        return False

    def kill(self, number: int = signal.SIGKILL, seconds: float = 30.0) -> None:
        """Send a signal and wait until the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        self.ended(seconds)

    def kill_at(self, moment: moments.Moment, seconds: float = 2.0) -> bool:
        """Have the process kill itself at a moment. Return whether the moment came in time.

        If it did not, the process is killed without it.
        """
        moments.give(self.order, moment)
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        came = not self.alive()
        self.kill()
        self.order.unlink()
        return came

    def ended(self, seconds: float = 30.0) -> None:
        """Wait until the process has ended."""
        deadline = time.monotonic() + seconds
        while self.alive():
            assert time.monotonic() < deadline, f"{self.flags} does not end:\n{self.tail()}"
            time.sleep(0.002)

    def log(self) -> list[dict[str, Any]]:
        """Return the log lines of all its processes. A kill can truncate a line."""
        text = self.out.read_text() if self.out.exists() else ""
        return list(_events(text))

    def tail(self) -> str:
        return "\n".join(self.out.read_text().splitlines()[-15:]) if self.out.exists() else ""

    def said(self, event: str) -> bool:
        return (
            self.out.exists()
            and f'"pid": {self.pid}' in self.out.read_text()
            and any(line["event"] == event and line.get("pid") == self.pid for line in self.log())
        )


def _events(text: str) -> Iterator[dict[str, Any]]:
    decoder, at = json.JSONDecoder(), 0
    while (at := text.find('{"', at)) >= 0:
        try:
            found, at = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
            continue
        if "event" in found:
            yield found


def _break(broken: Path) -> None:
    """Make the calls named in a file fail while the file exists."""
    import lmdb

    from storage import base, versionlog
    from storage.disk import Disk

    def failing(name: str) -> Any:
        call = getattr(os, name)

        def wrapped(*args: Any) -> Any:
            if broken.exists() and name in broken.read_text():
                raise OSError(errno.EIO, "the test broke it")
            return call(*args)

        return wrapped

    disk = Disk(pwritev=failing("pwritev"), fdatasync=failing("fdatasync"))
    versionlog.Disk = lambda: disk  # type: ignore[assignment, misc]
    whole = base.Base._try

    def attempt(self: Any, call: Any, *args: Any, **more: Any) -> Any:
        def broken_call(*_: Any, **__: Any) -> None:
            error = lmdb.DiskError("the test broke it")
            error.code = errno.EIO  # type: ignore[misc]
            raise error

        fails = broken.exists() and "lmdb" in broken.read_text()
        return whole(self, broken_call if fails else call, *args, **more)

    base.Base._try = attempt  # type: ignore[method-assign]


def _serve(flags: list[str], out: str, broken: str, order: str, cold: bool) -> None:
    """Run a shard in the child process."""
    from coldservers.sitecustomize import squeeze

    from psserver.config import ConfigError, load
    from psserver.logs import log_to_stderr
    from psserver.process import serve

    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    log_to_stderr()
    _break(Path(broken))
    moments.install(Path(order))
    if cold:
        squeeze()
    os.execv = _again  # type: ignore[assignment]
    try:
        while True:
            with suppress(_Again):
                serve(load(flags))
                break
    except ConfigError as error:
        print(f"psserver: {error}", flush=True)
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class _Again(BaseException):
    """The server restarts after a restore."""


def _again(*_: object) -> None:
    """Take the place of os.execv: a new process would load all modules again."""
    raise _Again


def main() -> None:
    from psserver import cli, warm  # noqa: F401

    warm.warm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _serve(**json.loads(line))
        print(pid, flush=True)


if __name__ == "__main__":
    main()
