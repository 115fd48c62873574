"""Examples of the messages that carry arrays, and the pieces that messages are made of.

golden/  one example of every message of ps.proto, as hexadecimal: what it was encoded as when the
         format was fixed. A test that disagrees with a file has found a change of the wire format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import Message

from psproto import codec
from psproto import ps_pb2 as pb
from psproto.codec import (
    Delta,
    Exchange,
    Exchanged,
    Pulled,
    PullMessage,
    PushMessage,
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
DAMAGED = pb.DamagedBlock(
    number=7, rows=300, lost_rows=2, problem="piece 3 is damaged", keys=bytes(16)
)
TIER = pb.TierStats(tier="lmdb", rows=300, bytes=1 << 21, hits=5, misses=1 << 40, on_disk=True)
CACHE = pb.CacheStats(
    promotions=1,
    demotions=300,
    flushed_rows=4,
    reflushed_blocks=5,
    warm_reads=6,
    warm_seconds=0.5,
)
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


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


# What the golden bytes of the codec mean, written out; padding means nothing.


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
