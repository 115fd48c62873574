"""The client's end of a same-host lane, against a server that answers only what it is told to."""

from __future__ import annotations

import array
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from psclient import cluster, lanelink
from psclient.errors import NoLane
from psclient.lanelink import LaneLink
from psclient.lanepipe import LanePipe
from psclient.regions import SMALLEST
from psclient.routes import Route
from psclient.session import Call, Session
from psclient.stream import StreamLink
from psproto import codec, lanes
from psproto import ps_pb2 as pb


class Peer:
    """A server with one connection, which answers its first message.

    sizes  sizes of the files whose descriptors have arrived
    """

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.sizes: list[int] = []
        self.received = b""
        self.greeted = threading.Event()
        self.thread = threading.Thread(target=self.greet)
        self.thread.start()

    def greet(self) -> None:
        self.socket, _ = self.listener.accept()
        try:
            self.message()
        except ConnectionError:
            return
        self.answer(0)
        self.greeted.set()

    def close(self) -> None:
        self.thread.join()
        self.socket.close()
        self.listener.close()

    def message(self) -> pb.LaneRequest:
        while True:
            if len(self.received) >= 4:
                end = 4 + lanes.LENGTH.unpack_from(self.received)[0]
                if len(self.received) >= end:
                    message, self.received = self.received[4:end], self.received[end:]
                    return pb.LaneRequest.FromString(message)
            data, rights, _, _ = self.socket.recvmsg(1 << 16, socket.CMSG_SPACE(64))
            if not data:
                raise ConnectionError
            self.received += data
            for _, _, contents in rights:
                for fd in array.array("i", contents):
                    self.sizes.append(os.fstat(fd).st_size)
                    os.close(fd)

    def answer(self, id: int) -> None:
        """Answer the first message with success, others with an error."""
        answer = pb.Status(code=3, message="no") if id else codec.Exchanged([], [])
        self.socket.sendall(lanes.framed(lanes.encode_response(id, answer)))


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "lane.sock")
    yield peer
    peer.close()


@pytest.fixture
def pipe(peer: Peer, tmp_path: Path) -> LanePipe:
    pipe = LanePipe(pb.Lane(path=str(tmp_path / "lane.sock"), token=bytes(16)))
    pipe._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return pipe


def call(id: int, keys: int = 1, pulls: int = 1) -> Call:
    """A call with some prefetches, which have no arrays in their answers."""
    asked = [
        codec.PullMessage(pb.PullHeader(table="t", prefetch=True), np.arange(keys, dtype=np.uint64))
        for _ in range(pulls)
    ]
    call = Call(codec.Exchange([], asked), time.monotonic() + 60)
    call.id = id
    return call


def received(pipe: LanePipe) -> Callable[[], int]:
    """Begin to wait for a reply. Returns a function that returns the id of the reply."""
    ids: list[int] = []
    thread = threading.Thread(target=lambda: ids.append(pipe.receive()[0]), daemon=True)
    thread.start()

    def wait() -> int:
        thread.join(60)
        assert ids, "no reply"
        return ids[0]

    return wait


def until(peer: Peer, id: int) -> None:
    """Read the messages of a client up to one."""
    done = threading.Event()

    def read() -> None:
        while peer.message().id != id:
            pass
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(60), "the message did not arrive"


def test_a_message_that_is_larger_than_the_socket_is_sent_while_nothing_is_answered(
    pipe: LanePipe, peer: Peer
) -> None:
    assert peer.greeted.wait(60)
    pipe.send(call(1, pulls=2000))
    wait = received(pipe)
    until(peer, 1)
    peer.answer(1)
    assert wait() == 1


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 20])
def test_answers_may_arrive_in_pieces_or_together(pipe: LanePipe, peer: Peer, cut: int) -> None:
    assert peer.greeted.wait(60)
    first, second, third = (
        lanes.framed(lanes.encode_response(id, pb.Status(code=3, message="no"))) for id in (1, 2, 3)
    )
    wait = received(pipe)
    peer.socket.sendall(first[:cut])
    time.sleep(0.01)  # so that the piece is probably read alone
    peer.socket.sendall(first[cut:] + second)
    assert wait() == 1
    assert received(pipe)() == 2
    peer.socket.sendall(third)
    assert received(pipe)() == 3


def test_a_thread_that_waits_for_an_answer_sleeps_while_its_request_is_read(
    pipe: LanePipe, peer: Peer
) -> None:
    """Else each request would wake the thread, and the server that reads it would pay for that."""
    assert peer.greeted.wait(60)
    pipe.send(call(1))
    began = threading.Event()
    ids: list[int] = []

    def receive() -> None:
        began.set()
        ids.append(pipe.receive()[0])

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    assert began.wait(60)
    status = Path(f"/proc/self/task/{thread.native_id}/status")

    def switches() -> int:
        found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status.read_text(), re.M)
        assert found is not None
        return int(found[1])

    before = -1
    while before != switches():
        before = switches()
        time.sleep(0.1)
    until(peer, 1)
    time.sleep(0.1)
    assert switches() == before
    peer.answer(1)
    thread.join(60)
    assert ids == [1]


def test_memory_is_registered_even_if_the_socket_has_no_room(pipe: LanePipe, peer: Peer) -> None:
    assert peer.greeted.wait(60)
    id = 0
    while not pipe._unsent:
        pipe.send(call(id := id + 1))
    pipe.send(call(id := id + 1, keys=SMALLEST // 8))
    wait = received(pipe)
    until(peer, id)
    peer.answer(id)
    assert wait() == id
    assert peer.sizes == [SMALLEST, 2 * SMALLEST]


def test_a_server_of_another_user_gets_nothing(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have put its socket where the one of the shard would be on another host."""
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(NoLane, match=rf"has the user id {user}, and this one {user + 1}: client"):
        LanePipe(pb.Lane(path=str(tmp_path / "lane.sock"), token=bytes(16)))
    assert not peer.greeted.is_set()


def test_a_lane_opens_before_the_first_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is held meanwhile, so that no other call can end at its deadline."""
    allowed = []

    def pipe(_: Any, seconds: float) -> Any:
        allowed.append(seconds)
        raise NoLane("none")

    monkeypatch.setattr(lanelink, "LanePipe", pipe)
    link = LaneLink("shard 0", Route("127.0.0.1:1"), Session(1, 1), demanded=True)
    for seconds in (0.5, 1000.0, -1.0):
        link._offer = pb.Lane(path="/nowhere")
        calls = [call(1), call(2)]
        calls[1].deadline = time.monotonic() + seconds
        link._new_pipe(calls)
    assert 0 < allowed[0] <= 0.5
    assert allowed[1:] == [lanelink.HELLO_SECONDS, lanelink.SHORTEST]
    link.close()


def test_deadlines_of_other_shards_are_watched_while_a_lane_opens() -> None:
    """A server that hangs may take some seconds, in which the lock of its link is held."""
    busy, other = (StreamLink("a shard", Route("127.0.0.1:1"), Session(1, 1)) for _ in range(2))
    late = call(0)
    late.deadline = time.monotonic() - 60
    other._open[0] = late
    stop: SimpleQueue[None] = SimpleQueue()
    thread = threading.Thread(target=cluster._watch, args=([busy, other], stop))
    with busy.lock:
        thread.start()
        until = time.monotonic() + 60
        while not late.done:
            assert time.monotonic() < until
            time.sleep(0.01)
    stop.put(None)
    thread.join()


def test_a_call_that_is_sent_on_two_pipes_was_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pushes may have been applied, so they must not be numbered anew."""
    sent: list[int] = []

    class Fake:
        def send(self, call: Call) -> None:
            sent.append(call.id)

        def end(self) -> None: ...

        def cancel(self) -> None: ...

    def new_pipe(calls: Any) -> Any:
        for each in calls:
            sent.append(each.id)
        return Fake()

    link = StreamLink("shard 0", Route("127.0.0.1:1"), Session(1, 1))
    monkeypatch.setattr(link, "_new_pipe", new_pipe)
    first, second = call(0), call(0)
    link.submit(first)
    link._drop_pipe()
    link.submit(second)
    assert sent == [1, 1, 2]
    assert (first.attempts, second.attempts) == (2, 1)
    link.close()
