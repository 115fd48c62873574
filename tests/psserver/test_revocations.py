"""A right or a credential that is revoked ends the streams, subscriptions and lanes that use it."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lanes import RawLane, reason
from secured import METHOD, Secured, bearer, call, create, outcome, requests, section, streamed

from psproto import codec
from psproto import ps_pb2 as pb

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

    def end(self) -> str:
        """Wait for the end, and return the name of its status code."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self.replies)
        self.requests.put(None)
        error: Any = caught.value
        return str(error.code().name)


@pytest.mark.parametrize("operation", ["WriteCheckpoint", "LoadTable", "DeleteCheckpoints"])
@pytest.mark.parametrize("revoked", LESS)
def test_everything_that_is_open_ends(
    server: Secured, channel: grpc.Channel, revoked: str, operation: str
) -> None:
    """The calls are idle, or wait for a request that continues them."""
    policy, code = LESS[revoked]
    server.change(OPS + section("trainer", (["*"], ["t"])))
    data = requests("t") | {
        "WriteCheckpoint": pb.WriteCheckpointRequest(
            name="later", attempt="0" * 16, until_barrier="never"
        ).SerializeToString()
    }
    names = ("Stream", "Subscribe", operation)
    opened = {name: Open(channel, name, data[name], "trainer") for name in names}
    kept = Open(channel, "Stream", streamed(1, "t"), "ops")
    before = server.state()[:3]
    began = time.monotonic()
    server.change(OPS + policy)
    assert {name: each.end() for name, each in opened.items()} == dict.fromkeys(names, code)
    assert time.monotonic() - began < 60
    assert server.state()[:3] == before
    kept.requests.put(streamed(2, "t"))
    assert codec.decode_stream_response(next(kept.replies))[0] == 2
    kept.requests.put(None)


def test_reflection_ends(server: Secured, channel: grpc.Channel) -> None:
    server.change(OPS + section("trainer", (["admin"], [])))
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    asked.put(reflection_pb2.ServerReflectionRequest(list_services=""))
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    replies = stub.ServerReflectionInfo(iter(asked.get, None), metadata=bearer("trainer"))
    next(replies)
    server.change(OPS + section("trainer", (["status"], [])))
    with pytest.raises(grpc.RpcError) as caught:
        next(replies)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
    asked.put(None)


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
    assert old.end() == "UNAUTHENTICATED"
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
