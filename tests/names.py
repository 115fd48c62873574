"""A DNS server for the tests: addresses of names, which change under the clients.

As a process: python names.py FILE PORT. FILE contains {name: [addresses]} as JSON, and is
read again for every question.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HEADER = struct.Struct(">HHHHHH")
ANSWER = struct.Struct(">HHHIH")
TYPES = {4: 1, 6: 28}  # version of an IP address -> type of its record: A, AAAA
NO_SUCH_NAME = 3
TTL_SECONDS = 5

Zone = Mapping[str, Sequence[str]]


def reply(question: bytes, zone: Zone) -> tuple[str, bytes]:
    """Answer one message: the name that it asks for, and the message to send."""
    number, flags, _, _, _, _ = HEADER.unpack_from(question)
    labels, at = [], HEADER.size
    while size := question[at]:
        labels.append(question[at + 1 : at + 1 + size].decode())
        at += 1 + size
    name, (kind,) = ".".join(labels).lower(), struct.unpack_from(">H", question, at + 1)
    answers = b""
    count = 0
    for text in zone.get(name, ()):
        address = ipaddress.ip_address(text)
        if TYPES[address.version] == kind:
            packed = address.packed
            answers += ANSWER.pack(0xC00C, kind, 1, TTL_SECONDS, len(packed)) + packed
            count += 1
    status = 0 if name in zone else NO_SUCH_NAME
    header = HEADER.pack(number, 0x8480 | flags & 0x0100 | status, 1, count, 0, 0)
    return name, header + question[HEADER.size : at + 5] + answers


def answer(sock: socket.socket, zone: Callable[[], Zone], asked: list[tuple[float, str]]) -> None:
    """Answer questions until an empty one; append (time, name) of each to ``asked``."""
    while True:
        question, peer = sock.recvfrom(4096)
        if not question:
            return
        name, message = reply(question, zone())
        asked.append((time.monotonic(), name))
        sock.sendto(message, peer)


class Names:
    """A DNS server on a thread. ``names[name] = addresses``; ``del names[name]``."""

    def __init__(self) -> None:
        self.zone: dict[str, Sequence[str]] = {}
        self.asked: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        arguments = (self._socket, lambda: dict(self.zone), self.asked)
        self._thread = threading.Thread(target=answer, args=arguments)
        self._thread.start()

    def close(self) -> None:
        self._socket.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()


if __name__ == "__main__":
    file, port = Path(sys.argv[1]), int(sys.argv[2])
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", port))
    print("ready", flush=True)
    answer(server, lambda: json.loads(file.read_text()), [])
