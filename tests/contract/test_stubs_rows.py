"""Rows through generated stubs alone: tables, routing, pulls, pushes and exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from stubs import DIM, Conversation, Peer, embeddings, pull_request, push_request, shard_of, uint64

from psproto import ps_pb2 as pb


def test_a_table_is_created_described_listed_and_dropped(peer: Peer, name: str) -> None:
    peer.create(name)
    peer.create(name)
    described = peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert described.schema == pb.TableSchema(
        name=name,
        dim=DIM,
        optimizer=pb.Rule(name="sgd", parameters={"lr": 1.0}),
        initializer=pb.Rule(name="zeros"),
        durability=pb.DURABILITY_LOG,
        admission=pb.Rule(name="always"),
        max_step_ahead=100_000_000,
    )
    assert described.stats.rows == 0
    listed = peer.tables.ListTables(pb.ListTablesRequest()).tables
    assert [table.schema.name for table in listed].count(name) == 1
    peer.tables.DropTable(pb.DropTableRequest(name=name))
    with pytest.raises(grpc.RpcError) as caught:
        peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_keys_route_as_the_comments_say(peers: list[Peer], name: str) -> None:
    keys = [*range(-50, 50), 2**63 - 1, -(2**63), *(n << 20 for n in range(1, 100))]
    for peer in peers:
        peer.create(name)
        own = [key for key in keys if shard_of(key, peer.server.shard_map) == peer.server.shard]
        assert own
        peer.rows.Push(push_request(name, own, [[key % 97, 1] for key in own]))
        pulled = peer.rows.Pull(pull_request(name, own))
        assert embeddings(pulled) == [[-(key % 97), -1] for key in own]


def test_the_server_sums_repeated_keys(peer: Peer, name: str) -> None:
    peer.create(name)
    a, b = peer.keys(2)
    version = peer.rows.Push(push_request(name, [a, b, a, a], [[1, 2], [3, 4], [5, 6], [7, 8]]))
    pulled = peer.rows.Pull(pull_request(name, [b, a, b], with_metadata=True))
    assert embeddings(pulled) == [[-3, -4], [-13, -16], [-3, -4]]
    assert np.frombuffer(pulled.frequencies, "<u8").tolist() == [1, 3, 1]
    assert np.frombuffer(pulled.versions, "<u8").tolist() == [version.version] * 3
    assert pulled.header == pb.PullResponseHeader(
        version=version.version, dim=DIM, dtype=pb.DTYPE_FLOAT32
    )


def test_counts_and_steps_travel(peer: Peer, name: str) -> None:
    peer.create(name)
    a, b, absent = peer.keys(3)
    request = push_request(name, [a, b, a], np.ones((3, DIM)), step=-7)
    request.counts = np.array([5, 1, 2], "<u4").tobytes()
    peer.rows.Push(request)
    pulled = peer.rows.Pull(pull_request(name, [a, b, absent], with_metadata=True))
    assert np.frombuffer(pulled.frequencies, "<u8").tolist() == [7, 1, 0]
    assert np.frombuffer(pulled.steps, "<i8").tolist() == [-7, -7, 0]
    assert np.frombuffer(pulled.versions, "<u8")[2] == 0


def test_a_learning_rate_of_zero_is_one(peer: Peer, name: str) -> None:
    peer.create(name)
    (key,) = peer.keys(1)
    peer.rows.Push(push_request(name, [key], [[1, 1]], lr=0.0))
    peer.rows.Push(push_request(name, [key], [[1, 1]], lr=0.5))
    assert embeddings(peer.rows.Pull(pull_request(name, [key]))) == [[-0.5, -0.5]]


@pytest.mark.parametrize(
    ("dtype", "encode", "decode"),
    [
        (
            pb.DTYPE_BFLOAT16,
            lambda x: (np.asarray(x, "<f4").view("<u4") >> 16).astype("<u2").tobytes(),
            lambda b: (np.frombuffer(b, "<u2").astype("<u4") << 16).view("<f4"),
        ),
        (
            pb.DTYPE_FLOAT16,
            lambda x: np.asarray(x, "<f2").tobytes(),
            lambda b: np.frombuffer(b, "<f2"),
        ),
    ],
)
def test_numbers_travel_in_sixteen_bits(
    peer: Peer, name: str, dtype: int, encode: Callable[..., bytes], decode: Any
) -> None:
    peer.create(name)
    keys = peer.keys(2)
    header = pb.PushHeader(table=name, dtype=dtype)  # type: ignore[arg-type]
    gradients = encode([[1.5, -2], [0.25, 100]])
    peer.rows.Push(pb.PushRequest(header=header, keys=uint64(keys), gradients=gradients))
    pulled = peer.rows.Pull(pull_request(name, keys, dtype=dtype))
    assert pulled.header.dtype == dtype
    assert decode(pulled.embeddings).tolist() == [-1.5, 2, -0.25, -100]


def test_an_exchange_pushes_and_then_pulls(peer: Peer, name: str) -> None:
    for table in (f"{name}.a", f"{name}.b"):
        peer.create(table)
    keys = peer.keys(3)
    exchange = pb.ExchangeRequest(
        pushes=[
            push_request(f"{name}.a", keys, np.full((3, DIM), 1)),
            push_request(f"{name}.b", keys[:1], np.full((1, DIM), 2)),
            push_request(f"{name}.a", keys[:1], np.full((1, DIM), 3)),
        ],
        pulls=[pull_request(f"{name}.a", keys), pull_request(f"{name}.b", keys)],
    )
    answer = peer.rows.Exchange(exchange)
    first = answer.pushes[0].version
    assert [push.version for push in answer.pushes] == [first, first + 1, first + 2]
    assert [embeddings(pull) for pull in answer.pulls] == [
        [[-4, -4], [-1, -1], [-1, -1]],
        [[-2, -2], [0, 0], [0, 0]],
    ]


def test_an_exchange_with_one_bad_part_is_refused_as_a_whole(peer: Peer, name: str) -> None:
    peer.create(name)
    keys = peer.keys(1)
    good = push_request(name, keys, np.ones((1, DIM)))
    for bad in (
        pb.ExchangeRequest(pushes=[good, push_request("no.table", keys, [[1]])]),
        pb.ExchangeRequest(pushes=[good], pulls=[pull_request("no.table", keys)]),
        pb.ExchangeRequest(pushes=[good, push_request(name, keys, np.ones((1, DIM + 1)))]),
        pb.ExchangeRequest(pushes=[good], pulls=[pull_request(name, keys, min_version=2**60)]),
    ):
        with pytest.raises(grpc.RpcError):
            peer.rows.Exchange(bad)
    described = peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert described.stats.rows == 0


def test_a_stream_answers_in_order(peer: Peer, conversation: Conversation, name: str) -> None:
    peer.create(name)
    keys = peer.keys(3)
    sent = [
        conversation.send(
            pb.ExchangeRequest(
                pushes=[push_request(name, keys, np.ones((3, DIM)))],
                pulls=[pull_request(name, keys[:1])],
            )
        )
        for _ in range(100)
    ]
    answers = [next(conversation.responses) for _ in sent]
    assert [answer.id for answer in answers] == sent
    assert [embeddings(answer.exchange.pulls[0]) for answer in answers] == [
        [[-n, -n]] for n in range(1, 101)
    ]


def test_an_error_does_not_end_a_stream(peer: Peer, conversation: Conversation, name: str) -> None:
    peer.create(name)
    keys = peer.keys(1)
    bad = pb.ExchangeRequest(pulls=[pull_request("no.table", keys)])
    good = pb.ExchangeRequest(pulls=[pull_request(name, keys)])
    assert conversation.ask(bad).error.code == grpc.StatusCode.NOT_FOUND.value[0]
    answer = conversation.ask(good)
    assert not answer.HasField("error")
    assert embeddings(answer.exchange.pulls[0]) == [[0, 0]]


def test_a_retried_push_is_a_duplicate_with_the_same_version(
    peer: Peer, conversation: Conversation, name: str
) -> None:
    peer.create(name)
    keys = peer.keys(1)
    session = {"client_id": 2**64 - 5, "incarnation": 3}
    first, second = (
        push_request(name, keys, [[1, 1]], sequence=number, **session) for number in (1, 2)
    )
    answers = [peer.rows.Push(request) for request in (first, second, first)]
    answers += peer.rows.Exchange(pb.ExchangeRequest(pushes=[first, second])).pushes
    answers += conversation.ask(pb.ExchangeRequest(pushes=[first])).exchange.pushes
    version = answers[0].version
    assert [(answer.version, answer.duplicate) for answer in answers] == [
        (version, False),
        (version + 1, False),
        (version, True),
        (version, True),
        (version + 1, True),
        (version, True),
    ]
    assert embeddings(peer.rows.Pull(pull_request(name, keys))) == [[-2, -2]]
