"""Run a local cluster: one process per shard, restarted when it dies."""

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

QUICK = 5.0  # seconds; a shard that dies sooner is restarted only after a pause
LONGEST_PAUSE = 10.0  # seconds
LAST_PORT = 65535
_SET_PARENT_DEATH_SIGNAL = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


class _Member:
    """One shard's process."""

    def __init__(self, shard: int, command: Sequence[str], log: Path) -> None:
        self.shard = shard
        self.ready = threading.Event()
        self._command = command
        self._log = log
        self._pause = 0.0
        self.start()

    def start(self) -> None:
        self._started = time.monotonic()
        with self._log.open("ab") as log:
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

    def revive(self) -> None:
        """Restart the process if it died and its pause is over."""
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

    def log_tail(self) -> str:
        """Return the last lines of the shard's log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])


def up(
    shards: int, host: str, port: int, metrics_port: int, data_dir: Path, flags: Sequence[str]
) -> int:
    """Run shard i on port + i until SIGTERM or SIGINT; print ``ready`` once all shards serve.

    metrics_port  of shard 0; shard i uses metrics_port + i; 0 turns metrics off
    data_dir      gets a directory and a log file for each shard
    flags         passed to every ``psserver serve``

    Returns the exit status: 0 after a signal, 1 if a shard did not start. Raises ConfigError.
    """
    try:
        host = bare_host(host)
    except ValueError as error:
        raise ConfigError(f"host: {error}, got {host!r}") from error
    for name, first in (("port", port), ("metrics_port", metrics_port)):
        if first + shards - 1 > LAST_PORT:
            raise ConfigError(f"{name}: {shards} shards need ports up to {first + shards - 1}")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / "shard-0.log").open("ab").close()
    except OSError as error:
        raise ConfigError(str(unusable(data_dir, error))) from error
    members = []
    for shard in range(shards):
        command = [sys.executable, "-m", "psserver", "serve", "--shard", str(shard)]
        command += ["--shards", str(shards), "--host", host, "--port", str(port + shard)]
        command += ["--metrics-port", str(metrics_port + shard if metrics_port else 0)]
        command += ["--data-dir", str(data_dir / f"shard-{shard}")]
        command += ["--colocated-shards", str(shards), *flags]
        members.append(_Member(shard, command, data_dir / f"shard-{shard}.log"))
    status = 0
    announced = False
    while not stop.wait(0.05):
        if not announced:
            dead = [m for m in members if m.process.poll() is not None and not m.ready.is_set()]
            if dead:
                print(
                    f"shard {dead[0].shard} did not start:\n{dead[0].log_tail()}", file=sys.stderr
                )
                status = 1
                break
            if all(member.ready.is_set() for member in members):
                addresses = " ".join(join(host, port + shard) for shard in range(shards))
                print(f"ready {addresses}", flush=True)
                announced = True
        else:
            for member in members:
                member.revive()
    for member in members:
        member.process.terminate()
    for member in members:
        member.process.wait()
    return status
