"""Run the server process of one shard of a local cluster, and restart it when it dies."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from psserver.addresses import UNDER_UP

QUICK = 5.0  # seconds; a process that ends within them after its start is restarted after a pause
LONGEST_PAUSE = 10.0  # maximum length of this pause, in seconds
_SET_PARENT_DEATH_SIGNAL = 1


def _die_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


class Member:
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
                env={**os.environ, UNDER_UP: "1"},
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
