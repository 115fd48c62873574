"""Records: what is encoded is decoded, and bytes that are no record are refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest

from storage.errors import Corrupt
from storage.records import (
    HEAD,
    MAX_NAME,
    AlterRecord,
    BarrierRecord,
    Cause,
    CreateRecord,
    DeleteRecord,
    DropRecord,
    Kind,
    Origin,
    PushRecord,
    Record,
    decode,
    encode_alter,
    encode_barrier,
    encode_create,
    encode_delete,
    encode_drop,
    encode_push,
    encode_write,
)
from storage.segment import Frame, Part

TOP = (1 << 64) - 1
WHO = Origin(
    client=TOP, incarnation=2, sequence=3, acknowledged=TOP - 1, step=-(1 << 63), time_us=1 << 50
)
KEYS = np.array([0, 1, TOP, 1 << 63, 5], np.uint64)
FREQUENCIES = np.array([1, TOP, 3, 4, 5], np.uint64)
ROWS = np.array([[1.5, -0.0, np.inf]] * 5, np.float32)
WAITING = np.array([9, TOP - 9, 0], np.uint64)
TOTALS = np.array([1, 2, 0xFFFFFFFF], np.uint32)
NO_KEYS = np.empty(0, np.uint64)
NO_TOTALS = np.empty(0, np.uint32)


def joined(kind: int, parts: list[Part]) -> Frame:
    """The frame as a log returns it."""
    whole = b"".join(memoryview(part).cast("B") if len(part) else b"" for part in parts)
    return Frame(9, kind, memoryview(whole))


def changed(frame: Frame, offset: int, value: bytes) -> Frame:
    whole = bytearray(frame.payload)
    whole[offset : offset + len(value)] = value
    return Frame(frame.version, frame.kind, memoryview(bytes(whole)))


def plain(record: Record) -> dict[str, Any]:
    """A record's fields, arrays with their types and bytes."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return {"is": type(record)} | {
        name: (v.dtype, v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v
        for name, v in fields.items()
    }


PUSH = joined(Kind.PUSH, encode_push(WHO, 7, KEYS, FREQUENCIES, ROWS))
DELETE = joined(Kind.DELETE, encode_delete(WHO, 7, Cause.NORM, KEYS))
CREATE = joined(Kind.CREATE, encode_create(WHO, 7, {"name": "t", "dim": 3}))
DROP = joined(Kind.DROP, encode_drop(WHO, 7, {"name": "t", "dim": 3}))
ALTER = joined(Kind.ALTER, encode_alter(WHO, 7, {"name": "t", "dim": 3}, dropped=True))
KEPT = joined(Kind.ALTER, encode_alter(WHO, 7, {"name": "t", "dim": 3}, dropped=False))
WRITE = joined(Kind.WRITE, encode_write(WHO, 7, KEYS, FREQUENCIES, ROWS))
BARRIER = joined(Kind.BARRIER, encode_barrier(WHO, "Ende — 完"))
RECORDS: dict[Kind, tuple[Frame, Record]] = {
    Kind.PUSH: (PUSH, PushRecord(WHO, 7, KEYS, FREQUENCIES, ROWS, NO_KEYS, NO_TOTALS)),
    Kind.DELETE: (DELETE, DeleteRecord(WHO, 7, Cause.NORM, KEYS)),
    Kind.CREATE: (CREATE, CreateRecord(WHO, 7, {"name": "t", "dim": 3})),
    Kind.DROP: (DROP, DropRecord(WHO, 7, {"name": "t", "dim": 3})),
    Kind.BARRIER: (BARRIER, BarrierRecord(WHO, "Ende — 完")),
    Kind.ALTER: (ALTER, AlterRecord(WHO, 7, {"name": "t", "dim": 3}, dropped=True)),
    Kind.WRITE: (
        WRITE,
        PushRecord(WHO, 7, KEYS, FREQUENCIES, ROWS, NO_KEYS, NO_TOTALS, imported=True),
    ),
}
OFFSETS = {"table": 48, "width": 52, "count": 56, "extra": 60}
UNUSED = {
    Kind.PUSH: (),
    Kind.DELETE: ("width",),
    Kind.CREATE: ("width", "count", "extra"),
    Kind.DROP: ("width", "count", "extra"),
    Kind.BARRIER: ("table", "width", "count", "extra"),
    Kind.ALTER: ("width", "count"),
    Kind.WRITE: ("extra",),
}


def test_every_kind_is_tested_here() -> None:
    assert set(RECORDS) == set(UNUSED) == set(Kind)


@pytest.mark.parametrize("kind", Kind)
def test_what_is_encoded_is_decoded(kind: Kind) -> None:
    frame, record = RECORDS[kind]
    assert plain(decode(frame)) == plain(record)


def test_a_push_is_these_bytes() -> None:
    head = b"\xff" * 8 + b"\2" + bytes(7) + b"\3" + bytes(7) + b"\xfe" + b"\xff" * 7
    head += bytes(7) + b"\x80" + bytes(6) + b"\4\0" + b"\7\0\0\0\3\0\0\0\5\0\0\0\0\0\0\0"
    assert len(head) == HEAD.size == 64
    assert bytes(PUSH.payload) == head + KEYS.tobytes() + FREQUENCIES.tobytes() + ROWS.tobytes()


@pytest.mark.parametrize("rows", [0, 1, 4, 5])
def test_keys_that_wait_come_back_with_their_totals(rows: int) -> None:
    some = KEYS[:rows], FREQUENCIES[:rows], ROWS[:rows]
    frame = joined(Kind.PUSH, encode_push(WHO, 7, *some, WAITING, TOTALS))
    assert plain(decode(frame)) == plain(PushRecord(WHO, 7, *some, WAITING, TOTALS))
    arrays = (*some[:2], WAITING, some[2], TOTALS)
    assert bytes(frame.payload[64:]) == b"".join(array.tobytes() for array in arrays)
    for extra in (2, 4, 0):
        with pytest.raises(Corrupt, match=r"expected \d+ bytes after the record's header, got \d+"):
            decode(changed(frame, OFFSETS["extra"], extra.to_bytes(4, "little")))


def test_encoding_copies_no_array() -> None:
    parts = encode_push(WHO, 7, KEYS, FREQUENCIES, ROWS)
    assert parts[1] is KEYS
    assert parts[2] is FREQUENCIES
    assert parts[3] is ROWS
    assert encode_delete(WHO, 7, Cause.REQUEST, KEYS)[1] is KEYS


def test_decoded_arrays_are_read_only_views_of_the_frame() -> None:
    push = decode(PUSH)
    assert isinstance(push, PushRecord)
    whole = np.frombuffer(PUSH.payload, np.uint8)
    for array in (push.keys, push.frequencies, push.rows):
        assert np.shares_memory(array, whole)
        assert not array.flags.writeable
        assert array.flags.aligned


def test_a_frame_in_unaligned_memory_is_copied() -> None:
    shifted = memoryview(b"x" + bytes(PUSH.payload))[1:]
    push = decode(Frame(9, Kind.PUSH, shifted))
    assert isinstance(push, PushRecord)
    assert plain(push) == plain(decode(PUSH))
    assert push.keys.flags.aligned
    assert push.rows.flags.aligned


def test_a_push_or_delete_without_keys_is_a_record() -> None:
    rows = np.empty((0, 4), np.float32)
    push = joined(Kind.PUSH, encode_push(Origin(), 1, NO_KEYS, NO_KEYS, rows))
    assert plain(decode(push)) == plain(
        PushRecord(Origin(), 1, NO_KEYS, NO_KEYS, rows, NO_KEYS, NO_TOTALS)
    )
    delete = joined(Kind.DELETE, encode_delete(Origin(), 1, Cause.REQUEST, NO_KEYS))
    assert plain(decode(delete)) == plain(DeleteRecord(Origin(), 1, Cause.REQUEST, NO_KEYS))


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_of_a_delete_comes_back(cause: Cause) -> None:
    record = decode(joined(Kind.DELETE, encode_delete(WHO, 7, cause, KEYS)))
    assert isinstance(record, DeleteRecord)
    assert record.cause is cause


def test_an_alteration_says_whether_counters_were_dropped() -> None:
    assert plain(decode(KEPT)) == plain(AlterRecord(WHO, 7, {"name": "t", "dim": 3}, dropped=False))
    with pytest.raises(Corrupt, match="'extra' of an ALTER record must be 0 or 1, got 2"):
        decode(changed(ALTER, OFFSETS["extra"], b"\2"))


@pytest.mark.parametrize("kind", Kind)
def test_a_field_that_the_kind_has_not_must_be_zero(kind: Kind) -> None:
    for field in UNUSED[kind]:
        bad = changed(RECORDS[kind][0], OFFSETS[field], b"\1")
        with pytest.raises(Corrupt) as caught:
            decode(bad)
        assert caught.value.where == "record of version 9"
        assert caught.value.what in (
            f"header field '{field}' must be 0 in this kind of record, got 1",
            f"header field '{field}' must be 0 in this kind of record, got 5",
        )


@pytest.mark.parametrize("kind", [Kind.PUSH, Kind.WRITE, Kind.DELETE])
def test_lengths_are_exact(kind: Kind) -> None:
    whole = bytes(RECORDS[kind][0].payload)
    for size in [*range(len(whole)), len(whole) + 1, len(whole) + 8]:
        with pytest.raises(Corrupt, match=r"^record of version 9: expected .* got \d+$"):
            decode(Frame(9, kind, memoryview(whole.ljust(size, b"\0")[:size])))


@pytest.mark.parametrize("kind", Kind)
def test_less_than_a_head_is_refused(kind: Kind) -> None:
    for size in range(HEAD.size):
        with pytest.raises(Corrupt, match=f"at least 64 bytes in a record, got {size}$"):
            decode(Frame(9, kind, RECORDS[kind][0].payload[:size]))


@pytest.mark.parametrize("kind", [0, max(Kind) + 1, 0xFFFFFFFF])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(Corrupt, match=f"unknown kind {kind}"):
        decode(Frame(9, kind, DROP.payload))


@pytest.mark.parametrize("cause", [0, 6, 0xFFFFFFFF])
def test_an_unknown_cause_is_refused(cause: int) -> None:
    with pytest.raises(Corrupt, match=f"unknown cause {cause} in a DELETE record"):
        decode(changed(DELETE, OFFSETS["extra"], cause.to_bytes(4, "little")))


def test_rows_without_width_are_refused() -> None:
    whole = bytearray(PUSH.payload[: HEAD.size + 16 * 5])
    whole[OFFSETS["width"]] = 0
    with pytest.raises(Corrupt, match="header field 'width' must be at least 1, got 0"):
        decode(Frame(9, Kind.PUSH, memoryview(bytes(whole))))


def test_the_largest_count_and_width_are_refused_before_memory_is_taken() -> None:
    bad = changed(changed(PUSH, OFFSETS["count"], b"\xff" * 4), OFFSETS["width"], b"\xff" * 4)
    with pytest.raises(Corrupt, match=r"expected \d{20} bytes after the record's header, got 140"):
        decode(bad)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the schema is not JSON: "),
        (b"{", "the schema is not JSON: "),
        (b"\xff\xfe", "the schema is not JSON: "),
        (b"[" * 100_000, "the schema is not JSON: "),
        (b"[1]", "the schema is not a JSON object"),
        (b"null", "the schema is not a JSON object"),
    ],
)
def test_a_schema_is_a_json_object(body: bytes, why: str) -> None:
    with pytest.raises(Corrupt, match=why):
        decode(Frame(9, Kind.CREATE, memoryview(bytes(CREATE.payload[: HEAD.size]) + body)))


def test_a_schema_comes_back_as_json_says() -> None:
    schema = {"name": "t", "seed": TOP, "default": 0.1, "of": {"kind": "adam", "lr": [1e-300]}}
    record = decode(joined(Kind.CREATE, encode_create(WHO, 1, schema)))
    assert record == CreateRecord(WHO, 1, json.loads(json.dumps(schema)))


@pytest.mark.parametrize("body", [b"\xff", b"a\xc3", b"\xed\xa0\x80"])
def test_a_name_is_utf8(body: bytes) -> None:
    with pytest.raises(Corrupt, match="the name is not UTF-8: "):
        decode(Frame(9, Kind.BARRIER, memoryview(bytes(BARRIER.payload[: HEAD.size]) + body)))


def test_a_name_has_its_limit() -> None:
    longest = joined(Kind.BARRIER, encode_barrier(WHO, "n" * MAX_NAME))
    assert decode(longest) == BarrierRecord(WHO, "n" * MAX_NAME)
    with pytest.raises(Corrupt, match="a name may have at most 1024 bytes, got 1025"):
        decode(joined(Kind.BARRIER, encode_barrier(WHO, "n" * (MAX_NAME + 1))))


def test_hostile_bytes_are_refused_or_decoded_and_nothing_else() -> None:
    dice = random.Random(11)
    good = [frame for frame, _ in RECORDS.values()]
    for _ in range(5000):
        whole = bytearray(dice.choice(good).payload)
        for _ in range(dice.randrange(4)):
            whole[dice.randrange(min(len(whole), 80))] = dice.randrange(256)
        if dice.random() < 0.3:
            del whole[dice.randrange(len(whole)) :]
        try:
            record = decode(Frame(9, dice.randrange(7), memoryview(bytes(whole))))
        except Corrupt:
            continue
        if isinstance(record, PushRecord):
            assert record.rows.shape[0] == len(record.keys) == len(record.frequencies)
