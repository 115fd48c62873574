"""Network namespaces: one for the node, one per pod, and a cable between each pod and the node.

Nothing is connected to the network of this machine. Addresses are given out in turn, so that a pod
never gets the address that its predecessor had.
"""

from __future__ import annotations

import os
import subprocess
from itertools import count

BRIDGE = "pods"
NODE_ADDRESS = "10.99.0.1"


class NetworkFailed(RuntimeError):
    """Raised if a command that changes a network fails."""


def ip(*words: str, script: str = "") -> None:
    """Run the command ip. script: further commands for its standard input, one per line."""
    done = subprocess.run(("ip", *words), input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkFailed(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Network:
    """The node's namespace, and the pods' namespaces that are connected to it.

    node  name of the node's namespace
    """

    def __init__(self) -> None:
        self.node = f"ps-sim-{os.getpid()}"
        self._numbers = count(2)
        self._cables: dict[str, str] = {}  # namespace of a pod -> the node's end of its cable

    def open(self) -> None:
        ip("netns", "add", self.node)
        lines = ["link set lo up", f"link add {BRIDGE} type bridge"]
        lines += [f"addr add {NODE_ADDRESS}/16 dev {BRIDGE}", f"link set {BRIDGE} up"]
        ip("-n", self.node, "-batch", "-", script="\n".join(lines))

    def connect(self) -> tuple[str, str]:
        """Make the namespace of a pod. Returns (name of the namespace, address of the pod)."""
        number = next(self._numbers)
        name, cable = f"{self.node}-{number}", f"v{number}"
        address = f"10.99.{number // 250}.{number % 250 + 2}"
        ip("netns", "add", name)
        self._cables[name] = cable
        pair = ["link", "add", cable, "netns", self.node, "type", "veth"]
        ip(*pair, "peer", "name", "eth0", "netns", name)
        ip("-n", self.node, "link", "set", cable, "master", BRIDGE, "up")
        lines = [f"addr add {address}/16 dev eth0", "link set eth0 up", "link set lo up"]
        ip("-n", name, "-batch", "-", script="\n".join(lines))
        return name, address

    def cut(self, namespace: str) -> None:
        """Drop all packets to and from a pod from now on; nobody is told."""
        ip("-n", self.node, "link", "set", self._cables[namespace], "down")

    def mend(self, namespace: str) -> None:
        """Undo ``cut``."""
        ip("-n", self.node, "link", "set", self._cables[namespace], "up")

    def disconnect(self, namespace: str) -> None:
        """Remove the namespace of a pod."""
        del self._cables[namespace]
        ip("netns", "del", namespace)

    def close(self) -> None:
        for namespace in list(self._cables):
            self.disconnect(namespace)
        ip("netns", "del", self.node)
