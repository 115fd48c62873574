"""What servers refuse, by code and reason, through generated stubs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from stubs import (
    DIM,
    WAIT,
    Conversation,
    Peer,
    embeddings,
    float32,
    keys_of,
    pull_request,
    push_request,
    reasons,
    refusal,
)

from psproto import ps_pb2 as pb


def bad_pushes(name: str, own: list[int], foreign: int) -> dict[str, tuple[str, pb.PushRequest]]:
    """Pushes that a server refuses: what is wrong -> code / reason, the request."""
    one = [own[0]]
    ones = [[1.0] * DIM]
    counts = push_request(name, one, ones)
    counts.counts = b"\1\0\0\0" * 2
    ragged = push_request(name, own[:2], ones)
    ragged.gradients = float32([1.0, 2.0, 3.0])
    torn = push_request(name, one, ones)
    torn.keys += b"\0"
    argument = "INVALID_ARGUMENT/INVALID_ARGUMENT"
    expired = "FAILED_PRECONDITION/SESSION_EXPIRED"
    dim = "INVALID_ARGUMENT/DIM_MISMATCH"
    finite = "INVALID_ARGUMENT/NON_FINITE"
    malformed = "INVALID_ARGUMENT/MALFORMED_MESSAGE"
    session = {"client_id": 77, "incarnation": 5, "sequence": 9}
    return {
        "dim": (dim, push_request(name, one, [[1.0] * (DIM + 1)])),
        "ragged gradients": (dim, ragged),
        "no gradients": (dim, push_request(name, one, [])),
        "gradients without keys": (dim, push_request(name, [], ones)),
        "nan": (finite, push_request(name, one, [[1.0, float("nan")]])),
        "infinity": (finite, push_request(name, one, [[float("-inf"), 1.0]])),
        "sum": (finite, push_request(name, one * 2, [[3e38] * DIM] * 2)),
        "unknown table": ("NOT_FOUND/TABLE_NOT_FOUND", push_request("no.table", one, ones)),
        "no table": (argument, push_request("", one, ones)),
        "foreign key": ("FAILED_PRECONDITION/WRONG_SHARD", push_request(name, [foreign], ones)),
        "counts": (argument, counts),
        "sequence 0": (argument, push_request(name, one, ones, client_id=1)),
        "acknowledged": (
            argument,
            push_request(name, one, ones, client_id=1, sequence=2, acknowledged=2),
        ),
        "step": (argument, push_request(name, one, ones, step=2**47)),
        "step below": (argument, push_request(name, one, ones, step=-(2**47) - 1)),
        "torn keys": (malformed, torn),
        "dtype": (malformed, push_request(name, one, ones, dtype=9)),
        "unknown session": (expired, push_request(name, one, ones, acknowledged=8, **session)),
    }


def bad_pulls(name: str, own: list[int], foreign: int) -> dict[str, tuple[str, pb.PullRequest]]:
    """The same for pulls."""
    torn = pull_request(name, own[:1])
    torn.keys = torn.keys[:-1]
    future = pull_request(name, own[:1], min_version=2**64 - 1)
    argument = "INVALID_ARGUMENT/INVALID_ARGUMENT"
    return {
        "unknown table": ("NOT_FOUND/TABLE_NOT_FOUND", pull_request("no.table", own[:1])),
        "bad name": (argument, pull_request("n" * 4_000, own[:1])),
        "long header": (
            "INVALID_ARGUMENT/MALFORMED_MESSAGE",
            pull_request("n" * 20_000, own[:1]),
        ),
        "foreign key": ("FAILED_PRECONDITION/WRONG_SHARD", pull_request(name, [foreign])),
        "mode": (argument, pull_request(name, own[:1], mode=7)),
        "torn keys": ("INVALID_ARGUMENT/MALFORMED_MESSAGE", torn),
        "dtype": ("INVALID_ARGUMENT/MALFORMED_MESSAGE", pull_request(name, own[:1], dtype=8)),
        "future": ("OUT_OF_RANGE/VERSION_IN_FUTURE", future),
    }


@pytest.mark.parametrize("kind", bad_pushes("", [0, 1], 2))
def test_a_bad_push_is_refused_alike_by_every_method(peer: Peer, name: str, kind: str) -> None:
    peer.create(name)
    foreign = keys_of(0, peer.server.shard_map, 1)[0]
    expected, request = bad_pushes(name, peer.keys(2), foreign)[kind]
    exchange = pb.ExchangeRequest(pushes=[request])
    ends = expected.endswith("/MALFORMED_MESSAGE")
    check_refused(peer, expected, lambda: peer.rows.Push(request), exchange, ends_stream=ends)
    described = peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert described.stats.rows == 0


@pytest.mark.parametrize("kind", bad_pulls("", [0, 1], 2))
def test_a_bad_pull_is_refused_alike_by_every_method(peer: Peer, name: str, kind: str) -> None:
    peer.create(name)
    foreign = keys_of(0, peer.server.shard_map, 1)[0]
    expected, request = bad_pulls(name, peer.keys(2), foreign)[kind]
    exchange = pb.ExchangeRequest(pulls=[request])
    ends = kind in ("torn keys", "long header")
    check_refused(peer, expected, lambda: peer.rows.Pull(request), exchange, ends_stream=ends)


def check_refused(
    peer: Peer,
    expected: str,
    unary: Callable[[], object],
    exchange: pb.ExchangeRequest,
    *,
    ends_stream: bool = False,
) -> None:
    """All three ways of sending a request get the same code, reason and metadata."""
    code, reason = expected.split("/")
    epoch = str(peer.server.shard_map.epoch)
    metadata = {"epoch": epoch} if reason == "WRONG_SHARD" else {}
    wanted = (code, reason, metadata, reason == "OVERLOADED")
    assert refusal(unary) == wanted
    assert refusal(lambda: peer.rows.Exchange(exchange)) == wanted
    stream = Conversation(peer)
    if ends_stream:
        stream.send(exchange)
        assert refusal(lambda: next(stream.responses)) == wanted
    else:
        answer = stream.ask(exchange)
        assert not answer.HasField("exchange")
        assert reasons(answer.error) == wanted
        stream.end()


def test_a_push_of_an_older_incarnation_or_window_is_refused(peer: Peer, name: str) -> None:
    peer.create(name)
    keys = peer.keys(1)

    def push(incarnation: int, sequence: int, acknowledged: int = 0) -> pb.PushRequest:
        return push_request(
            name,
            keys,
            [[1, 1]],
            client_id=4711,
            incarnation=incarnation,
            sequence=sequence,
            acknowledged=acknowledged,
        )

    peer.rows.Push(push(1, 1))
    peer.rows.Push(push(2, 1))
    peer.rows.Push(push(2, 5000))
    for old in (push(1, 2), push(1, 1), push(2, 904), push(2, 1)):
        expected = "FAILED_PRECONDITION/SESSION_EXPIRED"
        exchange = pb.ExchangeRequest(pushes=[old])
        check_refused(peer, expected, lambda old=old: peer.rows.Push(old), exchange)  # type: ignore[misc]
    assert not peer.rows.Push(push(2, 905)).duplicate
    assert peer.rows.Push(push(2, 5000)).duplicate
    assert embeddings(peer.rows.Pull(pull_request(name, keys))) == [[-4, -4]]


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 3},
        {"seed": 1},
        {"serving_default": 1.0},
        {"optimizer": pb.Rule(name="adam")},
        {"initializer": pb.Rule(name="normal")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_schema_is_a_mismatch(peer: Peer, name: str, change: dict[str, Any]) -> None:
    peer.create(name)
    assert refusal(lambda: peer.create(name, **change)) == (
        "FAILED_PRECONDITION",
        "SCHEMA_MISMATCH",
        {},
        False,
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"dim": 0},
        {"dim": 8193},
        {"name": "a b"},
        {"name": ""},
        {"optimizer": pb.Rule(name="best")},
        {"optimizer": pb.Rule(name="sgd", parameters={"lr": float("nan")})},
        {"initializer": pb.Rule(name="zeros", parameters={"value": 1.0})},
        {"serving_default": float("inf")},
    ],
    ids=str,
)
def test_a_bad_schema_is_an_invalid_argument(peer: Peer, name: str, schema: dict[str, Any]) -> None:
    arguments = {"name": name, "dim": DIM, **schema}
    request = pb.CreateTableRequest(schema=pb.TableSchema(**arguments))
    wanted = ("INVALID_ARGUMENT", "INVALID_ARGUMENT", {}, False)
    assert refusal(lambda: peer.tables.CreateTable(request)) == wanted


@pytest.mark.parametrize(
    "method",
    [
        "TableService/CreateTable",
        "TableService/DescribeTable",
        "TableService/ListTables",
        "TableService/DropTable",
        "RowService/Pull",
        "RowService/Push",
        "RowService/Exchange",
        "InfoService/GetServerInfo",
    ],
)
def test_garbage_is_a_malformed_message(peer: Peer, method: str) -> None:
    wanted = ("INVALID_ARGUMENT", "MALFORMED_MESSAGE", {}, False)
    for garbage in (b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"\x07", b"\x0a\x05ab"):
        assert refusal(lambda data=garbage: peer.raw(method, data)) == wanted  # type: ignore[misc]


def test_garbage_ends_a_stream_after_what_came_before_it(peer: Peer, name: str) -> None:
    peer.create(name)
    good = pb.StreamRequest(
        header=pb.StreamRequestHeader(id=1),
        exchange=pb.ExchangeRequest(pulls=[pull_request(name, peer.keys(1))]),
    )
    raw = peer.channel.stream_stream("/ps.v1.RowService/Stream")
    responses = raw(iter([good.SerializeToString(), b"\xff" * 40]), timeout=WAIT)
    assert pb.StreamResponse.FromString(next(responses)).id == 1
    wanted = ("INVALID_ARGUMENT", "MALFORMED_MESSAGE", {}, False)
    assert refusal(lambda: next(responses)) == wanted


@pytest.mark.parametrize("method", ["RowService/Nothing", "NoService/Pull"])
def test_an_unknown_method_is_unimplemented(peer: Peer, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        peer.raw(method, b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_too_many_keys_are_refused(limited: Peer) -> None:
    exchange = pb.ExchangeRequest(pulls=[pull_request("limits", range(1001))])
    limit = "RESOURCE_EXHAUSTED/TOO_MANY_KEYS"
    check_refused(limited, limit, lambda: limited.rows.Pull(exchange.pulls[0]), exchange)
    exchange = pb.ExchangeRequest(
        pushes=[push_request("limits", range(1001), np.ones((1001, DIM)))]
    )
    check_refused(limited, limit, lambda: limited.rows.Push(exchange.pushes[0]), exchange)


def test_a_reply_over_the_limit_is_refused(limited: Peer) -> None:
    limited.create("wide", dim=1024)
    try:
        exchange = pb.ExchangeRequest(pulls=[pull_request("wide", range(33))])
        limit = "RESOURCE_EXHAUSTED/TOO_MANY_KEYS"
        check_refused(limited, limit, lambda: limited.rows.Pull(exchange.pulls[0]), exchange)
        assert len(limited.rows.Pull(pull_request("wide", range(32))).embeddings) == 131072
    finally:
        limited.tables.DropTable(pb.DropTableRequest(name="wide"))


def test_a_message_over_the_limit_is_refused(limited: Peer) -> None:
    pull = pull_request("limits", [1])
    pull.padding = bytes(131072)
    exchange = pb.ExchangeRequest(pulls=[pull])
    large = "RESOURCE_EXHAUSTED/MESSAGE_TOO_LARGE"
    check_refused(limited, large, lambda: limited.rows.Pull(pull), exchange)
    pull.padding = bytes(300_000)  # more than the transport reads
    with pytest.raises(grpc.RpcError) as caught:
        limited.rows.Pull(pull)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_server_with_its_hands_full_asks_to_come_again(limited: Peer) -> None:
    pull = pull_request("limits", [1])
    pull.padding = bytes(70_000)
    exchange = pb.ExchangeRequest(pulls=[pull])
    full = "RESOURCE_EXHAUSTED/OVERLOADED"
    subscribe = limited.channel.unary_stream("/ps.v1.LogService/Subscribe")
    padding = b"\xfa\x7f\xa0\x8d\x06" + bytes(100_000)  # an unknown field
    subscription = subscribe(padding)  # its request counts while it is open
    next(subscription)
    check_refused(limited, full, lambda: limited.rows.Pull(pull), exchange)
    subscription.cancel()


def test_too_many_tables_are_refused(limited: Peer) -> None:
    names = ["limits.2", "limits.3"]
    for name in names:
        limited.create(name)
    wanted = ("RESOURCE_EXHAUSTED", "TOO_MANY_TABLES", {}, False)
    assert refusal(lambda: limited.create("limits.4")) == wanted
    limited.create(names[0])  # exists
    for name in names:
        limited.tables.DropTable(pb.DropTableRequest(name=name))


def test_too_many_sessions_are_refused(limited: Peer) -> None:
    def push(client: int) -> pb.PushRequest:
        return push_request("limits", [1], [[1, 1]], client_id=client, sequence=1)

    for client in (1, 2):
        limited.rows.Push(push(client))
    exchange = pb.ExchangeRequest(pushes=[push(3)])
    full = "RESOURCE_EXHAUSTED/TOO_MANY_SESSIONS"
    check_refused(limited, full, lambda: limited.rows.Push(push(3)), exchange)
    assert limited.rows.Push(push(1)).duplicate
    limited.rows.Push(push_request("limits", [1], [[1, 1]]))  # unprotected


def test_a_push_without_memory_is_refused_and_pulls_go_on(small: Peer) -> None:
    small.create("big", dim=1024)
    try:
        wanted = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", {}, False)
        rows = 0
        while True:
            request = push_request("big", range(rows, rows + 10), np.ones((10, 1024)))
            try:
                small.rows.Push(request)
            except grpc.RpcError:
                break
            rows += 10
            assert rows * 4096 <= 8388608
        assert rows > 100
        exchange = pb.ExchangeRequest(pushes=[request])
        memory = "/".join(wanted[:2])
        check_refused(small, memory, lambda: small.rows.Push(request), exchange)
        described = small.tables.DescribeTable(pb.DescribeTableRequest(name="big"))
        assert described.stats.rows == rows
        pulled = small.rows.Pull(pull_request("big", [0, rows - 1, rows]))
        assert [row[0] for row in embeddings(pulled)] == [-1, -1, 0]
    finally:
        small.tables.DropTable(pb.DropTableRequest(name="big"))
    small.rows.Push(push_request("limits", range(500), np.ones((500, DIM))))


def test_work_past_its_deadline_is_not_done(
    peer: Peer, conversation: Conversation, name: str
) -> None:
    peer.create(name, dim=512, initializer=pb.Rule(name="normal"))
    keys = peer.keys(3000)
    slow = pb.ExchangeRequest(pulls=[pull_request(name, keys)] * 2)
    late = pb.ExchangeRequest(pushes=[push_request(name, keys[:1], np.ones((1, 512)))])
    conversation.send(slow)
    conversation.send(slow)
    id = conversation.send(late, timeout_ms=1)
    for _ in range(2):
        assert not next(conversation.responses).HasField("error")
    answer = next(conversation.responses)
    assert answer.id == id
    wanted = ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", {}, False)
    assert reasons(answer.error) == wanted
    described = peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert described.stats.rows == 0
