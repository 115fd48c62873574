"""The codec against protobuf's own classes, in both directions, for any message and any form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_examples import (
    BF16,
    F16,
    F32,
    KINDS,
    PULLED,
    STATUS,
    U64,
    Delete,
    as_message,
    assert_same,
    content,
    golden,
    u8,
    varint,
    wire,
)

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


@pytest.mark.slow
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
    assert codec.decode_stream_header(request + request) == codec.decode_stream_request(request)[0]
    failed = codec.encode_stream_response(7, STATUS)
    assert_same(KINDS["StreamResponse"], failed + failed)
    assert len(codec.decode_stream_response(failed + failed)[1].details) == 2


def test_of_an_array_given_twice_the_last_counts() -> None:
    first, last = wire(3, 2, u8(1, 2).tobytes()), wire(3, 2, u8(3).tobytes())
    assert codec.decode_pull(first + last).keys.tolist() == [3]
    assert codec.decode_pull(last + first).keys.tolist() == [1, 2]
    assert codec.decode_pull(first + wire(3, 2, b"")).keys.tolist() == []


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
