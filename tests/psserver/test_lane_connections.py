"""Connections of the same-host lane, without a server: sockets, turns, descriptors."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lanes import offer_of
from servers import free_ports, serve

from psclient import Client
from psproto import codec, lanes
from psproto import ps_pb2 as pb
from psserver import lane as module
from psserver.flow import SERVED
from psserver.lane import Lanes, _listen
from psserver.laneconnection import PIECE, Connection, Gone
from psserver.security.guard import NOBODY, Guard

TOKEN = bytes(16)
MESSAGES = 50


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server's and the client's end of a connection."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def client_of(connection: socket.socket) -> Connection:
    limits: Any = None
    loop = asyncio.get_running_loop()
    served = Lanes(Path("lane.sock"), 1 << 20, Guard())
    served._proofs[TOKEN] = NOBODY
    known = served.actor_of, served.regions, limits
    return Connection(connection, loop, *known, ExitStack(), memoryview(bytearray(PIECE)))


def test_others_are_served_between_two_messages_that_have_arrived(ends: Any) -> None:
    """Else a client that sends without a pause would keep the event loop for itself."""
    ours, theirs = ends
    hello = lanes.framed(pb.LaneRequest(token=TOKEN).SerializeToString())
    theirs.sendall(hello + MESSAGES * lanes.framed(pb.LaneRequest(id=3).SerializeToString()))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def read_all() -> None:
        client = client_of(ours)
        task = asyncio.create_task(others())
        for _ in range(MESSAGES):
            request = await client.read()
            assert isinstance(request, tuple)
            assert request[0].id == 3
        task.cancel()

    asyncio.run(read_all())
    assert turns >= MESSAGES - 1


def test_a_lone_message_is_served_in_the_callback_of_the_socket(ends: Any) -> None:
    """All others, and those that cannot be served at once, reach the task that reads."""
    ours, theirs = ends
    client: Any = None
    offered: list[int] = []
    answers: list[Any] = [None, SERVED, False, None, codec.Malformed("no request")]

    def accept(message: Any) -> Any:
        offered.append(message[0].id)
        answer = answers[len(offered) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def send(*ids: int) -> None:
        several = [lanes.framed(pb.LaneRequest(id=id).SerializeToString()) for id in ids]
        theirs.sendall(b"".join(several))

    async def until(count: int) -> None:
        while len(offered) < count:
            await asyncio.sleep(0)

    async def reading() -> asyncio.Task[Any]:
        read = asyncio.create_task(client.read())
        while client._waiter is None:
            await asyncio.sleep(0)
        return read

    async def run() -> None:
        nonlocal client
        client = client_of(ours)
        theirs.sendall(lanes.framed(pb.LaneRequest(token=TOKEN, id=9).SerializeToString()))
        read = await reading()
        client.accept = accept
        send(1)
        await until(1)
        assert not read.done()
        send(2)
        assert await read is SERVED
        read = await reading()
        send(3)
        assert (await read)[0].id == 3
        read = await reading()
        send(4)
        await until(4)
        send(5, 6)  # two at once
        assert [(await read)[0].id, (await client.read())[0].id] == [5, 6]
        read = await reading()
        send(7)
        with pytest.raises(codec.Malformed):
            await read
        client.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert offered == [1, 2, 3, 4, 7]


def test_a_reply_that_waits_ends_when_the_connection_is_closed(ends: Any) -> None:
    """Else it would wait for ever, and keep its memory."""
    ours, _ = ends

    async def close() -> None:
        client = client_of(ours)
        write = asyncio.create_task(client.write(bytes(8 << 20)))
        await asyncio.sleep(0)
        assert not write.done()
        client.close()
        with pytest.raises(Gone):
            await asyncio.wait_for(write, 60)

    asyncio.run(close())


def test_a_message_of_very_many_empty_parts_is_refused_before_it_is_parsed() -> None:
    """Protobuf would need a gigabyte for two million of them."""
    with pytest.raises(lanes.TooManyFields):
        lanes.parse(b"\x1a\x00" * (lanes.LONG // 2 + 1))
    most = pb.LaneRequest(id=1, pulls=[pb.LanePull(keys=pb.Slice(size=8))] * lanes.MOST_PARTS)
    assert len(lanes.parse(most.SerializeToString()).pulls) == lanes.MOST_PARTS


def test_the_lane_pauses_if_there_are_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    class NoDescriptors:
        def __init__(self, inner: socket.socket) -> None:
            self.inner = inner
            self.fileno, self.close = inner.fileno, inner.close

        def accept(self) -> Any:
            nonlocal calls
            calls += 1
            if calls <= 2:
                raise OSError(errno.EMFILE, "Too many open files")
            return self.inner.accept()

    async def run() -> None:
        served = Lanes(tmp_path / "lane.sock", 1 << 20, Guard())
        served.listen()
        nothing: Any = None
        served.open(nothing, nothing)
        inner: Any = NoDescriptors(served._listener)  # type: ignore[arg-type]
        served._listener = inner
        accepted = asyncio.Event()

        async def serve(connection: socket.socket) -> None:
            connection.close()
            accepted.set()

        monkeypatch.setattr(served, "_serve", serve)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "lane.sock"))
            for _ in range(100):
                await asyncio.sleep(0)
            assert calls == 1
            monkeypatch.setattr(module, "NO_DESCRIPTORS_SECONDS", 0.0)
            await asyncio.wait_for(accepted.wait(), 60)
            assert calls == 3
        await served.close(60)

    asyncio.run(run())


def test_the_socket_of_a_server_that_hangs_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "lane.sock"
    with socket.socket(socket.AF_UNIX) as hangs, socket.socket(socket.AF_UNIX) as waits:
        hangs.bind(str(path))
        hangs.listen(0)
        waits.connect(str(path))  # no further one has room
        with pytest.raises(FileExistsError, match="another server listens there"):
            _listen(path)
    _listen(path).close()  # the server has ended, and left its socket


def started(path: Path, *flags: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
    """A server with a data directory, and its address."""
    port = str(free_ports(1))
    where = ["--port", port, "--metrics-port", "0", "--data-dir", str(path)]
    return serve(*where, *flags, **variables), f"127.0.0.1:{port}"


@pytest.mark.slow
def test_a_server_starts_without_the_lane_that_is_only_its_default(tmp_path: Path) -> None:
    """Some file systems cannot have sockets."""
    (tmp_path / "lane.sock").mkdir(parents=True)
    server, _ = started(tmp_path, "--lane", "on")
    _, told = server.communicate(timeout=120)
    assert server.returncode == 2
    assert "lane.sock exists, and is not a socket" in told
    server, address = started(tmp_path, PS_UNDER_UP="1")
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        with Client([address]) as client:
            client.list_tables()
            assert not offer_of(client).path
    finally:
        server.terminate()
        _, told = server.communicate()
    assert server.returncode == 0
    assert "no same-host lane" in told
