"""Attacks with some rights: mixed requests, the lane of another, names that are paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from lanes import Memory, RawLane, reason
from lanes import pull as lane_pull
from lanes import push as lane_push
from secured import (
    ID,
    METHOD,
    Secured,
    bearer,
    call,
    contents,
    create,
    outcome,
    pull,
    push,
    requests,
    section,
)

from psclient import admin
from psclient.tools import offline
from psproto import codec
from psproto import ps_pb2 as pb

POLICY = (
    section("ops", (["*"], ["*"]))
    + section("mine", (["pull", "push", "subscribe", "load", "import", "delete"], ["mine"]))
    + section("halves", (["push"], ["mine"]), (["pull"], ["other"]))
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("mixed")
    made = Secured(directory, POLICY, "--lane", str(directory)).start()
    with made.channel() as channel:
        create(channel, "mine", bearer("ops"))
        create(channel, "other", bearer("ops"))
    made.checkpoint("first")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def channel(server: Secured) -> Iterator[grpc.Channel]:
    with server.channel() as made:
        yield made


# ---- several tables in one request, of which one is forbidden

MIXED = {  # who -> (tables to push to, tables to pull from)
    "mine": [
        (["mine", "other"], []),
        (["other", "mine"], []),
        ([], ["mine", "other"]),
        (["mine"], ["other"]),
        (["other"], ["mine"]),
        (["mine"] * 20 + ["other"], ["mine"]),
        (["mine"], ["mine"] * 20 + ["missing"]),
        (["mine", "mine/x"], []),
        (["mine", "Mine"], []),
        (["mine", "mine\0"], []),
    ],
    "halves": [
        (["mine"], ["mine"]),
        (["other"], ["other"]),
        (["mine"], ["other", "mine"]),
        (["mine", "other"], ["other"]),
    ],
}
CASES = [(who, *case) for who, cases in MIXED.items() for case in cases]


@pytest.mark.parametrize("way", ["Exchange", "Stream", "lane"])
@pytest.mark.parametrize(("who", "pushes", "pulls"), CASES)
def test_nothing_of_a_mixed_request_is_applied(
    server: Secured, channel: grpc.Channel, way: str, who: str, pushes: list[str], pulls: list[str]
) -> None:
    before = server.state()
    if way == "lane":
        found = over_lane(channel, who, pushes, pulls)
    else:
        parts = codec.Exchange([push(each) for each in pushes], [pull(each) for each in pulls])
        if way == "Stream":
            data = codec.encode_stream_request(pb.StreamRequestHeader(id=1), parts)
        else:
            data = codec.encode_exchange(parts)
        found = outcome(channel, METHOD[way], bytes(data), bearer(who))
    assert found == "PERMISSION_DENIED"
    assert server.state() == before


def over_lane(channel: grpc.Channel, who: str, pushes: list[str], pulls: list[str]) -> str:
    """Make an exchange over the same-host lane, and return the reason of its error."""
    offer = offered(channel, who)
    memory = Memory(offer.token)
    memory.put(64, np.arange(4, dtype=np.uint64))
    memory.put(96, np.ones(16, np.float32))
    with RawLane(offer.path, offer.token) as lane:
        assert reason(lane.register(memory)) == ""
        request = pb.LaneRequest(
            id=9,
            pushes=[lane_push(each, 4, 4, step=1) for each in pushes],
            pulls=[lane_pull(each, 4, 4, at=64, room=4096) for each in pulls],
        )
        found = reason(lane.ask(request))
    memory.close()
    return found


def offered(channel: grpc.Channel, who: str) -> pb.Lane:
    data = call(channel, METHOD["GetServerInfo"], b"", bearer(who))
    return pb.GetServerInfoResponse.FromString(data).lane


def test_the_same_requests_are_applied_with_the_rights(
    server: Secured, channel: grpc.Channel
) -> None:
    """So it was not another reason for which the requests above were refused."""
    for who, pushes, pulls in (("mine", ["mine"], ["mine"]), ("halves", ["mine"], ["other"])):
        before = server.state()
        assert over_lane(channel, who, pushes, pulls) == ""
        assert server.state() != before


OTHERS: dict[str, tuple[str, Message]] = {
    "a subscription to two tables": ("Subscribe", pb.SubscribeRequest(tables=["mine", "other"])),
    "a subscription to all tables": ("Subscribe", pb.SubscribeRequest()),
    "a subscription to a pattern": ("Subscribe", pb.SubscribeRequest(tables=["*"])),
    "a load from another table": (
        "LoadTable",
        pb.LoadTableRequest(name="first", table="other", into="mine", id=ID % 1),
    ),
    "a load into another table": (
        "LoadTable",
        pb.LoadTableRequest(name="first", table="mine", into="other", id=ID % 1),
    ),
    "a load that drops rows": (
        "LoadTable",
        pb.LoadTableRequest(name="first", table="mine", into="mine", id=ID % 1, replace=True),
    ),
    "rows for another table": (
        "WriteRows",
        pb.WriteRowsRequest(table="other", width=4, keys=bytes(8), rows=bytes(16)),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_right_on_one_of_two_tables_is_not_enough(
    server: Secured, channel: grpc.Channel, case: str
) -> None:
    name, request = OTHERS[case]
    before = server.state()
    data = bytes(request.SerializeToString())
    assert outcome(channel, METHOD[name], data, bearer("mine")) == "PERMISSION_DENIED"
    assert server.state() == before


# ---- the lane of another


def test_only_the_exact_token_opens_the_lane(server: Secured, channel: grpc.Channel) -> None:
    offer = offered(channel, "mine")
    good = offer.token
    flipped = bytes([good[0] ^ 1]) + good[1:]
    for token in (b"", good[:-1], good + b"\0", bytes(16), flipped, good[::-1], b"mine", good * 2):
        with RawLane(offer.path) as lane:
            assert reason(lane.ask(pb.LaneRequest(id=1, token=token))) == "LANE_REFUSED"
            assert lane.receive() is None


def test_a_connection_keeps_its_principal(server: Secured, channel: grpc.Channel) -> None:
    """Whoever learns the token of another after that gains nothing on this connection."""
    theirs = offered(channel, "ops").token
    offer = offered(channel, "mine")
    with RawLane(offer.path, offer.token) as lane:
        for id in (2, 3):
            request = pb.LaneRequest(
                id=id, token=theirs, pulls=[pb.LanePull(header=pb.PullHeader(table="other"))]
            )
            assert reason(lane.ask(request)) == "PERMISSION_DENIED"


def test_the_memory_of_another_connection_cannot_be_named(
    server: Secured, channel: grpc.Channel
) -> None:
    offer = offered(channel, "ops")
    memory = Memory(offer.token)
    with RawLane(offer.path, offer.token) as owner, RawLane(offer.path, offer.token) as other:
        assert reason(owner.register(memory)) == ""
        request = pb.LaneRequest(id=9, pulls=[lane_pull("mine", 4, 4, at=64, room=4096)])
        assert reason(owner.ask(request)) == ""
        assert reason(other.ask(request)) == "INVALID_ARGUMENT"
    memory.close()


# ---- names that are paths

EVIL = ["..", "../first", "/etc/passwd", "first/..", "first/../first", ".", "a\0b", "%2e%2e", "a\n"]
EVIL += [
    "a\x1b[2J",
    "a\u202eb",
    "~",
    "$HOME",
    "C:\\x",
    "file:///etc/passwd",
    "\u2025/x",
    "-rf",
    "x" * 5000,
]


def texts(message: Any) -> Iterator[tuple[str, ...]]:
    """The paths of the text fields of a message, and of the messages that it contains."""
    for field in message.DESCRIPTOR.fields:
        if field.type == field.TYPE_STRING:
            yield (field.name,)
        elif field.message_type and not field.is_repeated and message.HasField(field.name):
            for rest in texts(getattr(message, field.name)):
                yield (field.name, *rest)


def changed(message: Any, path: tuple[str, ...], value: str) -> bytes:
    """Return an encoded copy of a message with another text in a field."""
    copy = type(message)()
    copy.CopyFrom(message)
    *outer, name = path
    owner = copy
    for each in outer:
        owner = getattr(owner, each)
    if owner.DESCRIPTOR.fields_by_name[name].is_repeated:
        getattr(owner, name)[:] = [value]
    else:
        setattr(owner, name, value)
    return bytes(copy.SerializeToString())


def filled() -> Iterator[tuple[str, Any]]:
    """(Short name of a method, its request) of all requests that are one message of protobuf."""
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            if method.name not in ("Pull", "Push", "Exchange", "Stream", "Delete", "WriteRows"):
                kind = getattr(pb, method.input_type.name)
                yield method.name, kind.FromString(requests("mine")[method.name])


REFUSED = ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "ALREADY_EXISTS")
FIELDS = [(name, path) for name, request in filled() for path in texts(request)]
PART = pb.CheckpointPart(path="../../secret", bytes=10, checksum="0" * 32)


def everything(server: Secured) -> dict[str, str]:
    """The files of the server, and those next to them, apart from the audit log."""
    (server.directory / "secret").write_text("{}")
    return {
        path: digest for path, digest in contents(server.directory) if path != str(server.audit)
    }


@pytest.mark.parametrize(("name", "path"), FIELDS, ids=lambda each: str(each))
def test_no_text_of_a_request_is_a_path(
    server: Secured, channel: grpc.Channel, name: str, path: tuple[str, ...]
) -> None:
    """Every text field of every request, in the name of a principal with all rights."""
    request = dict(filled())[name]
    before, files = server.state(), everything(server)
    for value in EVIL:
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, METHOD[name], changed(request, path, value), bearer("ops"))
        error: Any = caught.value
        assert error.code().name in REFUSED, value
        assert error.details().isprintable(), value  # nothing that a terminal would obey
        assert len(error.details()) < 1200
    server.settle()
    assert server.state() == before
    assert everything(server) == files


def test_a_part_of_a_checkpoint_is_no_path(server: Secured, channel: grpc.Channel) -> None:
    (server.directory / "secret").write_text("{}")
    for path in ("../../secret", "/etc/passwd", f"{ID % 1}/../../../secret", "", "a\0b"):
        request = pb.CompleteCheckpointRequest(name="later", attempt=ID % 1, parts=[PART])
        request.parts[0].path = path
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, METHOD["CompleteCheckpoint"], request.SerializeToString(), bearer("ops"))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "expected the file" in error.details()


def test_a_server_that_reads_a_checkpoint_serves_one_user(server: Secured) -> None:
    """psctl export --checkpoint starts a server, to whose port every user of the machine can
    connect.
    """
    location = str(server.directory / "checkpoints" / "first")
    with offline.opened(location) as (client, name):
        assert set(admin.describe(client, name).rows) == {"mine", "other"}
        address = client._connect().links[0].channel.route.address
        with grpc.insecure_channel(address) as other:
            for method in ("ListCheckpoints", "DeleteCheckpoints", "ReadRows", "Restore"):
                found = outcome(other, METHOD[method], requests("mine")[method])
                assert found == "UNAUTHENTICATED"
        (own,) = [line for line in commands() if address.partition(":")[2] in line]
        assert "checkpoints" not in " ".join(own)  # a URL may have a password


def commands() -> Iterator[list[str]]:
    """The words of the command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_text(errors="replace").split("\0")
