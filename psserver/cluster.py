"""Run all shards of a cluster on this machine: one process per shard, restarted when it dies."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from psserver.addresses import bare_host, join
from psserver.config import ConfigError
from psserver.datadir import unusable

QUICK = 5.0  # seconds; a process that ends within them after its start is restarted after a pause
LONGEST_PAUSE = 10.0  # maximum length of this pause, in seconds
LAST_PORT = 65535
LOOK_SECONDS = 0.05  # seconds between two checks of the processes
_SET_PARENT_DEATH_SIGNAL = 1


def _die_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


class _Member:
    """Starts the server process of one shard at once, and again when the process has died.

    shard    number of the shard
    command  program and arguments
    log      file to which the stderr of the process is appended
    """

    def __init__(self, shard: int, command: Sequence[str], log: Path) -> None:
        self.shard = shard
        self.ready = threading.Event()
        self._command = command
        self._log = log
        self._pause = 0.0
        self.start()

    def start(self) -> None:
        """Start the process, and a thread that sets ``ready`` when the process prints "ready"."""
        self._started = time.monotonic()
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=log,
                preexec_fn=_die_with_parent,
            )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == b"ready":
                self.ready.set()

    @property
    def failed(self) -> bool:
        """Whether the process ended before its shard was ready for the first time."""
        return self.process.poll() is not None and not self.ready.is_set()

    def restart_if_dead(self) -> None:
        """Restart the process if it has ended.

        A process that ended within seconds of its start is restarted only after a pause, which
        doubles each time, up to LONGEST_PAUSE.
        """
        if self.process.poll() is None:
            return
        quick = time.monotonic() - self._started < QUICK + self._pause
        pause = min(max(2 * self._pause, 0.5), LONGEST_PAUSE) if quick else 0.0
        if quick and time.monotonic() - self._started < pause:
            return
        self._pause = pause
        print(
            f"shard {self.shard} exited with status {self.process.returncode}; restarting it",
            file=sys.stderr,
            flush=True,
        )
        self.start()

    def error(self) -> str:
        """Return the error message of the process: the last 10 lines that it wrote to stderr.

        JSON log lines are left out, unless there is nothing else.
        """
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        messages = [line for line in lines if not line.startswith("{")]
        return "\n".join((messages or lines)[-10:])


def up(
    shards: int, host: str, port: int, metrics_port: int, data_dir: Path, flags: Sequence[str]
) -> int:
    """Run shard i on port + i until SIGTERM or SIGINT; print ``ready`` once all shards serve.

    shards        number of shards
    metrics_port  port for the metrics of shard 0; shard i uses metrics_port + i; 0: no metrics
    data_dir      directory; shard i uses its subdirectory shard-i and its file shard-i.log
    flags         further flags, passed to every ``psserver serve``

    Returns the exit status: 0 after a signal, 1 if a shard did not start. Raises ConfigError if a
    setting is invalid.
    """
    host = _check(shards, host, port, metrics_port, data_dir)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    members = []
    for shard in range(shards):
        command = [sys.executable, "-m", "psserver", "serve", "--shard", str(shard)]
        command += ["--shards", str(shards), "--host", host, "--port", str(port + shard)]
        command += ["--metrics-port", str(metrics_port + shard if metrics_port else 0)]
        command += ["--data-dir", str(data_dir / f"shard-{shard}")]
        command += ["--colocated-shards", str(shards), *flags]
        members.append(_Member(shard, command, data_dir / f"shard-{shard}.log"))
    return _supervise(members, stop, [join(host, port + shard) for shard in range(shards)])


def _supervise(members: Sequence[_Member], stop: threading.Event, addresses: list[str]) -> int:
    """Restart processes that die, until ``stop`` is set; then end all processes.

    addresses  printed after "ready" once all shards serve

    Returns the exit status: 0 after ``stop``, 1 if a shard did not start.
    """
    status = 0
    if _ready(members, stop):
        print("ready", *addresses, flush=True)
        while not stop.wait(LOOK_SECONDS):
            for member in members:
                member.restart_if_dead()
    elif not stop.is_set():
        status = 1
    for member in members:
        member.process.terminate()
    for member in members:
        member.process.wait()
    return status


def _check(shards: int, host: str, port: int, metrics_port: int, data_dir: Path) -> str:
    """Check the settings that all shards share, and create ``data_dir``.

    Returns the host, without the brackets of an IPv6 address. Raises ConfigError for an invalid
    host, a port larger than 65535, or a directory that cannot be written.
    """
    try:
        host = bare_host(host)
    except ValueError as error:
        raise ConfigError(f"host: {error}, got {host!r}") from error
    for name, first in (("port", port), ("metrics_port", metrics_port)):
        if first + shards - 1 > LAST_PORT:
            raise ConfigError(
                f"{name}: {shards} shards use the ports {first} to {first + shards - 1}, but the"
                f" largest port is {LAST_PORT}: choose a smaller {name}"
            )
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for shard in range(shards):
            (data_dir / f"shard-{shard}.log").open("ab").close()
    except OSError as error:
        raise unusable(data_dir, error) from error
    return host


def _ready(members: Sequence[_Member], stop: threading.Event) -> bool:
    """Wait until all shards serve. Return False after a signal, or if a shard does not start.

    stop  set by the signal handler

    The error of the shard that does not start is printed to stderr.
    """
    while not stop.wait(LOOK_SECONDS):
        for member in members:
            if member.failed:
                print(f"shard {member.shard} did not start:\n{member.error()}", file=sys.stderr)
                return False
        if all(member.ready.is_set() for member in members):
            return True
    return False
