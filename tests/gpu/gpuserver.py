"""Servers of one shard as processes, with rows on the fake device, on a GPU, or on neither."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from psclient import Client

FAKE = Path(__file__).with_name("serve_on_fake.py")
READY_SECONDS = 300.0  # a first start compiles all kernels, for the CPU and for the GPU


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class GpuServer:
    """`psserver serve` with a data directory, from start() to stop().

    device  "fake": on the fake device; "gpu": on a GPU; "": without rows in GPU memory
    fails   file that makes the fake device fail, see serve_on_fake.py
    """

    def __init__(self, directory: Path, device: str, *flags: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.device = directory, device
        self.port, self.metrics_port = free_port(), free_port()
        self.address = [f"127.0.0.1:{self.port}"]
        self.fails = directory / "fails"
        self._errors = directory / "stderr"
        self._flags = flags

    def start(self) -> GpuServer:
        """Start the process and wait until it serves."""
        self.launch()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # "": it has ended
        assert line == "ready\n", self.errors
        return self

    def launch(self) -> None:
        program = [str(FAKE)] if self.device == "fake" else ["-m", "psserver"]
        command = [sys.executable, *program, "serve", "--port", str(self.port)]
        command += ["--metrics-port", str(self.metrics_port)]
        command += ["--data-dir", str(self.directory / "data"), *self._flags]
        root = FAKE.parents[2]
        paths = [str(root / "proto"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": os.pathsep.join(paths), "FAKE_FILE": str(self.fails)}
        with self._errors.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **variables},
            )

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait until the process has ended, and return the exit status."""
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def connect(self) -> Client:
        return Client(self.address, timeout=60)

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def metric(self, name: str, table: str = "", tier: str = "") -> float:
        """Return the value of a metric, or of the sample with these labels."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as page:
            text = page.read().decode()
        labels = [f'{k}="{v}"' for k, v in (("table", table), ("tier", tier)) if v]
        where = re.escape("{" + ",".join(labels) + "}") if labels else ""
        found = re.search(rf"^{name}{where} (\S+)$", text, re.M)
        assert found is not None, f"no {name} with {labels}"
        return float(found[1])
