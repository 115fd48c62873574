"""Real servers for the tests: `psserver up` and `psserver serve` on free ports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ports import free_ports
from prometheus_client.parser import text_string_to_metric_families
from squeeze import environment

READY_SECONDS = 100.0  # the first start compiles the kernels
STOP_SECONDS = 30.0
SEGMENT = 16 << 20  # bytes of a log's file: many clusters run at once
SETPRIV = shutil.which("setpriv")


def _with_me(command: list[str]) -> list[str]:
    """Return a command whose process gets SIGTERM when this process ends, even if it is killed.

    The system sends the signal at the end of the thread that starts the command. So commands of
    other threads than the main one stay as they are.
    """
    main = threading.current_thread() is threading.main_thread()
    return ["setpriv", "--pdeathsig", "TERM", *command] if main and SETPRIV else command


def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until ``condition()`` is true, and return its value. Fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(0.02)
    return value


class Cluster:
    """`psserver up` as a process, from start() to stop()."""

    def __init__(self, shards: int, *flags: str, metrics: bool = False) -> None:
        self.shards = shards
        self.port = free_ports(2 * shards)
        self.metrics_port = self.port + shards if metrics else 0
        self.addresses = [f"127.0.0.1:{self.port + shard}" for shard in range(shards)]
        self.flags = flags
        self._directory = tempfile.TemporaryDirectory(prefix="ps-test-")
        self.directory = Path(self._directory.name)

    def start(self) -> Cluster:
        """Start the processes and wait until all serve."""
        self.launch()
        try:
            eventually(self._ready, READY_SECONDS)
        except BaseException:
            self.stop()
            raise
        return self

    def launch(self) -> None:
        """Start the processes."""
        command = [sys.executable, "-m", "psserver", "up", "--shards", str(self.shards)]
        command += ["--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        command += ["--data-dir", str(self.directory / "data"), "--segment-bytes", str(SEGMENT)]
        command += self.flags
        with self._file("out").open("wb") as out, self._file("err").open("wb") as err:
            self.process = subprocess.Popen(
                _with_me(command),
                stdout=out,
                stderr=err,
                env=environment(),
                start_new_session=True,
            )

    def stop(self) -> int:
        """Send SIGTERM, and SIGKILL to all if that does not help. Return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise
        finally:
            self._directory.cleanup()

    @property
    def output(self) -> str:
        return self._file("out").read_text()

    @property
    def errors(self) -> str:
        return self._file("err").read_text()

    def log(self, shard: int) -> list[dict[str, Any]]:
        """Return the log lines of a shard."""
        path = self.directory / "data" / f"shard-{shard}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    def pids(self, shard: int) -> list[int]:
        """Return the pids of the processes that reported to be ready, oldest first."""
        return [entry["pid"] for entry in self.log(shard) if entry["event"] == "ready"]

    def metrics(
        self, shard: int, table: str | None = None
    ) -> dict[tuple[str, Mapping[str, str]], float]:
        """Return the samples of /metrics by name and labels; of one table, if it is given."""
        return scrape(self.metrics_port + shard, table)

    def _ready(self) -> bool:
        assert self.process.poll() is None, f"psserver ended: {self.errors}"
        return self.output.startswith("ready")

    def _file(self, name: str) -> Path:
        return self.directory / f"up.{name}"


class Labels(dict[str, str]):
    """Return labels in a hashable form."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def scrape(port: int, table: str | None = None) -> dict[tuple[str, Mapping[str, str]], float]:
    """Return the samples of http://127.0.0.1:port/metrics by name and labels.

    table  if given, only samples with this label are parsed: a page may have thousands of tables
    """
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    if table is not None:
        lines = text.splitlines(keepends=True)
        text = "".join(line for line in lines if line[0] == "#" or f'table="{table}"' in line)
    return {
        (sample.name, Labels(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def serve(*flags: str, **variables: str) -> subprocess.Popen[str]:
    """`psserver serve` as a process; its first line of output is "ready"."""
    return serve_in(None, *flags, **variables)


def serve_in(
    enter: Callable[[], None] | None, *flags: str, **variables: str
) -> subprocess.Popen[str]:
    """`psserver serve` as a process that first calls ``enter``, for example to enter a cgroup."""
    return subprocess.Popen(
        _with_me([sys.executable, "-m", "psserver", "serve", *flags]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **variables},
        preexec_fn=enter,
    )


def alive(pid: int) -> bool:
    """Return whether a process is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
