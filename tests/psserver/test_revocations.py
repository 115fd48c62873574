"""A right or a credential that is revoked ends the streams, subscriptions and lanes that use it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from lanes import RawLane, reason
from secured import (
    ID,
    METHOD,
    REPLIES,
    Recording,
    Secured,
    bearer,
    call,
    create,
    enumerated,
    outcome,
    requests,
    schema,
    section,
    streamed,
)
from servers import eventually

from psclient import Follower, Subscriber
from psclient.errors import PermissionDenied, Unauthenticated
from psproto import codec
from psproto import ps_pb2 as pb
from psserver import restore
from psserver.deletion import Deletion
from psserver.work import Progress

OPS = section("ops", (["*"], ["*"]))
LESS = {
    "a right on its table": (section("trainer", (["pull", "push"], ["u"])), "PERMISSION_DENIED"),
    "all rights": (section("trainer"), "PERMISSION_DENIED"),
    "its credential": ("", "UNAUTHENTICATED"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("revoked")
    made = Secured(directory, OPS, "--lane", str(directory)).start()
    with made.channel() as channel:
        create(channel, "t", bearer("ops"))
        create(channel, "u", bearer("ops"))
    made.checkpoint("first")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def channel(server: Secured) -> Iterator[grpc.Channel]:
    with server.channel() as made:
        yield made


class Open:
    """A call that stays open: its requests are sent when the test sends them."""

    def __init__(self, channel: grpc.Channel, name: str, first: bytes, who: str) -> None:
        self.requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method, metadata = METHOD[name], bearer(who)
        if method.requests:
            self.requests.put(first)
            sent = iter(self.requests.get, None)
            self.replies = channel.stream_stream(method.path)(sent, metadata=metadata, timeout=120)
        else:
            self.replies = channel.unary_stream(method.path)(first, metadata=metadata, timeout=120)
        next(self.replies)

    def end(self) -> tuple[str, int]:
        """Wait for the end. Returns the name of its status code, and the number of messages before
        it.
        """
        replies: list[bytes] = []
        with pytest.raises(grpc.RpcError) as caught:
            replies.extend(self.replies)
        self.requests.put(None)
        error: Any = caught.value
        return str(error.code().name), len(replies)


# methods with a stream of replies -> what keeps a call open until its right is revoked
IDLE = ("Stream", "Subscribe", "ServerReflectionInfo")  # there is nothing to send
WAITING = ("WriteCheckpoint", "LoadTable", "DeleteCheckpoints")  # for a barrier, or a Continue
READING = ("VerifyCheckpoint", "PrepareRestore")  # a checkpoint; held at the gate
SENDING = ("ReadRows", "Analyze", "VerifyRows")  # many messages; the second is held at the gate
OPEN_TO_ALL = ("Watch",)  # needs no credential that could be revoked


def test_every_method_that_stays_open_has_a_case(channel: grpc.Channel) -> None:
    """As the server itself lists them, so that a new method needs a case here."""
    found = enumerated(channel, bearer("ops"))
    names = {each.path.rpartition("/")[2] for each in found if each.replies}
    assert names == {*IDLE, *WAITING, *READING, *SENDING, *OPEN_TO_ALL} == set(REPLIES)
    assert not [each for each in found if each.requests and not each.replies]


def lasting(server: Secured) -> tuple[Any, ...]:
    """The state of the server without files that a restore prepares."""
    version, rows, files, _ = server.state()
    return version, rows, {path: data for path, data in files.items() if "/restore/" not in path}


@pytest.mark.parametrize("name", [*IDLE, *WAITING, *READING, *SENDING])
@pytest.mark.parametrize("revoked", LESS)
def test_everything_that_is_open_ends(
    server: Secured,
    channel: grpc.Channel,
    revoked: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a moment, whether it works, waits or is idle, and nothing is changed any more."""
    policy, code = LESS[revoked]
    if name == "ServerReflectionInfo" and revoked == "a right on its table":
        policy = section("trainer", (["status"], []))  # the right on no table
    server.change(OPS + section("trainer", (["*"], ["t"])))
    server.settle()
    data = requests("t") | {
        "WriteCheckpoint": pb.WriteCheckpointRequest(
            name="later", attempt="0" * 16, until_barrier="never"
        ).SerializeToString()
    }
    gate, add, stage = threading.Event(), Progress.add, restore.stage
    if name == "VerifyCheckpoint":
        monkeypatch.setattr(Progress, "add", lambda *args: (gate.wait(60), add(*args))[1])
    monkeypatch.setattr(restore, "stage", lambda *args: (stage(*args), gate.wait(60))[0])
    monkeypatch.setattr(Recording, "gate", gate)
    assert server.server._data is not None
    server.server._data.flusher.flush()  # so that VerifyRows has rows to verify
    kept = Open(channel, "Stream", streamed(1, "u"), "ops")
    opened = Open(channel, name, data[name], "trainer")
    before = lasting(server)
    began = time.monotonic()
    server.change(OPS + policy)
    if name not in READING:  # else the call ends while its thread still works
        gate.set()
    found, replies = opened.end()
    assert found == code
    if name in SENDING:
        assert replies == 0
    assert time.monotonic() - began < 30
    gate.set()
    server.settle()
    assert lasting(server) == before
    assert server.server._service._restores.running is None
    assert not list(server.data.glob("restore/*"))
    kept.requests.put(streamed(2, "u"))
    assert codec.decode_stream_response(next(kept.replies))[0] == 2
    kept.requests.put(None)


def test_a_deletion_stops_between_two_checkpoints(
    server: Secured, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, gate, removed = [f"old-{at}" for at in range(3)], threading.Event(), list[str]()
    for name in names:
        server.checkpoint(name)
    server.change(OPS + section("trainer", (["delete_checkpoints"], [])))
    remove = Deletion._remove

    def gated(self: Deletion, name: str) -> None:
        remove(self, name)
        removed.append(name)
        gate.wait(60)

    monkeypatch.setattr(Deletion, "_remove", gated)
    request = pb.DeleteCheckpointsRequest(names=names, id=ID % 7)
    opened = Open(channel, "DeleteCheckpoints", request.SerializeToString(), "trainer")
    begin = pb.ContinueRequest(id=ID % 7, step=pb.ContinueRequest.STEP_START)
    call(channel, METHOD["Continue"], begin.SerializeToString(), bearer("trainer"))
    eventually(lambda: removed)
    server.change(OPS)
    assert opened.end()[0] == "UNAUTHENTICATED"
    gate.set()
    server.settle()
    assert removed == names[:1]
    left = server.server._service._checkpoints.catalog.names()
    assert [name for name in names if name in left] == names[1:]


@pytest.mark.parametrize("name", ["ReadRows", "Subscribe"])
def test_what_a_client_does_not_read_ends(
    server: Secured, channel: grpc.Channel, name: str
) -> None:
    """The server waits with a message in hand, for which the client has no room."""
    table = f"large.{name}"
    server.change(OPS + section("trainer", (["*"], [table])))
    made = bytes(pb.CreateTableRequest(schema=schema(table, 256)).SerializeToString())
    call(channel, METHOD["CreateTable"], made, bearer("ops"))
    keys = np.arange(20_000, dtype=np.uint64)
    for part in np.split(keys, 4):
        sent = codec.PushMessage(
            pb.PushHeader(table=table), part, None, np.ones((len(part), 256), np.float32)
        )
        call(channel, METHOD["Push"], bytes(codec.encode_push(sent)), bearer("ops"))
    limits, feed = server.server._service._limits, server.server._service._feed
    with server.channel() as own:
        opened = Open(own, name, requests(table)[name], "trainer")
        seen = -1
        while seen != (seen := Recording.made + feed.messages):  # the server can send no more
            time.sleep(0.3)
        assert limits._calls + feed.subscribers == 1
        server.change(OPS)
        eventually(lambda: not limits._calls and not feed.subscribers)
        code, replies = opened.end()
    assert code == "UNAUTHENTICATED"
    assert replies < 30
    call(channel, METHOD["DropTable"], requests(table)["DropTable"], bearer("ops"))


@pytest.mark.parametrize("revoked", LESS)
def test_a_subscriber_and_a_follower_end(server: Secured, tmp_path: Path, revoked: str) -> None:
    """They tell their user the reason, and do not try again for ever."""
    policy, code = LESS[revoked]
    server.change(OPS + section("trainer", (["subscribe"], ["t"])))
    token = tmp_path / "token"
    token.write_text("trainer")
    expected = {"PERMISSION_DENIED": PermissionDenied, "UNAUTHENTICATED": Unauthenticated}[code]
    where: Any = [server.address]
    with (
        Subscriber(where, tables=["t"], start="latest", token_file=str(token)) as subscriber,
        Follower(where, tables=["t"], token_file=str(token)) as follower,
    ):
        feed = server.server._service._feed
        subscriber.open()
        follower.open()
        assert feed is not None
        eventually(lambda: feed.subscribers == 2)
        server.change(OPS + policy)
        with pytest.raises(expected):
            list(subscriber)
        with pytest.raises(expected):
            eventually(lambda: follower.pull("t", [1]) is None)


def test_a_stream_goes_on_if_the_rights_that_it_uses_stay(
    server: Secured, channel: grpc.Channel
) -> None:
    server.change(OPS + section("trainer", (["pull", "push"], ["t", "u"])))
    opened = Open(channel, "Stream", streamed(1, "t"), "trainer")
    server.change(OPS + section("trainer", (["pull", "push"], ["t"])))
    for id, table, allowed in ((2, "t", True), (3, "u", False), (4, "t", True)):
        opened.requests.put(streamed(id, table))
        found, answer = codec.decode_stream_response(next(opened.replies))
        assert (found, isinstance(answer, pb.Status)) == (id, not allowed)
    opened.requests.put(None)


def test_a_token_is_replaced_without_an_interruption(
    server: Secured, channel: grpc.Channel
) -> None:
    """Rotation: add the new token, change the clients, remove the old token."""

    def both(*tokens: str) -> str:
        sections = section("trainer", (["pull", "push"], ["t"])).splitlines()
        digests = [section(token).splitlines()[1].partition("= [")[2][:-1] for token in tokens]
        return OPS + "\n".join([sections[0], f"tokens = [{', '.join(digests)}]", *sections[2:]])

    server.change(both("old", "new"))
    old = Open(channel, "Stream", streamed(1, "t"), "old")
    new = Open(channel, "Stream", streamed(1, "t"), "new")
    server.change(both("new"))
    assert old.end() == ("UNAUTHENTICATED", 0)
    new.requests.put(streamed(2, "t"))
    assert codec.decode_stream_response(next(new.replies))[0] == 2
    new.requests.put(None)


def test_a_broken_file_changes_nothing(server: Secured, channel: grpc.Channel) -> None:
    server.change(OPS + section("trainer", (["pull", "push"], ["t"])))
    opened = Open(channel, "Stream", streamed(1, "t"), "trainer")
    file = server.server._guard.file
    assert file is not None
    failed = file.failed
    server.write("[principals.")
    while file.failed == failed:
        time.sleep(0.02)
    opened.requests.put(streamed(2, "t"))
    assert codec.decode_stream_response(next(opened.replies))[0] == 2
    opened.requests.put(None)
    assert outcome(channel, METHOD["Pull"], requests("t")["Pull"], bearer("trainer")) == "OK"


class TestLane:
    """The same-host lane knows the principal of a connection by the token of the lane."""

    def offer(self, channel: grpc.Channel, who: str) -> pb.Lane:
        data = call(channel, METHOD["GetServerInfo"], b"", bearer(who))
        return pb.GetServerInfoResponse.FromString(data).lane

    def ask(self, lane: RawLane, id: int, table: str) -> str:
        """Pull no keys from a table; return the reason of the error, or ""."""
        pull = pb.LanePull(header=pb.PullHeader(table=table))
        return reason(lane.ask(pb.LaneRequest(id=id, pulls=[pull])))

    def test_each_credential_has_its_own_token(
        self, server: Secured, channel: grpc.Channel
    ) -> None:
        server.change(OPS + section("trainer", (["pull"], ["t"])))
        tokens = {self.offer(channel, who).token for who in ("ops", "trainer")}
        assert len(tokens) == 2
        assert {self.offer(channel, who).token for who in ("ops", "trainer")} == tokens

    def test_an_exchange_is_checked(self, server: Secured, channel: grpc.Channel) -> None:
        server.change(OPS + section("trainer", (["pull"], ["t"])))
        offer = self.offer(channel, "trainer")
        with RawLane(offer.path, offer.token) as lane:
            assert self.ask(lane, 2, "t") == ""
            assert self.ask(lane, 3, "u") == "PERMISSION_DENIED"
            assert self.ask(lane, 4, "x") == "PERMISSION_DENIED"
            assert self.ask(lane, 5, "t") == ""

    @pytest.mark.parametrize("revoked", LESS)
    def test_an_idle_connection_ends(
        self, server: Secured, channel: grpc.Channel, revoked: str
    ) -> None:
        policy, code = LESS[revoked]
        server.change(OPS + section("trainer", (["pull", "push"], ["t"])))
        offer = self.offer(channel, "trainer")
        with RawLane(offer.path, offer.token) as lane:
            assert self.ask(lane, 2, "t") == ""
            server.change(OPS + policy)
            reply = lane.receive()
            assert reply is not None
            assert (reply.id, reason(reply)) == (0, code)
            assert lane.receive() is None

    def test_the_token_of_a_revoked_credential_opens_nothing(
        self, server: Secured, channel: grpc.Channel
    ) -> None:
        server.change(OPS + section("trainer", (["pull"], ["t"])))
        offer = self.offer(channel, "trainer")
        server.change(OPS)
        with RawLane(offer.path) as lane:
            reply = lane.ask(pb.LaneRequest(id=1, token=offer.token))
            assert reason(reply) == "UNAUTHENTICATED"
            assert lane.receive() is None
        server.change(OPS + section("trainer", (["pull"], ["t"])))
        with RawLane(offer.path) as lane:  # it was forgotten
            assert reason(lane.ask(pb.LaneRequest(id=1, token=offer.token))) == "LANE_REFUSED"
        assert self.offer(channel, "trainer").token != offer.token

    def test_tokens_of_revoked_credentials_are_forgotten(
        self, server: Secured, channel: grpc.Channel
    ) -> None:
        lanes = server.server._lanes
        assert lanes is not None
        for number in range(5):
            server.change(OPS + section(f"job-{number}", (["pull"], ["t"])))
            self.offer(channel, f"job-{number}")
        self.offer(channel, "ops")
        assert len(lanes._tokens) == len(lanes._proofs) <= 2
