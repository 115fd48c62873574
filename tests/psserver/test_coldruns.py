"""Requests for rows on disk: what waits for the disk, what overtakes, and what fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from peers import Peer, refusal, until, with_server

from psproto import codec
from psproto import ps_pb2 as pb
from psserver import coldruns
from storage import residency
from storage.base import Base
from storage.errors import DiskFull

DIM = 256
MIB = 1 << 20
BATCH = 500
ROWS = 24 * BATCH  # about twice as many as fit into memory
LIMITS = ("--host-bytes", str(8 * MIB), "--max-message-bytes", str(4 * MIB))
COLD = np.arange(BATCH, dtype=np.uint64)  # pushed first, so that they leave memory first
HOT = np.arange(ROWS - 10, ROWS, dtype=np.uint64)


def serve(act: Callable[[Peer], Any], directory: Path, *flags: str) -> Any:
    return with_server(act, "--data-dir", str(directory), *LIMITS, *flags, dim=DIM)


def pulls(keys: np.ndarray, **header: Any) -> codec.PullMessage:
    return codec.PullMessage(pb.PullHeader(table="t", **header), keys)


def pushes(keys: np.ndarray, value: float) -> codec.PushMessage:
    gradients = np.full(len(keys) * DIM, -value, np.float32)
    return codec.PushMessage(pb.PushHeader(table="t", lr=1.0), keys, None, gradients)


def message(id: int, exchange: codec.Exchange) -> bytes:
    return codec.encode_stream_request(pb.StreamRequestHeader(id=id), exchange)


async def pull(peer: Peer, keys: np.ndarray, **header: Any) -> codec.Pulled:
    data = codec.encode_pull(pulls(keys, **header))
    return codec.decode_pulled(await peer.call("RowService/Pull", data))


async def push(peer: Peer, keys: np.ndarray, value: float) -> None:
    await peer.call("RowService/Push", codec.encode_push(pushes(keys, value)))


async def refused_push(peer: Peer, keys: np.ndarray) -> tuple[str, str] | None:
    """Push; return code and reason if the push was refused."""
    try:
        await push(peer, keys, 1.0)
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    return None


async def fill(peer: Peer) -> None:
    """Push 1 + key to every row, so that those of COLD are on disk only."""
    for first in range(0, ROWS, BATCH):
        keys = np.arange(first, first + BATCH, dtype=np.uint64)
        gradients = -np.repeat(keys.astype(np.float32) + 1, DIM)
        one = codec.PushMessage(pb.PushHeader(table="t", lr=1.0), keys, None, gradients)
        await peer.call("RowService/Push", codec.encode_push(one))
    assert await pull(peer, HOT)
    assert table(peer).cold_rows > ROWS // 4
    assert len(cold_of(peer, COLD)) == BATCH


def table(peer: Peer) -> Any:
    return peer.server._shard._tables.get("t").table


def cold_of(peer: Peer, keys: np.ndarray) -> np.ndarray:
    store = table(peer).store
    found: np.ndarray = store.cold(store.find(keys)[0])
    return found


def values(pulled: codec.Pulled) -> list[float]:
    return np.reshape(pulled.embeddings, (-1, DIM))[:, -1].tolist()  # type: ignore[no-any-return]


class Disk:
    """A disk that is read only while ``gate`` is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun = 0

    def warm(self, reads: Any) -> None:
        self.begun += 1
        assert self.gate.wait(20)
        for read in reads:
            read.pages.warm()


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page of the disk is ever known to be in memory."""
    monkeypatch.setattr(residency, "WINDOW", -60_000)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, uncached: None) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(coldruns, "_warm", disk.warm)
    yield disk
    disk.gate.set()


def test_pushes_wait_for_room_and_rows_on_disk_are_pulled_and_pushed(
    tmp_path: Path, uncached: None
) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        assert values(await pull(peer, COLD)) == [key + 1.0 for key in range(BATCH)]
        assert len(cold_of(peer, COLD)) == BATCH  # a pull moves nothing
        found = await pull(peer, COLD, with_metadata=True)
        assert found.frequencies.tolist() == [1] * BATCH
        await push(peer, COLD, 5.0)
        assert len(cold_of(peer, COLD)) == 0
        assert values(await pull(peer, COLD)) == [key + 6.0 for key in range(BATCH)]
        assert peer.server._shard.budget.held <= 8 * MIB
        assert peer.stats.waits["t"].total >= 3
        await peer.call(
            "RowService/Delete", codec.encode_delete(pb.PushHeader(table="t"), COLD + BATCH)
        )
        assert values(await pull(peer, COLD + BATCH)) == [0.0] * BATCH

    serve(act, tmp_path)


def test_requests_of_a_stream_stay_in_order_and_those_of_others_overtake(
    tmp_path: Path, disk: Disk
) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        disk.gate.clear()
        begun = disk.begun
        stream = peer.stream()
        both = np.append(COLD, HOT[:1])
        was = float(HOT[0]) + 1
        await stream.write(message(1, codec.Exchange([], [pulls(both)])))
        await stream.write(message(2, codec.Exchange([pushes(HOT[:1], 7.0)], [])))
        await stream.write(message(3, codec.Exchange([], [pulls(HOT[:1])])))
        await until(lambda: disk.begun > begun)
        for _ in range(50):  # others do not wait, and see nothing of the push
            assert values(await pull(peer, HOT[:1])) == [was]
        disk.gate.set()
        await stream.done_writing()
        answers = [codec.decode_stream_response(data) async for data in stream]
        assert [id for id, _ in answers] == [1, 2, 3]
        first, _, third = (answer for _, answer in answers)
        assert values(first.pulls[0])[-1] == was
        assert values(third.pulls[0]) == [was + 7]

    serve(act, tmp_path)


def test_hot_pulls_are_quick_while_cold_rows_are_read(tmp_path: Path, disk: Disk) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        disk.gate.clear()
        waiting = [asyncio.ensure_future(pull(peer, COLD + n)) for n in range(40)]
        await until(lambda: disk.begun >= 8)  # all I/O threads wait for the disk
        longest = 0.0
        for _ in range(200):
            start = time.perf_counter()
            assert values(await pull(peer, HOT)) == (HOT + 1.0).tolist()
            longest = max(longest, time.perf_counter() - start)
        assert longest < 5
        assert not any(each.done() for each in waiting)
        disk.gate.set()
        for n, each in enumerate(waiting):
            assert values(await each)[0] == n + 1.0

    serve(act, tmp_path)


def test_rows_on_disk_whose_pages_are_in_memory_do_not_wait(tmp_path: Path) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        await pull(peer, COLD, with_metadata=True)  # reads and verifies the pages
        waits = peer.stats.waits.get("t")
        before = 0 if waits is None else waits.total
        for _ in range(20):
            assert values(await pull(peer, COLD)) == [key + 1.0 for key in range(BATCH)]
        await push(peer, COLD, 5.0)
        assert len(cold_of(peer, COLD)) == 0
        waits = peer.stats.waits.get("t")
        assert (0 if waits is None else waits.total) <= before + 2  # a look lasts a second
        table(peer).store.blocks.residency._distrusted = 1 << 62  # now no page is in memory
        await pull(peer, COLD + BATCH)
        assert peer.stats.waits["t"].total > before

    serve(act, tmp_path)


def test_the_event_loop_never_runs_a_request_with_cold_rows(tmp_path: Path) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        threads = []
        gather = table(peer).store.blocks.gather

        def recorded(*args: Any) -> None:
            threads.append(threading.current_thread().name)
            gather(*args)

        table(peer).store.blocks.gather = recorded
        for _ in range(20):
            await pull(peer, COLD)
            await push(peer, COLD[:1], 0.0)
        assert set(threads) == {"engine"}

    serve(act, tmp_path)


def test_a_prefetch_is_answered_at_once_and_reads_the_rows(tmp_path: Path, disk: Disk) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        disk.gate.clear()
        begun = disk.begun
        data = codec.encode_pull(pulls(COLD, prefetch=True))
        reply = await peer.call("RowService/Pull", data)
        answer = codec.decode_pulled(reply)
        assert len(reply) < 20
        assert (answer.header.dim, answer.embeddings.size) == (DIM, 0)
        await until(lambda: disk.begun == begun + 1)
        assert len(cold_of(peer, COLD)) == BATCH
        hot = codec.decode_pulled(
            await peer.call("RowService/Pull", codec.encode_pull(pulls(HOT, prefetch=True)))
        )
        assert (hot.embeddings.size, disk.begun) == (0, begun + 1)
        for _ in range(100):  # more than may wait: the rest is ignored
            await peer.call("RowService/Pull", data)
        assert peer.service._runs._prefetching == coldruns.MOST_PREFETCHES
        disk.gate.set()
        await until(lambda: peer.service._runs._prefetching == 0)
        unknown = codec.PullMessage(pb.PullHeader(table="no", prefetch=True), COLD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call("RowService/Pull", codec.encode_pull(unknown))
        assert refusal(caught.value) == ("NOT_FOUND", "TABLE_NOT_FOUND")

    serve(act, tmp_path)


def test_a_request_whose_deadline_passes_while_it_waits_is_not_applied(
    tmp_path: Path, disk: Disk
) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        disk.gate.clear()
        version = peer.server._shard.version
        header = pb.StreamRequestHeader(id=1, timeout_ms=100)
        late = codec.encode_stream_request(header, codec.Exchange([pushes(COLD, 1.0)], []))
        stream = peer.stream()
        await stream.write(late)
        await stream.write(message(2, codec.Exchange([], [pulls(HOT)])))
        await asyncio.sleep(0.3)
        disk.gate.set()
        await stream.done_writing()
        answers = [codec.decode_stream_response(data)[1] async for data in stream]
        assert answers[0].code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert values(answers[1].pulls[0]) == (HOT + 1.0).tolist()
        assert peer.server._shard.version == version

    serve(act, tmp_path)


def test_a_full_disk_refuses_pushes_and_serves_pulls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        add = Base.add
        full = threading.Event()
        full.set()

        def limited(base: Base, data: Any) -> int:
            if full.is_set():
                raise DiskFull("the disk", 0)
            return add(base, data)

        monkeypatch.setattr(Base, "add", limited)
        refused = None
        for first in range(ROWS, 2 * ROWS, BATCH):
            keys = np.arange(first, first + BATCH, dtype=np.uint64)
            if refused := await refused_push(peer, keys):
                break
        assert refused == ("RESOURCE_EXHAUSTED", "DISK_FULL")
        assert values(await pull(peer, COLD)) == [key + 1.0 for key in range(BATCH)]
        assert values(await pull(peer, HOT)) == (HOT + 1.0).tolist()
        full.clear()
        async with asyncio.timeout(60):
            while await refused_push(peer, keys):
                await asyncio.sleep(0.1)

    serve(act, tmp_path)


def test_a_damaged_row_fails_its_own_request_and_no_other(tmp_path: Path) -> None:
    serve(fill, tmp_path)
    path = tmp_path / "base" / "data.mdb"
    data = path.read_bytes()
    wanted = np.full(DIM, 4.0, np.float32).tobytes()  # the row of key 3
    at = data.index(wanted)
    assert data.find(wanted, at + 1) < 0
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\x13")

    async def act(peer: Peer) -> None:
        stream = peer.stream()
        await stream.write(message(1, codec.Exchange([], [pulls(COLD)])))
        await stream.write(message(2, codec.Exchange([pushes(COLD[:5], 1.0)], [])))
        await stream.write(message(3, codec.Exchange([], [pulls(COLD[200:])])))
        await stream.done_writing()
        answers = [codec.decode_stream_response(data)[1] async for data in stream]
        for answer in answers[:2]:
            assert answer.code == grpc.StatusCode.DATA_LOSS.value[0]
            assert f"{path}: block " in answer.message
        assert values(answers[2].pulls[0]) == [key + 1.0 for key in range(200, BATCH)]
        assert values(await pull(peer, HOT)) == (HOT + 1.0).tolist()
        await push(peer, COLD[200:], 1.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pull(peer, COLD[3:4])
        assert refusal(caught.value) == ("DATA_LOSS", "DATA_LOSS")

    serve(act, tmp_path)


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_clients_that_compete_for_room_all_succeed(tmp_path: Path, transport: str) -> None:
    async def act(peer: Peer) -> None:
        async def one(number: int) -> None:
            first = number << 32
            if transport == "unary":
                for step in range(12):
                    keys = np.arange(first + step * BATCH, first + (step + 1) * BATCH)
                    await push(peer, keys.astype(np.uint64), 1.0)
                return
            stream = peer.stream()
            for step in range(12):
                keys = np.arange(first + step * BATCH, first + (step + 1) * BATCH)
                exchange = codec.Exchange([pushes(keys.astype(np.uint64), 1.0)], [])
                await stream.write(message(step + 1, exchange))
            await stream.done_writing()
            answers = [codec.decode_stream_response(data) async for data in stream]
            versions = [answer.pushes[0].version for _, answer in answers]
            assert versions == sorted(versions)

        await asyncio.gather(*map(one, range(4)))
        assert len(table(peer)) == 4 * 12 * BATCH
        assert peer.server._shard.budget.held <= 8 * MIB
        for number in range(4):
            keys = np.arange(number << 32, (number << 32) + 12 * BATCH, BATCH).astype(np.uint64)
            assert values(await pull(peer, keys)) == [1.0] * 12

    serve(act, tmp_path)


def test_inspect_reads_rows_on_disk_on_its_own_thread(tmp_path: Path) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        request = pb.InspectRequest(table="t", keys=COLD[:3].tobytes(), embeddings=True)
        data = await peer.call("AnalysisService/Inspect", request.SerializeToString())
        facts = pb.InspectResponse.FromString(data).keys
        assert [each.tier for each in facts] == ["lmdb"] * 3
        assert [each.embedding[0] for each in facts] == [1.0, 2.0, 3.0]
        assert len(cold_of(peer, COLD)) == BATCH

    serve(act, tmp_path)


def test_rows_are_imported_into_a_table_larger_than_memory(tmp_path: Path) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        for first in range(0, 2 * ROWS, 2 * BATCH):  # over rows on disk, then new ones
            keys = np.arange(first, first + 2 * BATCH, dtype=np.uint64)
            rows = np.repeat(keys.astype(np.float32) * 2, DIM)
            request = pb.WriteRowsRequest(
                table="t", width=DIM, keys=keys.tobytes(), rows=rows.tobytes()
            )
            await peer.call("CheckpointService/WriteRows", request.SerializeToString())
        assert len(table(peer)) == 2 * ROWS
        assert peer.server._shard.budget.held <= 8 * MIB
        for first in range(0, 2 * ROWS, ROWS // 4):
            keys = np.arange(first, first + 50, dtype=np.uint64)
            assert values(await pull(peer, keys)) == (keys * 2.0).tolist()

    serve(act, tmp_path)


def test_what_happens_between_the_tiers_is_counted(tmp_path: Path, uncached: None) -> None:
    async def act(peer: Peer) -> None:
        await fill(peer)
        store = table(peer).store
        before = store.moves.hits
        await pull(peer, COLD)
        await pull(peer, HOT)
        await push(peer, COLD[:100], 1.0)
        await pull(peer, np.array([1 << 50], np.uint64))  # a key without a row is neither
        request = pb.DescribeTableRequest(name="t").SerializeToString()
        for _ in range(1200):  # the flusher may just be rewriting blocks
            data = await peer.call("TableService/DescribeTable", request)
            stats = pb.DescribeTableResponse.FromString(data).stats
            host, disk = stats.tiers
            samples = {
                (sample.name, *sample.labels.values()): sample.value
                for metric in peer.server._metrics.registry.collect()
                for sample in metric.samples
            }
            if samples["ps_table_bytes", "t", "lmdb"] == disk.bytes:
                break
            await asyncio.sleep(0.05)
        assert (host.tier, disk.tier) == ("host", "lmdb")
        assert host.rows + disk.rows == stats.rows == ROWS
        assert host.hits == before + len(HOT)
        assert host.misses == disk.hits == BATCH + 100
        assert disk.bytes > ROWS * DIM * 4 / 2
        assert stats.cache.promotions == 100
        assert stats.cache.demotions >= disk.rows
        assert stats.cache.flushed_rows >= disk.rows
        assert stats.cache.warm_reads == 2
        assert stats.cache.warm_seconds > 0
        assert samples["ps_table_rows", "t", "lmdb"] == disk.rows
        assert samples["ps_table_bytes", "t", "lmdb"] == disk.bytes
        assert samples["ps_tier_misses_total", "t", "host"] == BATCH + 100
        assert samples["ps_promotions_total", "t"] == 100
        assert samples["ps_warm_read_seconds_count", "t"] == 2

    serve(act, tmp_path)


def test_a_push_larger_than_memory_is_applied_and_the_memory_is_given_back(tmp_path: Path) -> None:
    async def act(peer: Peer) -> None:
        budget = peer.server._shard.budget
        keys = np.arange(3 * ROWS // 4, dtype=np.uint64)
        await push(peer, keys, 1.0)
        await push(peer, keys, 1.0)
        assert len(table(peer)) == len(keys)
        some = keys[::1000].copy()
        assert values(await pull(peer, some)) == [2.0] * len(some)
        await until(lambda: budget.spare >= 0, 60)
        await push(peer, HOT, 1.0)
        assert budget.held <= budget.limit

    serve(act, tmp_path, "--max-message-bytes", str(64 * MIB))


def test_work_between_requests_goes_on_after_it_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fails(entries: Any) -> Any:
        calls.append(len(entries))
        raise ZeroDivisionError

    async def act(peer: Peer) -> int:
        monkeypatch.setattr(peer.server._shard.pushroom, "relieve", fails)
        monkeypatch.setattr(peer.server._shard.pushroom, "tight", lambda pushes: [None])
        await fill(peer)
        await until(lambda: len(calls) > 1)
        return peer.engine.failures

    assert serve(act, tmp_path) > 1
