"""A client made of generated stubs alone: all that another language would have.

Nothing of psclient, codec or routing is used; routing is computed here as ps.proto says.
"""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from servers import Cluster, eventually, free_ports, serve

from psproto import ps_pb2 as pb
from psproto import ps_pb2_grpc

DIM = 2
WAIT = 20.0  # seconds
MASK = 2**64 - 1


def shard_of(key: int, shard_map: pb.ShardMap) -> int:
    x = key & MASK
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    x ^= x >> 31
    bucket = x >> 52
    return int.from_bytes(shard_map.shard_of_bucket[2 * bucket : 2 * bucket + 2], "little")


def keys_of(shard: int, shard_map: pb.ShardMap, count: int) -> list[int]:
    """The first keys from 0 on that belong to a shard."""
    found: list[int] = []
    key = 0
    while len(found) < count:
        if shard_of(key, shard_map) == shard:
            found.append(key)
        key += 1
    return found


def uint64(keys: Any) -> bytes:
    return b"".join((key & MASK).to_bytes(8, "little") for key in keys)


def float32(numbers: Any) -> bytes:
    return np.asarray(numbers, "<f4").tobytes()


def push_request(table: str, keys: Any, gradients: Any, **header: Any) -> pb.PushRequest:
    return pb.PushRequest(
        header=pb.PushHeader(table=table, **header),
        keys=uint64(keys),
        gradients=float32(gradients),
    )


def pull_request(table: str, keys: Any, **header: Any) -> pb.PullRequest:
    return pb.PullRequest(header=pb.PullHeader(table=table, **header), keys=uint64(keys))


def embeddings(response: pb.PullResponse) -> list[list[float]]:
    array = np.frombuffer(response.embeddings, "<f4").reshape(-1, response.header.dim)
    return array.tolist()  # type: ignore[no-any-return]


class Peer:
    """One server behind generated stubs."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
            address, options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        self.tables = ps_pb2_grpc.TableServiceStub(self.channel)
        self.rows = ps_pb2_grpc.RowServiceStub(self.channel)
        self.log = ps_pb2_grpc.LogServiceStub(self.channel)
        self.info = ps_pb2_grpc.InfoServiceStub(self.channel)
        self.server = self.info.GetServerInfo(
            pb.GetServerInfoRequest(), timeout=WAIT, wait_for_ready=True
        )

    def keys(self, count: int) -> list[int]:
        return keys_of(self.server.shard, self.server.shard_map, count)

    def create(self, name: str, **schema: Any) -> None:
        schema = {
            "dim": DIM,
            "optimizer": pb.Rule(name="sgd", parameters={"lr": 1.0}),
            "initializer": pb.Rule(name="zeros"),
            **schema,
        }
        request = pb.CreateTableRequest(schema=pb.TableSchema(name=name, **schema))
        self.tables.CreateTable(request, timeout=WAIT)

    def raw(self, method: str, data: bytes) -> bytes:
        """A unary call of bytes that need not be a message."""
        return self.channel.unary_unary(f"/ps.v1.{method}")(data, timeout=WAIT)  # type: ignore[no-any-return]


class Conversation:
    """The Stream method, one request at a time or many."""

    def __init__(self, peer: Peer) -> None:
        self._requests: queue.SimpleQueue[pb.StreamRequest | None] = queue.SimpleQueue()
        self.responses = peer.rows.Stream(iter(self._requests.get, None), timeout=WAIT)
        self._next = 100

    def send(self, exchange: pb.ExchangeRequest, timeout_ms: int = 0) -> int:
        self._next += 1
        header = pb.StreamRequestHeader(id=self._next, timeout_ms=timeout_ms)
        self._requests.put(pb.StreamRequest(header=header, exchange=exchange))
        return self._next

    def ask(self, exchange: pb.ExchangeRequest, timeout_ms: int = 0) -> pb.StreamResponse:
        id = self.send(exchange, timeout_ms)
        response = next(self.responses)
        assert response.id == id
        return response  # type: ignore[no-any-return]

    def end(self) -> None:
        self._requests.put(None)
        assert list(self.responses) == []
        assert self.responses.code() is grpc.StatusCode.OK


@pytest.fixture
def peers(cluster2: Cluster) -> Iterator[list[Peer]]:
    both = [Peer(address) for address in cluster2.addresses]
    yield both
    for peer in both:
        peer.channel.close()


@pytest.fixture
def peer(peers: list[Peer]) -> Peer:
    return peers[1]


@pytest.fixture(scope="module")
def limited() -> Iterator[Peer]:
    """A server with small limits: over them is over them for whole messages."""
    flags = "--max-message-bytes 131072 --max-keys 1000 --max-inflight-bytes 65536"
    flags += " --max-tables 3 --max-sessions 2 --memory-bytes 8388608"
    cluster = Cluster(1, *flags.split()).start()
    peer = Peer(cluster.addresses[0])
    peer.create("limits")
    yield peer
    peer.channel.close()
    assert cluster.stop() == 0


@pytest.fixture
def conversation(peer: Peer) -> Iterator[Conversation]:
    stream = Conversation(peer)
    yield stream
    stream.end()


# ---- rows


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


# ---- errors


def reasons(status: Any) -> tuple[str, str, dict[str, str], bool]:
    """Code, reason, metadata of an error, and whether it asks to be tried again."""
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    info.ParseFromString(status.details[0].value)
    again = [d for d in status.details if d.type_url == "type.googleapis.com/google.rpc.RetryInfo"]
    for detail in again:
        retry.ParseFromString(detail.value)
        assert 0 < retry.retry_delay.ToTimedelta().total_seconds() <= 5
    assert info.domain == "ps.v1"
    assert status.message
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return code.name, info.reason, dict(info.metadata), bool(again)


def refusal(call: Callable[[], object]) -> tuple[str, str, dict[str, str], bool]:
    """The same of a unary call, from its trailer."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return reasons(status)


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
    check_refused(limited, full, lambda: limited.rows.Pull(pull), exchange)


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


def test_a_push_without_memory_is_refused_and_pulls_go_on(limited: Peer) -> None:
    limited.create("big", dim=1024)
    try:
        wanted = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", {}, False)
        rows = 0
        while True:
            request = push_request("big", range(rows, rows + 10), np.ones((10, 1024)))
            try:
                limited.rows.Push(request)
            except grpc.RpcError:
                break
            rows += 10
            assert rows * 4096 <= 8388608
        assert rows > 100
        exchange = pb.ExchangeRequest(pushes=[request])
        memory = "/".join(wanted[:2])
        check_refused(limited, memory, lambda: limited.rows.Push(request), exchange)
        described = limited.tables.DescribeTable(pb.DescribeTableRequest(name="big"))
        assert described.stats.rows == rows
        pulled = limited.rows.Pull(pull_request("big", [0, rows - 1, rows]))
        assert [row[0] for row in embeddings(pulled)] == [-1, -1, 0]
    finally:
        limited.tables.DropTable(pb.DropTableRequest(name="big"))
    limited.rows.Push(push_request("limits", range(500), np.ones((500, DIM))))


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


# ---- deletes and the version log

APPLIED, LOG, FSYNC = pb.DURABILITY_APPLIED, pb.DURABILITY_LOG, pb.DURABILITY_FSYNC


def delete_request(table: str, keys: Any, **header: Any) -> pb.DeleteRequest:
    return pb.DeleteRequest(header=pb.PushHeader(table=table, **header), keys=uint64(keys))


def durable(peer: Peer) -> int:
    return int(peer.info.GetServerInfo(pb.GetServerInfoRequest()).durable_version)


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Peer]:
    """A server without a data directory, and so without a log."""
    port = free_ports(1)
    with serve("--port", str(port), "--metrics-port", "0") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        peer = Peer(f"127.0.0.1:{port}")
        yield peer
        peer.channel.close()
        process.terminate()
        process.communicate(timeout=WAIT)
    assert process.returncode == 0


def test_deleted_rows_start_anew_and_others_stay(peer: Peer, name: str) -> None:
    peer.create(name)
    one, two, three, never = peer.keys(4)
    pushed = peer.rows.Push(push_request(name, [one, two, three], [[1, 2]] * 3))
    done = peer.rows.Delete(delete_request(name, [three, never, one]))
    assert (done.version, done.deleted, done.duplicate) == (pushed.version + 1, 2, False)
    pulled = peer.rows.Pull(pull_request(name, [one, two, three], with_metadata=True))
    assert embeddings(pulled) == [[0, 0], [-1, -2], [0, 0]]
    assert pulled.versions == uint64([0, pushed.version, 0])
    again = peer.rows.Delete(delete_request(name, [one, one, two]))
    assert (again.version, again.deleted) == (done.version + 1, 1)
    described = peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert described.stats.rows == 0


def test_a_repeated_delete_takes_effect_once(peer: Peer, name: str) -> None:
    peer.create(name)
    key = peer.keys(1)
    numbers = {"client_id": 0xDE1, "incarnation": 1}
    peer.rows.Push(push_request(name, key, [[1, 1]], **numbers, sequence=1))
    request = delete_request(name, key, **numbers, sequence=2)
    first = peer.rows.Delete(request)
    peer.rows.Push(push_request(name, key, [[4, 4]], **numbers, sequence=3))
    second = peer.rows.Delete(request)
    assert (first.duplicate, first.deleted) == (False, 1)
    assert (second.duplicate, second.version, second.deleted) == (True, first.version, 0)
    assert embeddings(peer.rows.Pull(pull_request(name, key))) == [[-4, -4]]


def test_a_bad_delete_is_refused_by_name_and_deletes_nothing(peer: Peer, name: str) -> None:
    peer.create(name)
    own = peer.keys(2)
    foreign = keys_of(1 - peer.server.shard, peer.server.shard_map, 1)
    pushed = peer.rows.Push(push_request(name, own, [[1, 1]] * 2))
    bad = {
        ("FAILED_PRECONDITION", "WRONG_SHARD"): delete_request(name, own + foreign),
        ("NOT_FOUND", "TABLE_NOT_FOUND"): delete_request("no.such.table", own),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT"): delete_request(name, own, durability=9),
        ("FAILED_PRECONDITION", "SESSION_EXPIRED"): delete_request(
            name, own, client_id=0xDE2, sequence=9, acknowledged=8
        ),
    }
    for wanted, request in bad.items():
        assert refusal(lambda request=request: peer.rows.Delete(request))[:2] == wanted
    for data in (b"\xff" * 9, b"\x1a\x03abc"):
        got = refusal(lambda data=data: peer.raw("RowService/Delete", data))
        assert got[:2] == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
    described = peer.tables.DescribeTable(pb.DescribeTableRequest(name=name))
    assert (described.stats.rows, described.version) == (2, pushed.version)


@pytest.mark.parametrize("table", [0, APPLIED, LOG, FSYNC])
@pytest.mark.parametrize("asked", [0, APPLIED, LOG, FSYNC])
def test_a_change_is_answered_at_the_level_asked_for_or_the_table_s(
    peer: Peer, name: str, table: int, asked: int
) -> None:
    peer.create(name, durability=table)
    key = peer.keys(1)
    wanted = asked or table or LOG
    pushed = peer.rows.Push(push_request(name, key, [[1, 1]], durability=asked))
    assert pushed.achieved == wanted
    deleted = peer.rows.Delete(delete_request(name, key, durability=asked))
    assert deleted.achieved == wanted
    for done in (pushed, deleted):
        assert (wanted == FSYNC) <= (done.durable_version >= done.version)
    exchange = pb.ExchangeRequest(pushes=[push_request(name, key, [[1, 1]], durability=asked)])
    (answer,) = peer.rows.Exchange(exchange).pushes
    assert answer.achieved == wanted
    assert durable(peer) >= deleted.durable_version >= pushed.durable_version


def test_an_unknown_level_is_refused(peer: Peer, name: str) -> None:
    schema = pb.TableSchema(name=name, dim=1, durability=7)
    got = refusal(lambda: peer.tables.CreateTable(pb.CreateTableRequest(schema=schema)))
    assert got[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    peer.create(name)
    request = push_request(name, peer.keys(1), [[1, 1]], durability=7)
    got = refusal(lambda: peer.rows.Push(request))
    assert got[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    assert peer.tables.DescribeTable(pb.DescribeTableRequest(name=name)).stats.rows == 0


def test_pushes_of_a_stream_are_answered_on_disk_when_they_ask_for_it(
    peer: Peer, conversation: Conversation, name: str
) -> None:
    peer.create(name)
    key = peer.keys(1)
    ids = {}
    for level in (LOG, FSYNC, APPLIED, FSYNC):
        push = push_request(name, key, [[1, 1]], durability=level)
        ids[conversation.send(pb.ExchangeRequest(pushes=[push]))] = level
    for response in (next(conversation.responses) for _ in ids):
        (answer,) = response.exchange.pushes
        assert answer.achieved == ids[response.id]
        assert (answer.achieved == FSYNC) <= (answer.durable_version >= answer.version)


def test_a_version_can_be_awaited_on_disk(peer: Peer, name: str) -> None:
    peer.create(name)
    pushed = peer.rows.Push(push_request(name, peer.keys(1), [[1, 1]], durability=APPLIED))
    done = peer.log.WaitDurable(pb.WaitDurableRequest(version=pushed.version), timeout=WAIT)
    assert done.durable_version >= pushed.version
    assert peer.log.WaitDurable(pb.WaitDurableRequest(), timeout=WAIT).durable_version >= (
        pushed.version
    )
    assert durable(peer) >= pushed.version
    future = pb.WaitDurableRequest(version=pushed.version + 1_000_000)
    assert refusal(lambda: peer.log.WaitDurable(future))[:2] == (
        "OUT_OF_RANGE",
        "VERSION_IN_FUTURE",
    )


def test_everything_is_on_disk_soon_although_nobody_asks(peer: Peer, name: str) -> None:
    peer.create(name)
    pushed = peer.rows.Push(push_request(name, peer.keys(1), [[1, 1]], durability=APPLIED))
    eventually(lambda: durable(peer) >= pushed.version, 5.0)


@pytest.mark.parametrize("barrier", ["a", "epoch-1", "0" * 128, "a/b.c_d"])
def test_a_barrier_is_a_version_of_its_own(peer: Peer, name: str, barrier: str) -> None:
    peer.create(name)
    pushed = peer.rows.Push(push_request(name, peer.keys(1), [[1, 1]]))
    done = peer.log.Barrier(pb.BarrierRequest(name=barrier), timeout=WAIT)
    assert done.version == pushed.version + 1
    again = peer.rows.Push(push_request(name, peer.keys(1), [[1, 1]]))
    assert again.version == done.version + 1


@pytest.mark.parametrize("barrier", ["", "-a", "0" * 129, "a b", "\u00e4"])
def test_a_barrier_of_a_bad_name_is_refused(peer: Peer, barrier: str) -> None:
    got = refusal(lambda: peer.log.Barrier(pb.BarrierRequest(name=barrier)))
    assert got[:2] == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


def test_a_server_with_a_log_tells_its_lineage(peers: list[Peer], forgetful: Peer) -> None:
    lineages = {peer.server.lineage for peer in peers}
    assert len(lineages) == 2
    assert {len(lineage) for lineage in lineages} == {16}
    assert (forgetful.server.lineage, forgetful.server.durable_version) == (b"", 0)


def test_a_server_without_a_log_says_so(forgetful: Peer, name: str) -> None:
    no_log = ("FAILED_PRECONDITION", "NO_LOG", {}, False)
    assert refusal(lambda: forgetful.create(name, durability=FSYNC)) == no_log
    forgetful.create(name)
    key = [1]
    requests: list[Callable[[], object]] = [
        lambda: forgetful.log.WaitDurable(pb.WaitDurableRequest()),
        lambda: forgetful.log.Barrier(pb.BarrierRequest(name="b")),
        lambda: forgetful.rows.Push(push_request(name, key, [[1, 1]], durability=FSYNC)),
        lambda: forgetful.rows.Delete(delete_request(name, key, durability=FSYNC)),
    ]
    for request in requests:
        assert refusal(request) == no_log
    for level in (0, APPLIED, LOG):
        pushed = forgetful.rows.Push(push_request(name, key, [[1, 1]], durability=level))
        assert (pushed.achieved, pushed.durable_version) == (APPLIED, 0)
        deleted = forgetful.rows.Delete(delete_request(name, key, durability=level))
        assert (deleted.achieved, deleted.deleted) == (APPLIED, 1)


# ---- server


def test_the_server_tells_what_it_is(peers: list[Peer]) -> None:
    for shard, peer in enumerate(peers):
        info = peer.info.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.shard, info.shard_map.shards, info.shard_map.epoch) == (shard, 2, 1)
        assert len(info.shard_map.shard_of_bucket) == 2 * 4096
        assert info.limits == pb.Limits(message_bytes=64 << 20, keys=4_000_000)
        assert 0 <= info.memory_bytes < info.memory_budget_bytes
        assert info.release


def test_reflection_lists_the_services_and_their_methods(peer: Peer) -> None:
    database = ProtoReflectionDescriptorDatabase(peer.channel)
    assert set(database.get_services()) == {
        "ps.v1.TableService",
        "ps.v1.RowService",
        "ps.v1.LogService",
        "ps.v1.CheckpointService",
        "ps.v1.AnalysisService",
        "ps.v1.InfoService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    rows = DescriptorPool(database).FindServiceByName("ps.v1.RowService")
    assert [method.name for method in rows.methods] == [
        "Pull",
        "Push",
        "Exchange",
        "Delete",
        "Stream",
    ]


@pytest.mark.parametrize(
    "service",
    [
        "",
        "liveness",
        "readiness",
        "ps.v1.TableService",
        "ps.v1.RowService",
        "ps.v1.LogService",
        "ps.v1.CheckpointService",
        "ps.v1.AnalysisService",
        "ps.v1.InfoService",
    ],
)
def test_health_answers(peer: Peer, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(peer.channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service_is_not_found(peer: Peer) -> None:
    stub = health_pb2_grpc.HealthStub(peer.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=WAIT)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.slow
def test_a_stopping_server_ends_streams_and_says_why(start_cluster: Any, name: str) -> None:
    cluster = start_cluster(1)
    peer = Peer(cluster.addresses[0])
    peer.create(name)
    stream = Conversation(peer)
    pull = pb.ExchangeRequest(pulls=[pull_request(name, [1])])
    assert not stream.ask(pull).HasField("error")
    watch = health_pb2_grpc.HealthStub(peer.channel).Watch(
        health_pb2.HealthCheckRequest(service="readiness"), timeout=WAIT
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    cluster.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert refusal(lambda: next(stream.responses)) == ("UNAVAILABLE", "DRAINING", {}, True)
    watch.cancel()
    peer.channel.close()
    assert cluster.stop() == 0
