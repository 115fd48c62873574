"""Bytes that are no message, or too expensive a one, are refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from wire_examples import (
    BF16,
    EXCHANGE,
    F16,
    F32,
    KINDS,
    STREAM_HEADER,
    as_message,
    content,
    f4,
    golden,
    u4,
    u8,
    wire,
)

from psproto import codec
from psproto import ps_pb2 as pb
from psproto.codec import (
    Malformed,
    TooManyFields,
)

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
    with pytest.raises(TooManyFields, match=r"^too many fields, pushes or pulls in one message:"):
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
    "StreamRequest, its header alone": (codec.decode_stream_header, lambda inner: inner),
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


class Counted(bytes):
    """Bytes that count how often one of them is read."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:
        self.reads += isinstance(at, int)
        return super().__getitem__(at)


@pytest.mark.parametrize("kind", NESTED)
def test_of_a_message_of_many_empty_fields_no_more_is_read_than_the_budget(kind: str) -> None:
    decode, wrap = NESTED[kind]
    data = Counted(wrap(wire(15, 2, b"") * (10 * codec.MOST_FIELDS)))
    with pytest.raises(TooManyFields):
        decode(data)
    assert data.reads <= 3 * codec.MOST_FIELDS + 20  # a tag, and a length twice, for each


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
        with pytest.raises(Malformed, match=r"Header must have at most 4096 bytes, got \d+$"):
            decode(wire(1, 2, header.SerializeToString()) * 2)


def test_a_number_of_more_than_64_bits_is_refused() -> None:
    data = KEY + b"\x20" + b"\xff" * 9 + b"\x02"  # protobuf drops what is too much
    assert pb.PullRequest.FromString(data).keys == u8(1).tobytes()
    with pytest.raises(
        Malformed, match=r"the varint that ends at byte 21 is cut off or exceeds 64 bits"
    ):
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
        assert str(caught.value) == f"array length must be a multiple of {size} bytes, got {length}"


@pytest.mark.parametrize("dtype", [-1, 4, 5, 2**31 - 1])
def test_an_unknown_dtype_is_refused(dtype: int) -> None:
    said = rf"field 'dtype' must be one of \[1, 2, 3\], got {dtype}"
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
