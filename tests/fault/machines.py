"""Machines with addresses of their own, made of network namespaces; some may be lost.

A machine that is lost answers nothing, and sends no reset: its packets are dropped. Needs root and
the command ip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

NET = "10.213.0"  # of the machines


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Machine:
    """One machine. Programs in it use the DNS server at 127.0.0.1:53 of this machine."""

    def __init__(self, net: Net, number: int) -> None:
        self.address = f"{NET}.{number}"
        self.name = f"{net.prefix}m{number}"
        self._port = f"{net.prefix}v{number}"
        run("ip", "netns", "add", self.name)
        inside = ["ip", "-n", self.name]
        run("ip", "link", "add", self._port, "type", "veth", "peer", "eth0", "netns", self.name)
        run("ip", "link", "set", self._port, "master", net.bridge, "up")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        self._settings = Path("/etc/netns", self.name)
        self._settings.mkdir(parents=True)
        (self._settings / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1\n")

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs ``command`` on this machine."""
        return ["ip", "netns", "exec", self.name, *command]

    def lose(self) -> None:
        """Drop all packets from and to this machine."""
        run("ip", "link", "set", self._port, "down")

    def remove(self) -> None:
        subprocess.run(["ip", "link", "del", self._port], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)
        shutil.rmtree(self._settings, ignore_errors=True)


class Net:
    """The network that connects the machines."""

    def __init__(self) -> None:
        self.prefix = f"ps{os.getpid() % 100_000}"
        self.bridge = f"{self.prefix}b"
        self._stack = ExitStack()
        run("ip", "link", "add", self.bridge, "type", "bridge", "forward_delay", "0")
        self._stack.callback(run, "ip", "link", "del", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def machine(self, number: int) -> Machine:
        """Add a machine with the address NET.number."""
        made = Machine(self, number)
        self._stack.callback(made.remove)
        return made

    def close(self) -> None:
        self._stack.close()


def _impossible(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def network() -> Iterator[Net]:
    """Yield a Net. Where that is impossible, skip the test, or fail if the variable CI is set."""
    if os.geteuid():
        _impossible("needs root, to create network namespaces")
    if shutil.which("ip") is None:
        _impossible("needs the command ip, to create network namespaces")
    try:
        net = Net()
    except subprocess.CalledProcessError as error:
        _impossible(f"cannot create a network bridge: {error.stderr.strip()}")
    try:
        yield net
    finally:
        net.close()
