"""Start the process of node.py in the node's network, and exchange lines with it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

from tests.deploy.simulator.network import NODE_ADDRESS
from tests.deploy.simulator.objects import Object

ROOT = Path(__file__).parents[3]
START_SECONDS = 30.0


class NodeProcess:
    """The Prober of a simulator, and its DNS server."""

    def __init__(self, namespace: str) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m"]
        command += ["tests.deploy.simulator.node", NODE_ADDRESS]
        self._process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._answers: dict[str, bool] = {}
        self._names: dict[str, list[str]] = {}
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(START_SECONDS):
            raise TimeoutError(f"the node's process did not start within {START_SECONDS:.0f} s")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if told["key"] == "listening":
                self._listening.set()
            else:
                self._answers[told["key"]] = told["good"]

    def _write(self, order: Object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def ask(self, key: str, address: str, probe: Object) -> None:
        self._write({"ask": key, "address": address, "probe": probe})

    def answer(self, key: str) -> bool | None:
        return self._answers.pop(key, None)

    def publish(self, names: dict[str, list[str]]) -> None:
        """Let the DNS server answer from these names from now on."""
        if names != self._names:
            self._names = names
            self._write({"names": names})

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._reader.join(10)
        self._process.stdout.close()
