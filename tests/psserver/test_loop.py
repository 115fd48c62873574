"""No message keeps the event loop from everybody else for long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from peers import Peer, refusal, with_server

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.exchange import AT_ONCE, AT_ONCE_FIELDS

MALFORMED = ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
LOOP = threading.get_ident()  # tests run the loop on their own thread


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def field(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


class Pulse:
    """The longest time for which the loop did nothing else."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._task = asyncio.ensure_future(self._beat())

    async def _beat(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now

    def stop(self) -> float:
        self._task.cancel()
        return self.longest


EMPTY = field(15, b"")
HOSTILE = {
    "empty fields": EMPTY * (8 << 20),
    "empty fields in parts": field(1, EMPTY * 1000) * 5000,
    "empty parts": field(1, b"") * (8 << 20),
    "empty pulls": field(2, b"") * (1 << 20),
    "one-key pushes": field(
        1, field(1, pb.PushHeader(table="t").SerializeToString()) + field(3, bytes(8))
    )
    * 65_000,
    "headers in pieces": field(1, field(1, b"") * 100_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_many_fields_and_parts_are_refused_and_do_not_stop_the_loop(kind: str) -> None:
    data = HOSTILE[kind]

    async def act(peer: Peer) -> float:
        pulse = Pulse()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call("RowService/Exchange", data)
        assert refusal(caught.value) == MALFORMED
        stream = peer.stream()
        await stream.write(field(2, data))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert refusal(caught.value) == MALFORMED
        return pulse.stop()

    assert with_server(act) < 2.0  # on a busy machine, with the client on the same loop; 7 s once


@pytest.mark.parametrize("number", [1, 2])
def test_as_many_parts_as_are_admitted_do_not_stop_the_loop(number: int) -> None:
    header = pb.PushHeader(table="t").SerializeToString()
    keys = np.arange(codec.MOST_PARTS, dtype=np.uint64)

    def part(key: int) -> bytes:
        body = field(1, header) + field(3, keys[key : key + 1].tobytes())
        return field(number, body + (field(5, bytes(16)) if number == 1 else b""))

    data = b"".join(part(at) for at in range(codec.MOST_PARTS))

    async def act(peer: Peer) -> float:
        pulse = Pulse()
        await peer.call("RowService/Exchange", data)
        return pulse.stop()

    assert with_server(act) < 2.0


def noted(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads on which messages are decoded from now on."""
    threads: list[int] = []
    read = peer.service._exchanges._read

    def note(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return read(*args)

    monkeypatch.setattr(peer.service._exchanges, "_read", note)
    return threads


def pull(keys: int, parts: int = 1) -> bytes:
    one = codec.PullMessage(pb.PullHeader(table="t"), np.zeros(keys, np.uint64))
    return codec.encode_exchange(codec.Exchange([], [one] * parts))


@pytest.mark.parametrize(
    ("data", "elsewhere"),
    [
        (lambda: pull(1), False),
        (lambda: pull(1000, 30), False),
        (lambda: pull(1, 60), True),
        (lambda: pull(AT_ONCE // 8 - 10), False),
        (lambda: pull(AT_ONCE // 8 + 10), True),
        (lambda: pull(1) + EMPTY * (AT_ONCE_FIELDS + 1), True),
    ],
)
def test_an_expensive_message_is_read_on_another_thread(
    data: Callable[[], bytes], elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(peer: Peer) -> list[bool]:
        threads = noted(peer, monkeypatch)
        await peer.call("RowService/Exchange", data())
        return [thread != threading.get_ident() for thread in threads]

    assert with_server(act)[-1] is elsewhere


def test_the_rows_of_a_restore_are_decoded_on_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, decode = [], codec.decode_rows

    def noted(data: bytes) -> codec.RowsMessage:
        threads.append(threading.get_ident())
        return decode(data)

    async def act(peer: Peer) -> None:
        monkeypatch.setattr(codec, "decode_rows", noted)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call("CheckpointService/WriteRows", EMPTY * codec.MOST_FIELDS)
        assert refusal(caught.value)[1] != "INTERNAL"
        (thread,) = threads
        assert thread != threading.get_ident()

    with_server(act)


@pytest.mark.parametrize("parts", [1, 1000])
def test_a_stream_outlives_a_refused_request_of_any_number_of_parts(parts: int) -> None:
    exchange = codec.decode_exchange(pull(1, parts))

    async def act(peer: Peer) -> list[Any]:
        stream, answers = peer.stream(), []
        for id in (7, 8):
            full = peer.limits._config.max_inflight_bytes if id == 7 else 0
            peer.stats.inflight_bytes += full
            header = pb.StreamRequestHeader(id=id)
            await stream.write(codec.encode_stream_request(header, exchange))
            answers.append(codec.decode_stream_response(await stream.read()))
            peer.stats.inflight_bytes -= full
        stream.cancel()
        return answers

    refused, served = with_server(act)
    assert (refused[0], refused[1].code) == (7, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert (served[0], len(served[1].pulls)) == (8, parts)


def test_the_requests_of_a_stream_stay_in_order_wherever_they_are_read() -> None:
    async def act(peer: Peer) -> list[tuple[int, int]]:
        stream = peer.stream()
        for id in range(1, 21):
            parts = 100 if id % 2 else 1
            header = pb.StreamRequestHeader(id=id)
            pushes = [
                codec.PushMessage(
                    pb.PushHeader(table="t", step=id),
                    np.array([part], np.uint64),
                    None,
                    np.ones(4, np.float32),
                )
                for part in range(parts)
            ]
            await stream.write(codec.encode_stream_request(header, codec.Exchange(pushes, [])))
        await stream.done_writing()
        answers = [codec.decode_stream_response(data) async for data in stream]
        return [(id, found.pushes[-1].version) for id, found in answers]  # type: ignore[union-attr]

    found = with_server(act)
    assert [id for id, _ in found] == list(range(1, 21))
    assert [version for _, version in found] == sorted(version for _, version in found)


def test_the_figures_of_many_tables_do_not_stop_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, most = [f"table {number}" for number in range(1000)], 200
    seen: list[int] = []
    counted = 0

    def rows(name: str) -> int:
        nonlocal counted
        counted += 1
        return 1

    async def act(peer: Peer) -> int:
        nonlocal counted
        shard = peer.server._shard
        monkeypatch.setattr(shard, "tables", lambda: tables)
        monkeypatch.setattr(shard, "rows", rows)
        asking = asyncio.ensure_future(peer.call("InfoService/GetServerInfo", b""))
        while not asking.done():
            seen.append(counted)
            counted = 0
            await asyncio.sleep(0)
        return pb.GetServerInfoResponse.FromString(await asking).rows

    assert with_server(act) == len(tables)
    assert 0 < max(seen) <= most


def test_a_table_that_another_client_drops_at_once_was_created() -> None:
    async def act(peer: Peer) -> list[str]:
        rule = pb.Rule(name="sgd", parameters={"lr": 1.0})
        schema = pb.TableSchema(name="u", dim=4, optimizer=rule)
        create = pb.CreateTableRequest(schema=schema).SerializeToString()
        drop = pb.DropTableRequest(name="u").SerializeToString()
        found = []
        for _ in range(50):
            gate = threading.Event()
            busy = peer.engine.submit(gate.wait)
            making = asyncio.ensure_future(peer.call("TableService/CreateTable", create))
            while peer.engine.waiting < 1:
                await asyncio.sleep(0.001)
            dropping = asyncio.ensure_future(peer.call("TableService/DropTable", drop))
            while peer.engine.waiting < 2:
                await asyncio.sleep(0.001)
            gate.set()
            await busy
            made, _ = await asyncio.gather(making, dropping)
            found.append(pb.CreateTableResponse.FromString(made).schema.name)
        return found

    assert with_server(act) == ["u"] * 50


def test_a_schema_of_thousands_of_rules_does_not_stop_the_loop() -> None:
    rules = [pb.Rule(name="norm")] * 20_000
    schema = pb.TableSchema(name="u", dim=4, evictions=rules)
    data = pb.CreateTableRequest(schema=schema).SerializeToString()

    async def act(peer: Peer) -> float:
        pulse = Pulse()
        with pytest.raises(grpc.aio.AioRpcError, match="at most 5 eviction rules, got 20000"):
            await peer.call("TableService/CreateTable", data)
        return pulse.stop()

    assert with_server(act) < 1.0
