"""The gRPC methods of a server in this process: what it keeps in memory, and for how long."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from peers import Peer, refusal, until, with_server

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.errors import DeadlinePassed

DIM = 1024
KEYS = np.arange(100, dtype=np.uint64)
REPLY = len(KEYS) * DIM * 4  # bytes
LIMIT = 8 << 20  # of max_inflight_bytes
SHARE = LIMIT // 8
LIMITED = ("--max-inflight-bytes", str(LIMIT), "--max-message-bytes", str(LIMIT))


serve = partial(with_server, dim=DIM)


def pull(table: str = "t") -> codec.PullMessage:
    return codec.PullMessage(pb.PullHeader(table=table), KEYS)


def message(id: int, *pulls: codec.PullMessage) -> bytes:
    header = pb.StreamRequestHeader(id=id)
    return codec.encode_stream_request(header, codec.Exchange([], list(pulls)))


async def settled(number: Callable[[], int]) -> int:
    """A number once it has stayed the same for a while."""
    last = -1
    while last != (last := number()):
        await asyncio.sleep(0.2)
    return last


def left() -> int:
    """Requests in memory: decoded and not yet dropped, or dropped with a cycle that has them."""
    return sum(type(each) is codec.Exchange for each in gc.get_objects())


def requests() -> int:
    """The same without cycles."""
    gc.collect()
    return left()


def test_a_stream_whose_answers_nobody_reads_is_not_read_beyond_its_share() -> None:
    async def act(peer: Peer) -> list[int]:
        stream = peer.stream()
        for id in range(1, 25):
            await stream.write(message(id, pull()))
        await stream.done_writing()
        await until(lambda: peer.stats.inflight_bytes >= SHARE)
        assert await settled(lambda: peer.stats.inflight_bytes) < SHARE + REPLY + 1000
        assert peer.stats.traffic["Pull", "t"].requests < 24
        answers = [codec.decode_stream_response(data) async for data in stream]
        assert {answer.pulls[0].embeddings.nbytes for _, answer in answers} == {REPLY}
        await until(lambda: peer.stats.inflight_bytes == 0)
        return [id for id, _ in answers]

    assert serve(act, *LIMITED) == list(range(1, 25))


@pytest.mark.parametrize("closed", [False, True])
def test_a_stream_that_is_given_up_leaves_nothing_in_memory(closed: bool) -> None:
    async def act(peer: Peer) -> None:
        before = requests()
        gc.disable()
        try:
            stream = peer.stream()
            for id in range(1, 25):
                await stream.write(message(id, pull()))
            if closed:
                await stream.done_writing()
            await until(lambda: peer.stats.inflight_bytes >= SHARE)
            await settled(lambda: peer.stats.inflight_bytes)
            stream.cancel()
            del stream
            await until(lambda: peer.stats.streams == 0)
            await until(lambda: peer.stats.inflight_bytes == 0)
            await until(lambda: left() == before)
        finally:
            gc.enable()

    serve(act, *LIMITED)


def test_a_refused_request_leaves_nothing_in_memory() -> None:
    bad = codec.PullMessage(pb.PullHeader(table="t", mode=99), KEYS)  # type: ignore[arg-type]

    async def act(peer: Peer) -> list[str]:
        before = requests()
        gc.disable()
        try:
            stream, reasons = peer.stream(), []
            for id, one in enumerate([bad, pull("none"), bad, pull()]):
                await stream.write(message(id, one))
                _, answer = codec.decode_stream_response(await stream.read())
                if isinstance(answer, pb.Status):
                    reasons.append(ErrorInfo.FromString(answer.details[0].value).reason)
            await until(lambda: left() == before)
            await stream.write(message(9)[:-1] + b"\xff")
            with pytest.raises(grpc.aio.AioRpcError):
                await stream.read()
            await until(lambda: left() == before)
            return reasons
        finally:
            gc.enable()

    assert serve(act) == ["INVALID_ARGUMENT", "TABLE_NOT_FOUND", "INVALID_ARGUMENT"]


def test_replies_that_wait_count_against_the_limit_of_the_process() -> None:
    async def ask(stream: Any) -> None:
        for id in itertools.count():
            await stream.write(message(id, pull()))

    async def act(peer: Peer) -> None:
        async def refused() -> Any:
            while True:
                try:
                    await peer.call("RowService/Pull", codec.encode_pull(pull()))
                except grpc.aio.AioRpcError as error:
                    return error
                await asyncio.sleep(0.01)

        streams = [peer.stream() for _ in range(8)]
        asking = [asyncio.create_task(ask(stream)) for stream in streams]
        error = await asyncio.wait_for(refused(), 60)
        assert refusal(error) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        for task, stream in zip(asking, streams, strict=True):
            task.cancel()
            stream.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until(lambda: peer.stats.inflight_bytes == 0)
        await peer.call("RowService/Pull", codec.encode_pull(pull()))

    serve(act, *LIMITED)


def test_a_reply_larger_than_the_limit_goes_out_where_nothing_else_is_in_memory() -> None:
    async def act(peer: Peer) -> int:
        data = await peer.call("RowService/Pull", codec.encode_pull(pull()))
        await until(lambda: peer.stats.inflight_bytes == 0)
        return codec.decode_pulled(data).embeddings.nbytes

    limit = str(REPLY + 512)  # without room for the request
    assert serve(act, "--max-inflight-bytes", limit, "--max-message-bytes", limit) == REPLY


def test_deletes_are_counted_and_a_dropped_table_takes_its_series_with_it() -> None:
    async def act(peer: Peer) -> list[tuple[tuple[str, str], tuple[int, int, int]]]:
        header = pb.PushHeader(table="t")
        await peer.call("RowService/Delete", codec.encode_delete(header, KEYS))
        await peer.create("gone", DIM)
        await peer.call("RowService/Pull", codec.encode_pull(pull("gone")))
        drop = pb.DropTableRequest(name="gone").SerializeToString()
        await peer.call("TableService/DropTable", drop)
        counted = peer.stats.traffic.items()
        return [(where, (each.requests, each.keys, each.bytes)) for where, each in counted]

    assert serve(act) == [(("Delete", "t"), (1, len(KEYS), KEYS.nbytes))]


# ---- deadlines

TABLE_METHODS: dict[str, Any] = {
    "CreateTable": pb.CreateTableRequest(schema=pb.TableSchema(name="new", dim=1)),
    "DropTable": pb.DropTableRequest(name="t"),
    "DescribeTable": pb.DescribeTableRequest(name="t"),
    "ListTables": pb.ListTablesRequest(),
}


@pytest.mark.parametrize("method", TABLE_METHODS)
def test_what_a_caller_no_longer_waits_for_is_not_begun(method: str) -> None:
    data = TABLE_METHODS[method].SerializeToString()

    async def act(peer: Peer) -> list[str]:
        gate = threading.Event()
        slow = peer.engine.submit(gate.wait)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call(f"TableService/{method}", data, timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.set()
        await slow
        tables = await peer.call("TableService/ListTables", b"")
        return [each.schema.name for each in pb.ListTablesResponse.FromString(tables).tables]

    assert serve(act) == ["t"]


@pytest.mark.parametrize("method", ["Pull", "Delete"])
def test_what_a_caller_no_longer_waits_for_counts_until_the_engine_has_dropped_it(
    method: str,
) -> None:
    async def act(peer: Peer) -> None:
        data = codec.encode_pull(pull())
        if method == "Delete":
            data = codec.encode_delete(pb.PushHeader(table="t"), KEYS)
        held = len(data) + (REPLY if method == "Pull" else 0)
        gate = threading.Event()
        peer.engine.submit(gate.wait)
        with pytest.raises(grpc.aio.AioRpcError):
            await peer.call(f"RowService/{method}", data, timeout=0.05)
        await asyncio.sleep(0.05)
        assert peer.stats.inflight_bytes == held
        gate.set()
        await until(lambda: peer.stats.inflight_bytes == 0)

    serve(act)


def test_what_waits_for_a_thread_past_its_deadline_is_not_begun() -> None:
    begun: list[float] = []

    async def act(peer: Peer) -> None:
        workers, now = peer.service._workers, time.monotonic()
        await workers.run(workers.short, lambda: begun.append(20.0), now + 20.0)
        with pytest.raises(DeadlinePassed, match=r"^the deadline passed before the work began$"):
            await workers.run(workers.short, lambda: begun.append(-1.0), now - 1.0)

    serve(act)
    assert begun == [20.0]


# ---- names


@pytest.mark.parametrize("letter", ["n", "\u00e4", "\U0001f600"])
@pytest.mark.parametrize("length", [1, 128, 129, 20_000, 200_000])
def test_an_error_about_a_name_reaches_its_caller_however_long_it_is(
    letter: str, length: int
) -> None:
    name = letter * length
    header = pb.PushHeader(table=name)
    one = np.ones(1, np.uint64)
    rule = pb.TableSchema(name="a", dim=4, optimizer=pb.Rule(name=name))
    calls = {
        "RowService/Pull": codec.encode_pull(pull(name)),
        "RowService/Push": codec.encode_push(
            codec.PushMessage(header, one, None, np.ones(1, np.float32))
        ),
        "RowService/Delete": codec.encode_delete(header, one),
        "TableService/DescribeTable": pb.DescribeTableRequest(name=name).SerializeToString(),
        "TableService/DropTable": pb.DropTableRequest(name=name).SerializeToString(),
        "TableService/Evict": pb.EvictRequest(table=name).SerializeToString(),
        "AnalysisService/Inspect": pb.InspectRequest(table=name).SerializeToString(),
    }
    fits = letter == "n" and length <= 128
    wanted = ("NOT_FOUND", "TABLE_NOT_FOUND") if fits else ("INVALID_ARGUMENT",) * 2
    of_header = ("INVALID_ARGUMENT", "MALFORMED_MESSAGE") if length > 4000 else wanted
    too_large = len(name.encode()) > 256 << 10
    of_name = ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE") if too_large else wanted

    async def act(peer: Peer) -> None:
        for method, data in calls.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await peer.call(method, data)
            expected = of_header if method.startswith("RowService") else of_name
            assert (method, refusal(caught.value)) == (method, expected)
        request = pb.CreateTableRequest(schema=rule)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call("TableService/CreateTable", request.SerializeToString())
        assert refusal(caught.value) == (of_name if too_large else ("INVALID_ARGUMENT",) * 2)

    serve(act)


# ---- tables


def stored(name: str, **fields: Any) -> pb.TableSchema:
    rule = pb.Rule(name="sgd", parameters={"lr": 1.0})
    return pb.TableSchema(
        name=name, dim=DIM, optimizer=rule, initializer=pb.Rule(name="zeros"), **fields
    )


def test_a_sketch_is_within_the_budget_and_its_size_is_said_at_creation() -> None:
    def sketch(keys: int) -> pb.Rule:
        return pb.Rule(name="sketch", parameters={"expected_keys": keys, "error_rate": 0.01})

    async def act(peer: Peer) -> None:
        large = pb.CreateTableRequest(schema=stored("large", admission=sketch(100_000_000)))
        before = peer.service._shard.budget.held
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call("TableService/CreateTable", large.SerializeToString())
        assert refusal(caught.value) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
        message = str(caught.value.details())
        assert "table 'large': admission 'sketch' with expected_keys 100000000" in message
        assert peer.service._shard.budget.held == before
        small = pb.CreateTableRequest(schema=stored("small", admission=sketch(1_000_000)))
        data = await peer.call("TableService/CreateTable", small.SerializeToString())
        stats = pb.CreateTableResponse.FromString(data).stats
        assert 11_066_818 <= stats.counter_bytes < 14 << 20
        assert peer.service._shard.budget.held - before == stats.bytes

    serve(act, "--memory-bytes", str(256 << 20))


def test_a_table_is_altered_and_what_cannot_be_is_refused() -> None:
    async def alter(peer: Peer, fields: list[str], **values: Any) -> pb.AlterTableResponse:
        request = pb.AlterTableRequest(schema=pb.TableSchema(name="t", **values), fields=fields)
        data = await peer.call("TableService/AlterTable", request.SerializeToString())
        return pb.AlterTableResponse.FromString(data)

    async def act(peer: Peer) -> None:
        rule = pb.Rule(parameters={"lr": 0.5})
        done = await alter(peer, ["lr", "max_step_ahead"], optimizer=rule, max_step_ahead=0)
        assert (done.version, done.dropped_counters) == (2, 0)
        again = await alter(peer, ["lr", "max_step_ahead"], optimizer=rule, max_step_ahead=0)
        assert again == done
        request = pb.DescribeTableRequest(name="t").SerializeToString()
        data = await peer.call("TableService/DescribeTable", request)
        assert pb.DescribeTableResponse.FromString(data).schema == done.schema
        assert done.schema.optimizer.parameters == {"lr": 0.5}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await alter(peer, ["dim"], dim=DIM + 1)
        assert refusal(caught.value) == ("FAILED_PRECONDITION", "NOT_ALTERABLE")
        assert "'t': dim cannot be altered: every row has" in str(caught.value.details())

    serve(act)
