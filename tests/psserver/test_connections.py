"""Messages that are announced and not finished: what the server holds of them, and for how long."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from peers import Peer, until, with_server

from psserver import connections
from psserver.connections import LARGE, Connection, Connections
from psserver.peers import counts, peer_name, sockets

MIB = 1 << 20


class Sender:
    """A raw HTTP/2 client that begins messages; ``send`` puts in what the windows allow."""

    def __init__(self, port: int, path: str = "/ps.v1.RowService/Pull") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.window = self.connection = self.initial = 65_535
        self.sent = 0
        self.over = False
        self._read = b""
        self._begun = False
        self.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, headers(path))
        )
        self.socket.setblocking(False)

    def send(self, size: int, announced: int, seconds: float = 5) -> None:
        """Send up to ``size`` bytes of a message of ``announced`` bytes."""
        end = time.monotonic() + seconds
        while self.sent < size and not self.over and time.monotonic() < end:
            self._take()
            room = min(16_384, self.window, self.connection, size - self.sent)
            if room <= 5:
                time.sleep(0.005)
                continue
            head = b"" if self._begun else b"\0" + struct.pack(">I", announced)
            self._begun = True
            self._put(frame(0, 0, 1, head + bytes(room - len(head))))
            self.window -= room
            self.connection -= room
            self.sent += room

    def closed(self) -> bool:
        """Whether the server has closed the connection."""
        try:
            while True:
                if not self.socket.recv(1 << 16):
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _put(self, data: bytes) -> None:
        self.socket.setblocking(True)
        try:
            self.socket.sendall(data)
        except OSError:
            self.over = True
        self.socket.setblocking(False)

    def _take(self) -> None:
        try:
            while data := self.socket.recv(1 << 16):
                self._read += data
            self.over = True
        except BlockingIOError:
            pass
        except OSError:
            self.over = True
        while len(self._read) >= 9 + (size := int.from_bytes(self._read[:3])):
            kind, flags = self._read[3], self._read[4]
            stream, body = int.from_bytes(self._read[5:9]), self._read[9 : 9 + size]
            self._read = self._read[9 + size :]
            self._handle(kind, flags, stream, body)

    def _handle(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == 8 and stream:
            self.window += int.from_bytes(body)
        elif kind == 8:
            self.connection += int.from_bytes(body)
        elif kind == 4 and not flags:
            for at in range(0, len(body), 6):
                if int.from_bytes(body[at : at + 2]) == 4:
                    value = int.from_bytes(body[at + 2 : at + 6])
                    self.window, self.initial = self.window + value - self.initial, value
            self._put(frame(4, 1, 0))
        elif kind == 6 and not flags:
            self._put(frame(6, 1, 0, body))
        elif kind in (1, 3, 7):
            self.over = True


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + body


def headers(path: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(
        b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in fields.items()
    )


@contextmanager
def senders(peer: Peer, count: int, **more: Any) -> Iterator[list[Sender]]:
    there = [Sender(peer.port, **more) for _ in range(count)]
    try:
        yield there
    finally:
        for sender in there:
            sender.socket.close()


def watch(peer: Peer) -> Connections:
    return peer.server._listener.connections


def test_a_message_over_the_limit_is_refused_as_soon_as_it_is_announced() -> None:
    async def act(peer: Peer) -> int:
        with senders(peer, 1) as (sender,):
            await in_thread(sender.send, 100 * MIB, 100 * MIB)
            assert sender.over
            return sender.sent

    assert with_server(act, "--max-message-bytes", str(8 * MIB)) <= 6 * MIB


async def in_thread(call: Any, *args: Any) -> Any:
    return await asyncio.to_thread(call, *args)


@pytest.mark.slow
def test_a_large_message_that_is_not_finished_in_time_costs_its_connection() -> None:
    async def act(peer: Peer) -> None:
        with senders(peer, 1) as (sender,):
            await in_thread(sender.send, 20 * MIB, 30 * MIB)
            await until(lambda: 15 * MIB < watch(peer).unfinished < 25 * MIB)
            await until(sender.closed)
            await until(lambda: watch(peer).unfinished == 0)
            assert watch(peer).closed == 1
        await peer.call("TableService/ListTables", b"")

    with_server(act, "--receive-seconds", "15")  # longer than the message takes on a busy machine


@pytest.mark.slow
def test_unfinished_messages_are_held_up_to_a_limit_in_all() -> None:
    async def act(peer: Peer) -> None:
        with senders(peer, 6) as there:
            for sender in there:
                await in_thread(sender.send, 9 * MIB, 10 * MIB)
            await until(lambda: watch(peer).closed >= 2)
            await until(lambda: watch(peer).unfinished <= 32 * MIB)
            assert there[0].closed()  # the oldest
        await peer.call("TableService/ListTables", b"")

    with_server(act, "--max-inflight-bytes", str(32 * MIB), "--max-message-bytes", str(16 * MIB))


def test_whole_messages_leave_nothing_unfinished() -> None:
    async def act(peer: Peer) -> list[int]:
        found = []
        for size in (100, 3 * MIB, 30 * MIB):
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError, match="table name"):
                    await peer.call("RowService/Pull", b"\xfa\x7f" + varint(size) + bytes(size))
            watch(peer).look()
            found.append(watch(peer).unfinished)
        assert watch(peer).closed == 0
        return found

    assert with_server(act) == [0, 0, 0]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


# ---- the counts


def make(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> tuple[Connections, dict[str, Any]]:
    there: dict[str, Any] = {}
    watch = Connections(1, 100 * MIB, 60.0, lambda: clock[0])
    monkeypatch.setattr(
        connections, "sockets", lambda _: [(peer, line) for peer, (line, _, _) in there.items()]
    )
    monkeypatch.setattr(
        connections,
        "counts",
        lambda asked: next(tuple(found) for line, *found in there.values() if line is asked),
    )
    return watch, there


class Closed:
    """A socket that can be shut."""

    def __init__(self) -> None:
        self.shut = False

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_RDWR
        self.shut = True


def test_a_slow_large_message_is_given_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, line = [0.0], Closed()
    watch, there = make(monkeypatch, clock)
    for second in range(59):
        clock[0], there["a"] = float(second), (line, (second + 1) * MIB, 0)
        watch.look()
    watch.arrived("a", 59 * MIB)
    clock[0] = 100.0
    watch.look()
    assert (line.shut, watch.unfinished, watch.closed) == (False, 0, 0)


def test_the_time_begins_anew_with_each_large_message(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, line = [0.0], Closed()
    watch, there = make(monkeypatch, clock)
    received = 0
    for second in range(0, 1000, 50):
        received += 20 * MIB
        clock[0], there["a"] = float(second), (line, received, 0)
        watch.look()
        watch.arrived("a", 20 * MIB)
        clock[0] += 1
        watch.look()
    assert not line.shut


def test_the_frames_of_a_connection_that_only_reads_are_no_unfinished_message() -> None:
    connection, received, sent = Connection(0.0), 0, 0
    for _ in range(10_000):
        sent += 100 * MIB
        received += 13 * 2 * (100 * MIB // (64 << 10))  # a window update for each 64 KiB
        connection.update(received, sent, 0)
    assert connection.unfinished < LARGE


def test_many_small_calls_are_no_unfinished_message() -> None:
    connection, received, arrived = Connection(0.0), 0, 0
    for _ in range(10_000):
        received += 1000 * (100 + 5 + 9 + 120)
        arrived += 1000 * (100 + 256)
        connection.update(received, 0, arrived)
    assert connection.unfinished == 0


def test_peers_that_are_gone_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, there = make(monkeypatch, [0.0])
    there["a"] = (Closed(), 5, 0)
    watch.arrived("a", 1)
    watch.arrived("b", 1)
    watch.look()
    assert set(watch._arrived) == set(watch._known) == {"a"}
    del there["a"]
    watch.look()
    assert not watch._arrived
    assert not watch._known


def test_a_connection_that_is_made_during_a_check_keeps_its_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, there = make(monkeypatch, [0.0])
    listed = connections.sockets

    def made_meanwhile(port: int) -> Iterator[Any]:
        yield from listed(port)
        if not there:  # so the next list is the first that has it
            there["a"] = (Closed(), 50 * MIB, 0)
            watch.arrived("a", 50 * MIB)

    monkeypatch.setattr(connections, "sockets", made_meanwhile)
    watch.look()
    watch.look()
    assert (watch.unfinished, watch.closed) == (0, 0)


def test_a_message_that_arrives_while_the_kernel_is_asked_is_not_unfinished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, there = make(monkeypatch, [0.0])
    there["a"] = (Closed(), 0, 0)
    asked = connections.counts

    def arrives_meanwhile(line: Any) -> Any:
        found = asked(line)
        if not there["a"][1]:
            there["a"] = (line, 50 * MIB, 0)
            watch.arrived("a", 50 * MIB)
        return found

    monkeypatch.setattr(connections, "counts", arrives_meanwhile)
    watch.look()
    watch.look()
    assert (watch.unfinished, watch.closed) == (0, 0)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (("127.0.0.1", 5), "ipv4:127.0.0.1:5"),
        (("::1", 5, 0, 0), "ipv6:%5B::1%5D:5"),
        (("::ffff:10.0.0.1", 5, 0, 0), "ipv4:10.0.0.1:5"),
    ],
)
def test_a_peer_is_named_as_grpc_names_it(address: Any, name: str) -> None:
    assert peer_name(address) == name


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_counts_for_both_families(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)) as client:
            there, address = listener.accept()
            client.sendall(bytes(1000))
            with there:
                time.sleep(0.05)
                found = [(peer, counts(line)) for peer, line in sockets(port)]
                assert found == [(peer_name(address), (1000, 0))]
                there.sendall(b"")
