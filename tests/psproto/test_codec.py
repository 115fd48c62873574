"""The codec against protobuf's own classes, in both directions, and against whatever may arrive.

golden/  one example of every message of ps.proto, as hexadecimal: what it was encoded as when the
         format was fixed. A test that disagrees with a file has found a change of the wire format.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from psproto import codec
from psproto import ps_pb2 as pb
from psproto.codec import (
    Delta,
    Exchange,
    Exchanged,
    Malformed,
    Pulled,
    PullMessage,
    PushMessage,
    TooManyFields,
)

GOLDEN = Path(__file__).parent / "golden"
U64 = 2**64 - 1
F32, BF16, F16 = pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT16


def u8(*numbers: int) -> np.ndarray:
    return np.array(numbers, "<u8")


def u4(*numbers: int) -> np.ndarray:
    return np.array(numbers, "<u4")


def f4(*numbers: float) -> np.ndarray:
    return np.array(numbers, "<f4")


EMPTY = u8()

PULL = PullMessage(pb.PullHeader(table="users", mode=pb.MODE_SERVE, min_version=3), u8(7, U64, 0))
PUSH = PushMessage(
    pb.PushHeader(table="users", dtype=BF16, step=-1, lr=0.5, client_id=1 << 63, sequence=2),
    u8(5, 1 << 63),
    u4(1, 2**32 - 1),
    codec.to_wire(f4(1.0, -2.0, 0.5, 3.0), BF16),
)
PLAIN_PUSH = PushMessage(pb.PushHeader(table="items"), u8(1), None, f4(0.25, -1.0))
PULLED = Pulled(
    pb.PullResponseHeader(version=300, dim=2, dtype=F32),
    f4(1.0, 2.0, -3.0, 4.0),
    u8(9, 0),
    np.array([-4, 0], "<i8"),
    u8(1 << 40, 0),
)
HALF_PULLED = Pulled(
    pb.PullResponseHeader(version=1, dim=3, dtype=F16),
    np.array([1.0, -2.0, 65504.0], "<f2"),
    EMPTY,
    EMPTY.view("<i8"),
    EMPTY,
)


@dataclass(frozen=True)
class Delete:
    """A DeleteRequest, which the codec decodes as a push without gradients."""

    header: pb.PushHeader
    keys: np.ndarray

    @classmethod
    def decode(cls, data: bytes) -> Delete:
        push = codec.decode_delete(data)
        return cls(push.header, push.keys)


DELETE = Delete(
    pb.PushHeader(table="users", client_id=7, sequence=3, durability=pb.DURABILITY_FSYNC),
    u8(7, U64, 0),
)
DELTA = Delta(
    pb.DeltaHeader(
        kind=pb.DeltaHeader.KIND_ROWS, table="users", dim=2, width=3, version=300, token=b"t"
    ),
    u8(7, U64),
    u8(9, 300),
    f4(1.0, 2.0, -3.0, 4.0, 0.5, 6.0),
    np.array([-4, 5], "<i8"),
    u8(1 << 40, 1),
)
EXCHANGE = Exchange([PUSH, PLAIN_PUSH], [PULL, PullMessage(pb.PullHeader(table="t"), EMPTY)])
EXCHANGED = Exchanged(
    [pb.PushResponse(version=300), pb.PushResponse(version=299, duplicate=True)],
    [PULLED, HALF_PULLED],
)
STATUS = pb.Status(code=3, message="no", details=[pb.Detail(type_url="t/ErrorInfo", value=b"\0\1")])
STREAM_HEADER = pb.StreamRequestHeader(id=U64, timeout_ms=1500)

SCHEMA = pb.TableSchema(
    name="users",
    dim=16,
    optimizer=pb.Rule(name="adagrad", parameters={"lr": 0.5, "eps": 1e-10}),
    initializer=pb.Rule(name="uniform"),
    seed=U64,
    serving_default=-0.5,
    durability=pb.DURABILITY_FSYNC,
    admission=pb.Rule(name="counter", parameters={"threshold": 3}),
    evictions=[pb.Rule(name="norm"), pb.Rule(name="step_ttl", parameters={"steps": 100})],
)
STATS = pb.TableStats(rows=3, bytes=2 << 20, waiting=4, counter_bytes=1 << 20)
DESCRIBED = pb.DescribeTableResponse(schema=SCHEMA, stats=STATS, version=8)
SHARD_MAP = pb.ShardMap(epoch=1, shards=2, shard_of_bucket=b"\0\0\1\0")
LIMITS = pb.Limits(message_bytes=64 << 20, keys=4_000_000)


# ---- the codec and protobuf, side by side


@dataclass(frozen=True)
class Kind:
    """One message that carries arrays: how we read and write it, and what protobuf makes of it."""

    message: type[Message]
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    example: Any


KINDS = {
    "PullRequest": Kind(pb.PullRequest, codec.decode_pull, codec.encode_pull, PULL),
    "PushRequest": Kind(pb.PushRequest, codec.decode_push, codec.encode_push, PUSH),
    "DeleteRequest": Kind(
        pb.DeleteRequest,
        Delete.decode,
        lambda delete: codec.encode_delete(delete.header, delete.keys),
        DELETE,
    ),
    "PullResponse": Kind(pb.PullResponse, codec.decode_pulled, codec.encode_pulled, PULLED),
    "Delta": Kind(pb.Delta, codec.decode_delta, codec.encode_delta, DELTA),
    "ExchangeRequest": Kind(
        pb.ExchangeRequest, codec.decode_exchange, codec.encode_exchange, EXCHANGE
    ),
    "ExchangeResponse": Kind(
        pb.ExchangeResponse, codec.decode_exchanged, codec.encode_exchanged, EXCHANGED
    ),
    "StreamRequest": Kind(
        pb.StreamRequest,
        codec.decode_stream_request,
        lambda pair: codec.encode_stream_request(*pair),
        (STREAM_HEADER, EXCHANGE),
    ),
    "StreamResponse": Kind(
        pb.StreamResponse,
        codec.decode_stream_response,
        lambda pair: codec.encode_stream_response(*pair),
        (7, EXCHANGED),
    ),
}


def as_message(value: Any) -> Message:
    """What we decoded, as protobuf's class; headers are always there."""
    match value:
        case Delete(header, keys):
            return pb.DeleteRequest(header=header, keys=keys.tobytes())
        case PullMessage(header, keys):
            return pb.PullRequest(header=header, keys=keys.tobytes())
        case PushMessage(header, keys, counts, gradients):
            return pb.PushRequest(
                header=header,
                keys=keys.tobytes(),
                counts=b"" if counts is None else counts.tobytes(),
                gradients=gradients.tobytes(),
            )
        case Pulled(header, embeddings, versions, steps, frequencies):
            return pb.PullResponse(
                header=header,
                embeddings=embeddings.tobytes(),
                versions=versions.tobytes(),
                steps=steps.tobytes(),
                frequencies=frequencies.tobytes(),
            )
        case Delta(header, keys, versions, rows, steps, frequencies):
            return pb.Delta(
                header=header,
                keys=keys.tobytes(),
                versions=versions.tobytes(),
                rows=rows.tobytes(),
                steps=steps.tobytes(),
                frequencies=frequencies.tobytes(),
            )
        case Exchange(pushes, pulls):
            return pb.ExchangeRequest(pushes=map(as_message, pushes), pulls=map(as_message, pulls))
        case Exchanged(pushes, pulls):
            return pb.ExchangeResponse(pushes=pushes, pulls=map(as_message, pulls))
        case (pb.StreamRequestHeader() as header, exchange):
            return pb.StreamRequest(header=header, exchange=as_message(exchange))
        case (int(id), pb.Status() as error):
            return pb.StreamResponse(id=id, error=error)
        case (int(id), answer):
            return pb.StreamResponse(id=id, exchange=as_message(answer))
    raise TypeError(type(value))


def content(message: Message) -> Message:
    """A message without what its receiver ignores: padding, unknown fields, absence of headers."""
    message.DiscardUnknownFields()
    names = message.DESCRIPTOR.fields_by_name
    if "padding" in names:
        message.ClearField("padding")
    if "header" in names:
        message.header.SetInParent()
    if isinstance(message, pb.StreamRequest | pb.StreamResponse):
        if message.HasField("error") if "error" in names else False:
            message.ClearField("exchange")
        else:
            message.exchange.SetInParent()
            content(message.exchange)
    if isinstance(message, pb.ExchangeRequest):
        for push in message.pushes:
            content(push)
    if isinstance(message, pb.ExchangeRequest | pb.ExchangeResponse):
        for pull in message.pulls:
            content(pull)
    return message


def assert_same(kind: Kind, data: bytes) -> None:
    """We and protobuf read the same from ``data``."""
    assert content(as_message(kind.decode(data))) == content(kind.message.FromString(data))


# ---- golden bytes


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


# What the golden bytes of the codec mean, written out; padding means nothing.
MEANING = {
    "PullRequest": pb.PullRequest(
        header=pb.PullHeader(table="users", mode=pb.MODE_SERVE, min_version=3),
        keys=u8(7, U64, 0).tobytes(),
    ),
    "PushRequest": pb.PushRequest(
        header=pb.PushHeader(
            table="users", dtype=BF16, step=-1, lr=0.5, client_id=1 << 63, sequence=2
        ),
        keys=u8(5, 1 << 63).tobytes(),
        counts=u4(1, 2**32 - 1).tobytes(),
        gradients=bytes.fromhex("803f 00c0 003f 4040"),
    ),
    "PullResponse": pb.PullResponse(
        header=pb.PullResponseHeader(version=300, dim=2, dtype=F32),
        embeddings=f4(1.0, 2.0, -3.0, 4.0).tobytes(),
        versions=u8(9, 0).tobytes(),
        steps=u8(2**64 - 4, 0).tobytes(),
        frequencies=u8(1 << 40, 0).tobytes(),
    ),
}

EDGES = pb.Histogram(edges=[0.0, 0.5, 2.0], counts=[0, 1, 300, 1 << 40])
ROW_LIST = pb.RowList(
    keys=[7, U64],
    versions=[9, 300],
    steps=[-4, 5],
    frequencies=[2**32 - 1, 1],
    norms=[0.5, 0.0],
    tiers=["host", "lmdb"],
)
SUMMARY = pb.Summary(
    schema=SCHEMA,
    width=32,
    version=9,
    last_version=300,
    step=-5,
    rows=2,
    occurrences=1 << 32,
    norm_sum=0.5,
    frequencies=EDGES,
    frequency_sums=[0, 1, 300, 1 << 41],
    ages=EDGES,
    norms=EDGES,
    idle_norms=EDGES,
    grace=100,
    tiers=[pb.Summary.Tier(name="host", rows=2, bytes=1 << 21)],
    index_bytes=1 << 19,
    waiting=3,
    waiting_bytes=1 << 12,
    most_frequent=ROW_LIST,
    least_frequent=ROW_LIST,
    largest=ROW_LIST,
    smallest=ROW_LIST,
)
FACTS = pb.KeyFacts(
    key=U64,
    state=pb.KeyFacts.STATE_ROW,
    tier="host",
    version=300,
    step=-5,
    frequency=4,
    norm=0.5,
    embedding=[0.5, -2.0],
    waiting=2,
    gone=[pb.KeyFacts.Gone(version=8, cause="step_ttl", time_us=1, step=0)],
    why="no",
)

# Messages without arrays are protobuf's to encode; here an example of each.
PART = pb.CheckpointPart(path="0/000001.blocks", bytes=1 << 21, checksum="0f", version=9)
SMALL = [
    EDGES,
    ROW_LIST,
    SUMMARY,
    FACTS,
    pb.AnalyzeRequest(
        table="users",
        checkpoint="daily",
        frequencies=[3],
        ages=[0, 5000],
        norms=[0.01],
        grace=100,
        top=10,
        columns=pb.AnalyzeRequest.COLUMNS_EMBEDDING,
    ),
    pb.AnalyzeResponse(
        done=1,
        total=2,
        keys=bytes(8),
        versions=bytes(8),
        steps=bytes(8),
        frequencies=bytes(8),
        norms=bytes(8),
        tier="host",
        embeddings=bytes(8),
        summary=SUMMARY,
    ),
    pb.InspectRequest(table="users", keys=bytes(8), embeddings=True),
    pb.InspectResponse(
        keys=[FACTS],
        version=300,
        created=1,
        tombstone_horizon=7,
        step=-5,
        admission=pb.Rule(name="counter", parameters={"threshold": 3}),
    ),
    PART,
    pb.CheckpointTable(name="users", rows=7, schema=SCHEMA),
    pb.CheckpointInfo(
        name="daily",
        parent="first",
        shards=2,
        versions=[9, 300],
        bytes=1 << 21,
        time_us=1,
        tables=[pb.CheckpointTable(name="users", rows=7)],
        problem="gone",
    ),
    pb.CheckpointProgress(bytes=5, total=6, part=PART, rows=7),
    pb.CompleteCheckpointRequest(name="daily", attempt="a", parent="first", parts=[PART]),
    pb.ListCheckpointsRequest(name="daily"),
    pb.ListCheckpointsResponse(checkpoints=[pb.CheckpointInfo(name="daily")]),
    pb.LoadTableRequest(name="daily", table="users", into="people"),
    pb.PrepareRestoreRequest(name="daily", id="x", replace=True),
    pb.ReadRowsRequest(table="users", checkpoint="daily"),
    pb.RestoreRequest(id="x", step=1),  # type: ignore[arg-type]
    pb.RestoreStatus(id="x", name="daily", phase=1, why="no"),  # type: ignore[arg-type]
    pb.VerifyCheckpointRequest(name="daily"),
    pb.DeleteCheckpointsRequest(id="x", names=["daily"], keep=3, dry_run=True),
    pb.ContinueRequest(id="x", step=1),  # type: ignore[arg-type]
    pb.ContinueResponse(),
    pb.WriteCheckpointRequest(name="daily", attempt="a", parent="first"),
    pb.WriteRowsRequest(
        table="users", width=1, keys=bytes(8), rows=bytes(4), steps=bytes(8), frequencies=bytes(8)
    ),
    pb.WriteRowsResponse(version=9),
    pb.Rule(name="adam", parameters={"lr": 0.001, "beta1": 0.9}),
    SCHEMA,
    STATS,
    pb.CreateTableRequest(schema=SCHEMA),
    pb.CreateTableResponse(schema=SCHEMA, stats=STATS),
    pb.DescribeTableRequest(name="users"),
    DESCRIBED,
    pb.ListTablesRequest(),
    pb.ListTablesResponse(tables=[DESCRIBED]),
    pb.AlterTableRequest(schema=SCHEMA, fields=["lr", "evictions"]),
    pb.AlterTableResponse(schema=SCHEMA, stats=STATS, version=300, dropped_counters=7),
    pb.DropTableRequest(name="users"),
    pb.DropTableResponse(),
    pb.EvictRequest(table="users", dry_run=True),
    pb.EvictResponse(evicted={"norm": 3, "capacity": 0}, rows=9, version=300),
    PULL.header,
    PULLED.header,
    PUSH.header,
    pb.PushResponse(version=300, duplicate=True, achieved=pb.DURABILITY_LOG, durable_version=299),
    pb.DeleteResponse(
        version=300, duplicate=True, achieved=pb.DURABILITY_LOG, durable_version=299, deleted=2
    ),
    pb.WaitDurableRequest(version=300),
    pb.WaitDurableResponse(durable_version=301, epoch=2**64 - 3),
    pb.History(epochs=[5, 2**64 - 2], ends=[300]),
    pb.BarrierRequest(name="epoch-1"),
    pb.BarrierResponse(version=302, epoch=5),
    pb.SubscribeRequest(
        token=b"t",
        start=pb.START_EARLIEST,
        tables=["users", "items"],
        content=pb.CONTENT_KEYS,
        dtype=BF16,
        coalesce_ms=1,
        coalesce_rows=2,
        progress_ms=3,
        chunk_bytes=4,
    ),
    pb.DeltaHeader(
        kind=pb.DeltaHeader.KIND_DELETES,
        table="users",
        dim=1,
        width=2,
        dtype=F16,
        version=3,
        more=True,
        token=b"t",
        head=4,
        time_us=5,
        barrier="b",
        schema=SCHEMA,
        cause="norm",
    ),
    STREAM_HEADER,
    STATUS,
    STATUS.details[0],
    pb.ErrorInfo(reason="WRONG_SHARD", domain="ps.v1", metadata={"epoch": "1"}),
    pb.RetryInfo(retry_delay=pb.RetryInfo.Delay(seconds=1, nanos=500_000_000)),
    SHARD_MAP,
    LIMITS,
    pb.GetServerInfoRequest(),
    pb.GetServerInfoResponse(
        release="0.1.0",
        shard=1,
        shard_map=SHARD_MAP,
        limits=LIMITS,
        version=5,
        memory_bytes=1,
        memory_budget_bytes=2,
        lineage=bytes(range(16)),
        durable_version=4,
    ),
]


@pytest.mark.parametrize("name", KINDS)
def test_our_bytes_never_change(name: str) -> None:
    assert KINDS[name].encode(KINDS[name].example).hex() == golden(name).hex()


@pytest.mark.parametrize("name", MEANING)
def test_golden_bytes_mean_to_protobuf_what_they_say(name: str) -> None:
    assert content(KINDS[name].message.FromString(golden(name))) == MEANING[name]


@pytest.mark.parametrize("name", KINDS)
def test_golden_bytes_mean_to_protobuf_what_they_mean_to_us(name: str) -> None:
    kind = KINDS[name]
    assert content(kind.message.FromString(golden(name))) == content(as_message(kind.example))
    assert kind.encode(kind.decode(golden(name))) == golden(name)


@pytest.mark.parametrize("message", SMALL, ids=lambda message: message.DESCRIPTOR.name)
def test_the_bytes_of_messages_without_arrays_never_change(message: Message) -> None:
    data = golden(message.DESCRIPTOR.name)
    assert message.SerializeToString(deterministic=True).hex() == data.hex()
    assert type(message).FromString(data) == message


def test_every_message_of_the_contract_has_golden_bytes() -> None:
    named = {message.DESCRIPTOR.name for message in SMALL} | set(KINDS)
    assert named == set(pb.DESCRIPTOR.message_types_by_name)
    assert named == {path.stem for path in GOLDEN.iterdir()}


def test_an_error_in_a_stream_is_the_status_under_the_request_s_id() -> None:
    data = codec.encode_stream_response(300, STATUS)
    assert data.hex() == "08ac021a19" + STATUS.SerializeToString().hex()
    assert pb.StreamResponse.FromString(data) == pb.StreamResponse(id=300, error=STATUS)
    assert codec.decode_stream_response(data) == (300, STATUS)


def test_a_stream_response_of_id_0_without_parts_is_read_back() -> None:
    data = codec.encode_stream_response(0, Exchanged([], []))
    assert pb.StreamResponse.FromString(data) == pb.StreamResponse(exchange=pb.ExchangeResponse())
    assert codec.decode_stream_response(data) == (0, Exchanged([], []))


# ---- any message, in any shape protobuf allows


def items(size: int) -> st.SearchStrategy[bytes]:
    """Bytes of an array of items of that size."""
    return st.integers(0, 5).flatmap(lambda n: st.binary(min_size=n * size, max_size=n * size))


uint64 = st.integers(0, U64) | st.integers(0, 300)
name = st.text(max_size=12)
dtypes = st.sampled_from([pb.DTYPE_UNSPECIFIED, F32, BF16, F16])
maybe = st.none() | st.builds(bytes, st.integers(0, 7))


def sized(dtype: int) -> st.SearchStrategy[bytes]:
    return items(codec.WIRE[dtype or F32].itemsize)


pull_requests = st.builds(
    pb.PullRequest,
    header=st.none()
    | st.builds(
        pb.PullHeader,
        table=name,
        dtype=dtypes,
        mode=st.integers(0, 3),
        with_metadata=st.booleans(),
        min_version=uint64,
    ),
    padding=maybe,
    keys=items(8),
)
push_requests = dtypes.flatmap(
    lambda dtype: st.builds(
        pb.PushRequest,
        header=st.builds(
            pb.PushHeader,
            table=name,
            dtype=st.just(dtype),
            step=st.integers(-(2**63), 2**63 - 1),
            lr=st.none() | st.floats(width=32, allow_nan=False),
            client_id=uint64,
            incarnation=uint64,
            sequence=uint64,
            acknowledged=uint64,
            durability=st.integers(0, 4),
        ),
        padding=maybe,
        keys=items(8),
        counts=items(4),
        gradients=sized(dtype),
    )
)
delete_requests = st.builds(
    pb.DeleteRequest,
    header=st.builds(
        pb.PushHeader,
        table=name,
        client_id=uint64,
        sequence=uint64,
        durability=st.integers(0, 4),
    ),
    padding=maybe,
    keys=items(8),
)
pull_responses = dtypes.flatmap(
    lambda dtype: st.builds(
        pb.PullResponse,
        header=st.builds(
            pb.PullResponseHeader,
            version=uint64,
            dim=st.integers(0, 2**32 - 1),
            dtype=st.just(dtype),
        ),
        padding=maybe,
        embeddings=sized(dtype),
        versions=items(8),
        steps=items(8),
        frequencies=items(8),
    )
)
deltas = dtypes.flatmap(
    lambda dtype: st.builds(
        pb.Delta,
        header=st.builds(
            pb.DeltaHeader,
            kind=st.integers(0, 10),
            table=name,
            dim=st.integers(0, 2**32 - 1),
            width=st.integers(0, 2**32 - 1),
            dtype=st.just(dtype),
            version=uint64,
            more=st.booleans(),
            token=st.binary(max_size=9),
            head=uint64,
            time_us=st.integers(-(2**63), 2**63 - 1),
            barrier=name,
            cause=name,
        ),
        padding=maybe,
        keys=items(8),
        versions=items(8),
        rows=sized(dtype),
        steps=items(8),
        frequencies=items(8),
    )
)
push_responses = st.builds(
    pb.PushResponse,
    version=uint64,
    duplicate=st.booleans(),
    achieved=st.integers(0, 4),
    durable_version=uint64,
)
exchange_requests = st.builds(
    pb.ExchangeRequest,
    pushes=st.lists(push_requests, max_size=2),
    pulls=st.lists(pull_requests, max_size=2),
)
exchange_responses = st.builds(
    pb.ExchangeResponse,
    pushes=st.lists(push_responses, max_size=2),
    pulls=st.lists(pull_responses, max_size=2),
)
stream_requests = st.builds(
    pb.StreamRequest,
    header=st.none()
    | st.builds(pb.StreamRequestHeader, id=uint64, timeout_ms=st.integers(0, 2**32 - 1)),
    exchange=st.none() | exchange_requests,
)
statuses = st.builds(
    pb.Status,
    code=st.integers(-(2**31), 2**31 - 1),
    message=name,
    details=st.lists(st.builds(pb.Detail, type_url=name, value=st.binary(max_size=9)), max_size=2),
)
stream_responses = st.builds(
    pb.StreamResponse,
    id=uint64,
    exchange=st.none() | exchange_responses,
    error=st.none() | statuses,
)
MESSAGES = {
    "PullRequest": pull_requests,
    "PushRequest": push_requests,
    "PullResponse": pull_responses,
    "Delta": deltas,
    "ExchangeRequest": exchange_requests,
    "ExchangeResponse": exchange_responses,
    "StreamRequest": stream_requests,
    "DeleteRequest": delete_requests,
    "StreamResponse": stream_responses,
}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40)
@given(st.data())
def test_what_protobuf_writes_we_read(name: str, data: st.DataObject) -> None:
    assert_same(KINDS[name], data.draw(MESSAGES[name]).SerializeToString())


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40)
@given(st.data())
def test_what_we_write_protobuf_reads(name: str, data: st.DataObject) -> None:
    kind, message = KINDS[name], data.draw(MESSAGES[name])
    ours = kind.encode(kind.decode(message.SerializeToString()))
    assert content(kind.message.FromString(ours)) == content(message)
    assert_same(kind, ours)


def varint(value: int, wide: int = 0) -> bytes:
    """A varint of at least ``wide`` bytes, the rest of them leading zeros."""
    out = []
    while value > 127 or len(out) + 1 < wide:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def wire(number: int, kind: int, payload: bytes, wide: int = 0) -> bytes:
    length = varint(len(payload), wide) if kind == 2 else b""
    return varint(number << 3 | kind, wide) + length + payload


unknown = st.integers(100, 2**29 - 1).flatmap(
    lambda number: st.sampled_from(
        [
            wire(number, 0, varint(2**64 - 1)),
            wire(number, 0, varint(1, 10)),
            wire(number, 1, b"8 bytes."),
            wire(number, 2, b""),
            wire(number, 2, b"any length", 5),
            wire(number, 5, b"four"),
        ]
    )
)


def scrambled(message: Message, draw: Callable[[Any], Any]) -> bytes:
    """The same message, written as badly as protobuf permits."""
    fields = []
    for field, value in message.ListFields():
        for item in value if field.is_repeated else [value]:
            if field.type == field.TYPE_MESSAGE:
                payload = (
                    item.SerializeToString()
                    if field.message_type.name in ("Status", "PushResponse")
                    or field.name == "header"
                    else scrambled(item, draw)
                )
                parts = [payload]
                if field.name in ("header", "error") and draw(st.booleans()):
                    parts = [wire(*one) for one in pieces(payload)]  # merged by the receiver
                fields.append([wire(field.number, 2, part, draw(wides)) for part in parts])
            elif field.type == field.TYPE_BYTES:
                stale = [wire(field.number, 2, bytes(3))] if draw(st.booleans()) else []
                last = wire(field.number, 2, item, draw(wides))
                fields.append([*stale, last])  # the last one counts
            else:
                fields.append([wire(field.number, 0, varint(int(item), draw(wides)))])
    return shuffled(fields, draw)


wides = st.sampled_from([0, 0, 2, 5])


def pieces(data: bytes) -> list[tuple[int, int, bytes]]:
    """The fields of a small message, one by one; its headers' field numbers are below 16."""
    found, at = [], 0
    while at < len(data):
        number, kind = data[at] >> 3, data[at] & 7
        at += 1
        if kind == 2:
            assert data[at] < 128
            start, end = at + 1, at + 1 + data[at]
        else:
            start = end = at
            end += {1: 8, 5: 4}.get(kind) or next(
                i + 1 for i, byte in enumerate(data[at:]) if byte < 128
            )
        found.append((number, kind, data[start:end]))
        at = end
    return found


def shuffled(fields: list[list[bytes]], draw: Callable[[Any], Any]) -> bytes:
    """Fields in any order that keeps repeated ones in theirs, with unknown ones in between."""
    fields = [*fields, *([one] for one in draw(st.lists(unknown, max_size=3)))]
    out = []
    while fields := [rest for rest in fields if rest]:
        out.append(fields[draw(st.integers(0, len(fields) - 1))].pop(0))
    return b"".join(out)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60)
@given(st.data())
def test_a_message_is_understood_however_it_is_written(name: str, data: st.DataObject) -> None:
    message = data.draw(MESSAGES[name])
    if isinstance(message, pb.StreamResponse) and message.HasField("error"):
        message.ClearField("exchange")
    assert_same(KINDS[name], scrambled(message, data.draw))


@pytest.mark.parametrize("name", KINDS)
def test_fields_in_reverse_order_are_understood(name: str) -> None:
    kind = KINDS[name]
    message = content(kind.message.FromString(golden(name)))
    parts = [
        wire(field.number, 2, item if isinstance(item, bytes) else item.SerializeToString())
        if field.type in (field.TYPE_BYTES, field.TYPE_MESSAGE)
        else wire(field.number, 0, varint(item))
        for field, value in reversed(message.ListFields())
        for item in (value if field.is_repeated else [value])
    ]
    assert content(as_message(kind.decode(b"".join(parts)))) == message


@pytest.mark.parametrize("name", KINDS)
def test_the_empty_message_is_understood(name: str) -> None:
    assert_same(KINDS[name], b"")


def test_the_parts_of_a_message_given_twice_are_merged() -> None:
    request, answer = golden("StreamRequest"), golden("StreamResponse")
    assert_same(KINDS["StreamRequest"], request + request)
    assert_same(KINDS["StreamResponse"], answer + answer)
    assert len(codec.decode_stream_request(request + request)[1].pushes) == 4
    failed = codec.encode_stream_response(7, STATUS)
    assert_same(KINDS["StreamResponse"], failed + failed)
    assert len(codec.decode_stream_response(failed + failed)[1].details) == 2


def test_of_an_array_given_twice_the_last_counts() -> None:
    first, last = wire(3, 2, u8(1, 2).tobytes()), wire(3, 2, u8(3).tobytes())
    assert codec.decode_pull(first + last).keys.tolist() == [3]
    assert codec.decode_pull(last + first).keys.tolist() == [1, 2]
    assert codec.decode_pull(first + wire(3, 2, b"")).keys.tolist() == []


# ---- what is no message

KEY = wire(3, 2, u8(1).tobytes())

BROKEN = {
    "field number 0": b"\x02\x00",
    "field number 0 in two bytes": b"\x82\x00\x00",
    "a tag that does not end": b"\x80",
    "a tag of more than 32 bits": b"\xfa\xff\xff\xff\x1f\x00",
    "a tag in six bytes": b"\x9a\x80\x80\x80\x80\x00" + b"\x00",
    "a length that does not end": b"\x1a\x80",
    "a length of more than 31 bits": b"\x1a\xff\xff\xff\xff\x0f",
    "a length in six bytes": b"\x1a\x80\x80\x80\x80\x80\x00",
    "a length past the end": b"\x1a\x09" + bytes(8),
    "a varint that does not end": b"\x20\xff",
    "a varint of eleven bytes": b"\x20" + b"\x80" * 10 + b"\x00",
    "a fixed64 past the end": b"\x21" + bytes(7),
    "a fixed32 past the end": b"\x25" + bytes(3),
    "a group that does not end": b"\x23",
    "the end of no group": b"\x24",
    "wire type 6": b"\x26",
    "wire type 7": b"\x27",
    "a header that is no message": b"\x0a\x01\x0a",
    "a header in two parts that are none alone": b"\x0a\x02\x0a\x01" + b"\x0a\x01t",
    "a table name that is not UTF-8": b"\x0a\x03\x0a\x01\xff",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_protobuf_refuses_we_refuse(data: bytes) -> None:
    for where in (data, KEY + data):
        with pytest.raises(DecodeError):
            pb.PullRequest.FromString(where)
        with pytest.raises(Malformed):
            codec.decode_pull(where)


def test_groups_which_no_version_of_the_contract_can_have_are_refused() -> None:
    data = KEY + b"\x23\x24"  # protobuf would skip it
    assert pb.PullRequest.FromString(data).keys == u8(1).tobytes()
    with pytest.raises(Malformed, match=r"wire type 3 of field 4 at byte 11"):
        codec.decode_pull(data)


@pytest.mark.parametrize(
    "field",
    [b"\x20\0", b"\x21" + bytes(8), b"\x22\0", b"\x25" + bytes(4), wire(2, 2, b"\0")],
    ids=["varint", "fixed64", "bytes", "fixed32", "padding"],
)
def test_a_message_has_at_most_32768_fields_of_any_kind(field: bytes) -> None:
    assert codec.decode_pull(field * (2**15 - 1) + KEY).keys.tolist() == [1]
    with pytest.raises(TooManyFields, match=r"^too many fields, pushes or pulls in one message$"):
        codec.decode_pull(field * 2**15 + KEY)


NESTED = {
    "DeleteRequest": (codec.decode_delete, lambda inner: inner),
    "PullRequest": (codec.decode_pull, lambda inner: inner),
    "PushRequest": (codec.decode_push, lambda inner: inner),
    "WriteRowsRequest": (codec.decode_rows, lambda inner: inner),
    "PullResponse": (codec.decode_pulled, lambda inner: inner),
    "Delta": (codec.decode_delta, lambda inner: inner),
    "ExchangeRequest, pushes": (codec.decode_exchange, lambda inner: wire(1, 2, inner)),
    "ExchangeRequest, pulls": (codec.decode_exchange, lambda inner: wire(2, 2, inner)),
    "ExchangeResponse": (codec.decode_exchanged, lambda inner: wire(2, 2, inner)),
    "StreamRequest": (
        codec.decode_stream_request,
        lambda inner: wire(2, 2, wire(1, 2, inner)),
    ),
    "StreamResponse": (
        codec.decode_stream_response,
        lambda inner: wire(2, 2, wire(2, 2, inner)),
    ),
}


def decoders() -> set[str]:
    return {name for name in dir(codec) if name.startswith("decode_")}


def test_every_decoder_is_among_those_with_a_budget() -> None:
    assert {decode.__name__ for decode, _ in NESTED.values()} == decoders()


@pytest.mark.parametrize("kind", NESTED)
def test_fields_of_all_parts_are_counted_together(kind: str) -> None:
    decode, wrap = NESTED[kind]
    empty = wire(15, 2, b"")
    decode(wrap(empty * 1000))
    for parts in (1, 8, 40):
        with pytest.raises(TooManyFields):
            decode(wrap(empty * (2**15 // parts + 1)) * parts)


@pytest.mark.parametrize("kind", NESTED)
def test_a_message_of_millions_of_empty_fields_is_refused_at_once(kind: str) -> None:
    decode, wrap = NESTED[kind]
    data = wrap(wire(15, 2, b"") * (4 << 20))
    start = time.perf_counter()
    with pytest.raises(TooManyFields):
        decode(data)
    assert time.perf_counter() - start < 0.5  # of reading all of it, 4


@pytest.mark.parametrize("number", [1, 2])
def test_an_exchange_has_at_least_2048_parts_and_a_limit(number: int) -> None:
    inner = wire(1, 2, pb.PushHeader(table="t").SerializeToString())
    inner += wire(2, 2, b"\0" * 7) + wire(3, 2, u8(1).tobytes()) + wire(4, 2, u4(1).tobytes())
    part = wire(number, 2, inner + wire(2, 2, b"\0") * 2 + wire(5, 2, f4(1.0).tobytes()))
    found = codec.decode_exchange(part * codec.MOST_PARTS)
    assert len(found.pushes) + len(found.pulls) == codec.MOST_PARTS
    with pytest.raises(TooManyFields):
        codec.decode_exchange(wire(number, 2, b"") * 2 * codec.MOST_PARTS)


def test_a_smaller_budget_is_of_the_whole_message_too() -> None:
    data = codec.encode_stream_request(STREAM_HEADER, EXCHANGE)
    codec.decode_stream_request(data, 100)
    with pytest.raises(TooManyFields):
        codec.decode_stream_request(data, 40)


@pytest.mark.parametrize("kind", ["PullRequest", "PushRequest", "DeleteRequest"])
def test_a_header_has_a_limit(kind: str) -> None:
    decode, _ = NESTED[kind]
    decode(wire(1, 2, pb.PullHeader(table="t" * 4000).SerializeToString()))
    for header in (pb.PullHeader(table="t" * 4096), pb.PullHeader(table="t" * 3000)):
        with pytest.raises(Malformed, match=r"Header is longer than 4096 bytes$"):
            decode(wire(1, 2, header.SerializeToString()) * 2)


def test_a_number_of_more_than_64_bits_is_refused() -> None:
    data = KEY + b"\x20" + b"\xff" * 9 + b"\x02"  # protobuf drops what is too much
    assert pb.PullRequest.FromString(data).keys == u8(1).tobytes()
    with pytest.raises(Malformed, match=r"no varint of 64 bits ends at byte 21"):
        codec.decode_pull(data)


@pytest.mark.parametrize(
    ("name", "field", "size"),
    [
        ("PullRequest", 3, 8),
        ("PushRequest", 3, 8),
        ("PushRequest", 4, 4),
        ("PushRequest", 5, 4),
        ("PullResponse", 3, 4),
        ("PullResponse", 4, 8),
        ("PullResponse", 5, 8),
        ("PullResponse", 6, 8),
        ("Delta", 3, 8),
        ("Delta", 4, 8),
        ("Delta", 5, 4),
        ("Delta", 6, 8),
        ("Delta", 7, 8),
    ],
)
def test_an_array_of_part_of_an_item_is_refused(name: str, field: int, size: int) -> None:
    for length in (1, size - 1, size + 1, 3 * size - 1):
        with pytest.raises(Malformed) as caught:
            KINDS[name].decode(wire(field, 2, bytes(length)))
        assert str(caught.value) == f"{length} bytes are no array of {size}-byte items"


@pytest.mark.parametrize("dtype", [-1, 4, 5, 2**31 - 1])
def test_an_unknown_dtype_is_refused(dtype: int) -> None:
    said = rf"dtype {dtype} is not one of \[1, 2, 3\]"
    push = pb.PushRequest(header=pb.PushHeader(dtype=dtype)).SerializeToString()
    pulled = pb.PullResponse(header=pb.PullResponseHeader(dtype=dtype)).SerializeToString()
    with pytest.raises(Malformed, match=said):
        codec.decode_push(push)
    with pytest.raises(Malformed, match=said):
        codec.decode_pulled(pulled)
    delta = pb.Delta(header=pb.DeltaHeader(dtype=dtype)).SerializeToString()
    with pytest.raises(Malformed, match=said):
        codec.decode_delta(delta)
    with pytest.raises(Malformed, match=said):
        codec.wire_dtype(dtype)


def test_the_dtype_of_a_header_is_float32_unless_it_says_otherwise() -> None:
    assert [codec.wire_dtype(number) for number in (0, 1, 2, 3)] == [F32, F32, BF16, F16]


def mutations(data: bytes, rng: random.Random) -> bytes:
    """``data`` after one accident."""
    at = rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + 1 :]
        case 4:
            return data[:at] + rng.randbytes(rng.randrange(1, 4)) + data[at:]
        case _:
            return data[:at] + data[rng.randrange(len(data)) :]


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_message_is_malformed_or_means_the_same_to_protobuf(name: str) -> None:
    kind, rng = KINDS[name], random.Random(1)
    whole, accepted = golden(name), 0
    flips = [
        whole[:i] + bytes([whole[i] ^ 1 << b]) + whole[i + 1 :]
        for i in range(len(whole))
        for b in range(8)
    ]
    cuts = [whole[:i] for i in range(len(whole))]
    for data in (*flips, *cuts, *(mutations(whole, rng) for _ in range(3000))):
        try:
            decoded = kind.decode(data)
        except Malformed:
            continue
        accepted += 1
        theirs = content(kind.message.FromString(data)).SerializeToString(deterministic=True)
        assert content(as_message(decoded)).SerializeToString(deterministic=True) == theirs, data
    assert accepted > 100


@pytest.mark.parametrize("name", KINDS)
def test_random_bytes_are_malformed_or_mean_the_same_to_protobuf(name: str) -> None:
    kind, rng = KINDS[name], random.Random(2)
    for _ in range(3000):
        data = rng.randbytes(rng.randrange(12))
        try:
            decoded = kind.decode(data)
        except Malformed:
            continue
        theirs = content(kind.message.FromString(data)).SerializeToString(deterministic=True)
        assert content(as_message(decoded)).SerializeToString(deterministic=True) == theirs, data


# ---- views and alignment


def arrays(value: Any) -> list[np.ndarray]:
    """All arrays with something in them."""
    match value:
        case PullMessage(_, keys) | Delete(_, keys):
            found = [keys]
        case PushMessage(_, keys, counts, gradients):
            found = [keys, gradients] if counts is None else [keys, counts, gradients]
        case Delta(_, keys, versions, rows, steps, frequencies):
            found = [keys, versions, rows, steps, frequencies]
        case Pulled(_, embeddings, versions, steps, frequencies):
            found = [embeddings, versions, steps, frequencies]
        case Exchange(pushes, pulls):
            found = [array for part in (*pushes, *pulls) for array in arrays(part)]
        case Exchanged(_, pulls):
            found = [array for part in pulls for array in arrays(part)]
        case (_, exchange):
            found = arrays(exchange)
    return [array for array in found if array.size]


def is_view(array: np.ndarray, data: bytes) -> bool:
    return bool(np.shares_memory(array, np.frombuffer(data, np.uint8)))


def with_name(value: Any, table: str) -> Any:
    """The example with another table name, which moves everything behind it."""
    match value:
        case PullMessage(_, keys):
            return PullMessage(pb.PullHeader(table=table), keys)
        case Delete(_, keys):
            return Delete(pb.PushHeader(table=table), keys)
        case PushMessage(header, keys, counts, gradients):
            return PushMessage(
                pb.PushHeader(table=table, dtype=header.dtype), keys, counts, gradients
            )
        case Pulled(header):
            version = 1 << 7 * min(len(table), 8)
            changed = pb.PullResponseHeader(version=version, dtype=header.dtype)
            return Pulled(changed, *(getattr(value, f) for f in PULLED_ARRAYS))
        case Delta(header):
            changed = pb.DeltaHeader(table=table, dtype=header.dtype)
            return Delta(changed, *(getattr(value, f) for f in DELTA_ARRAYS))
        case Exchange(pushes, pulls):
            return Exchange(
                [with_name(p, table) for p in pushes], [with_name(p, table) for p in pulls]
            )
        case Exchanged(pushes, pulls):
            return Exchanged(pushes, [with_name(p, table) for p in pulls])
        case (pb.StreamRequestHeader(), exchange):
            return pb.StreamRequestHeader(id=1), with_name(exchange, table)
        case (_, answer):
            return 1 << 7 * min(len(table), 8), with_name(answer, table)


DELTA_ARRAYS = ("keys", "versions", "rows", "steps", "frequencies")
PULLED_ARRAYS = ("embeddings", "versions", "steps", "frequencies")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", range(17))
def test_our_messages_align_every_array_and_are_read_without_a_copy(name: str, length: int) -> None:
    kind = KINDS[name]
    value = with_name(kind.example, "t" * length)
    data = kind.encode(value)
    read = arrays(kind.decode(data))
    assert len(read) == len(arrays(value)) > 0
    for array in read:
        assert is_view(array, data)
        assert array.flags.aligned


def test_an_array_that_lies_askew_is_copied() -> None:
    for spare in range(16):
        data = wire(2, 2, bytes(spare)) + wire(3, 2, u8(1, U64).tobytes())
        keys = codec.decode_pull(data).keys
        assert keys.tolist() == [1, U64]
        assert keys.flags.aligned
        assert is_view(keys, data) == ((spare + 4) % 8 == 0)


def test_embeddings_are_written_from_two_dimensions_as_from_one() -> None:
    flat = codec.encode_pulled(PULLED)
    PULLED.embeddings.shape = (2, 2)
    try:
        assert codec.encode_pulled(PULLED) == flat
    finally:
        PULLED.embeddings.shape = (4,)


# ---- numbers


def interesting() -> np.ndarray:
    """float32 of every upper half, just below, at and above where rounding goes the other way."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] | lower).reshape(-1).view(np.float32)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = interesting()
    ours = codec.to_wire(values, BF16)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert ours.dtype == np.uint16
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert ((ours[nan] & 0x7FFF) > 0x7F80).all()  # not a number either
    assert np.array_equal(ours[nan] >> 15, values[nan].view(np.uint32) >> 31)


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    cases = {
        0x3F80_0000: 0x3F80,  # 1
        0x3F80_7FFF: 0x3F80,  # below the tie
        0x3F80_8000: 0x3F80,  # a tie, even below
        0x3F81_8000: 0x3F82,  # a tie, even above
        0x3F80_8001: 0x3F81,  # above the tie
        0x3FFF_FFFF: 0x4000,  # into the next power of two
        0x7F7F_FFFF: 0x7F80,  # the largest float32 becomes infinite
        0x7F7F_7FFF: 0x7F7F,  # the largest that does not
        0x7F80_0000: 0x7F80,
        0xFF80_0000: 0xFF80,
        0x8000_0000: 0x8000,  # -0
        0x0000_0001: 0x0000,  # the smallest subnormal
        0x0000_8001: 0x0001,
        0x007F_FFFF: 0x0080,  # the largest subnormal becomes normal
    }
    values = np.array(list(cases), np.uint32).view(np.float32)
    assert codec.to_wire(values, BF16).tolist() == list(cases.values())


def test_every_bfloat16_means_what_torch_says() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(codec.from_wire(bits, BF16).view(np.uint32), theirs.view(np.uint32))


def test_every_float16_survives_the_way_there_and_back() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = codec.from_wire(halves, F16)
    assert np.array_equal(values, halves.astype(np.float32), equal_nan=True)
    back = codec.to_wire(values, F16)
    assert np.array_equal(back, halves, equal_nan=True)
    assert back.dtype == np.float16


def test_float16_is_rounded_as_torch_rounds_it_and_overflows_to_infinity() -> None:
    values = interesting()
    ours = codec.to_wire(values, F16)
    theirs = torch.from_numpy(values).half().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert codec.to_wire(f4(65504.0, 65519.0, 65520.0, -1e9), F16).tolist() == [
        65504.0,
        65504.0,
        np.inf,
        -np.inf,
    ]


def test_float32_travels_as_it_is_without_a_copy() -> None:
    values = interesting()
    assert codec.to_wire(values, F32) is values
    assert codec.from_wire(values, F32) is values


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_rounding_keeps_the_shape_whatever_the_strides(dtype: int) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    sent = codec.to_wire(values, dtype)
    assert sent.shape == (4, 3)
    assert np.array_equal(codec.from_wire(sent, dtype), values)
    assert codec.to_wire(values[:0], dtype).shape == (0, 3)
