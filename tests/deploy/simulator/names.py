"""A DNS server for the names of services and pods: one UDP packet in, one out.

It answers type A with all addresses of a name. A known name without addresses, or asked for with a
different type, has an empty answer. All other names do not exist.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast

TTL = 5  # seconds that a resolver may keep an answer
A, IN = 1, 1
NO_SUCH_NAME = 3
_HEADER = struct.Struct("!6H")
_RECORD = struct.Struct("!HHHIH")
_NAME_OF_QUESTION = 0xC00C  # a pointer to the name at offset 12


def question(packet: bytes) -> tuple[str, int, int]:
    """Return (name, type, offset of the end) of the question in a query. Raises ValueError."""
    labels, at = [], _HEADER.size
    while at < len(packet) and packet[at]:
        length = packet[at]
        labels.append(packet[at + 1 : at + 1 + length].decode("ascii").lower())
        at += 1 + length
    if at + 5 > len(packet):
        raise ValueError("the query ends inside its question")
    (kind,) = struct.unpack_from("!H", packet, at + 1)
    return ".".join(labels), kind, at + 5


def answer(packet: bytes, names: dict[str, list[str]]) -> bytes:
    """Return the reply to a query.

    names  name without final dot -> IPv4 addresses
    """
    name, kind, end = question(packet)
    found = names.get(name)
    addresses = found if found and kind == A else []
    identity, flags = struct.unpack_from("!HH", packet)
    flags = 0x8480 | (flags & 0x0100) | (NO_SUCH_NAME if found is None else 0)
    records = b"".join(
        _RECORD.pack(_NAME_OF_QUESTION, A, IN, TTL, 4) + socket.inet_aton(address)
        for address in addresses
    )
    header = _HEADER.pack(identity, flags, 1, len(addresses), 0, 0)
    return header + packet[_HEADER.size : end] + records


class Names(asyncio.DatagramProtocol):
    """Answers queries from ``names``, which may be replaced at any time."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self._transport is not None
        try:
            self._transport.sendto(answer(data, self.names), addr)
        except (ValueError, struct.error):
            return  # not a query
