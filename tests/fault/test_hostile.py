"""Ten concurrent trainers, four of them hostile: the sums of the others must be exact."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from numpy.testing import assert_array_equal
from servers import Cluster, eventually

from psclient import Client
from psproto import codec, routing
from psproto import ps_pb2 as pb

pytestmark = pytest.mark.slow

DIM = 8
KEYS = np.arange(-2_000, 2_000) * 2**20
GOOD, PUSHES = 6, 60
MARGIN = 64 << 20  # bytes that a server may keep: heaps, caches of gRPC


def _push_until_killed(addresses: list[str], table: str, going: Event) -> None:
    with Client(addresses) as client:
        rows = client.table(table)
        ones = np.full((len(KEYS), DIM), -1.0, np.float32)
        while True:
            rows.push(KEYS, ones)
            going.set()


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _refusal(error: grpc.RpcError) -> tuple[str, str]:
    """Return the code and reason of a failed call."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if details is None:
        return error.code().name, ""
    info = ErrorInfo()
    Status.FromString(details).details[0].Unpack(info)
    return error.code().name, info.reason


def _bad_requests(table: str, limit: int) -> dict[tuple[str, str], tuple[str, bytes]]:
    """Return bad messages for shard 0 with their methods, by expected code and reason."""
    shard_map = routing.even_map(2)
    split = routing.split(KEYS.view(np.uint64), shard_map)
    mine, theirs = split.keys[: split.bounds[1]], split.keys[split.bounds[1] :]
    n = len(mine)
    good = np.ones((n, DIM), np.float32)
    nan = good.copy()
    nan[3, 2] = np.nan

    def push(name: str, keys: Any, gradients: Any) -> bytes:
        return codec.encode_push(
            codec.PushMessage(pb.PushHeader(table=name), keys, None, gradients)
        )

    return {
        ("INVALID_ARGUMENT", "MALFORMED_MESSAGE"): ("Push", os.urandom(100) + b"\xff" * 20),
        ("INVALID_ARGUMENT", "DIM_MISMATCH"): ("Push", push(table, mine, good[:, 1:].copy())),
        ("INVALID_ARGUMENT", "NON_FINITE"): ("Push", push(table, mine, nan)),
        ("NOT_FOUND", "TABLE_NOT_FOUND"): ("Push", push("no.such.table", mine, good)),
        ("FAILED_PRECONDITION", "WRONG_SHARD"): ("Push", push(table, theirs[:1], good[:1])),
        ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE"): (
            "Pull",
            codec.encode_pull(
                codec.PullMessage(pb.PullHeader(table=table), np.zeros(limit, np.uint64))
            ),
        ),
    }


def test_bad_trainers_harm_nobody(start_cluster: Callable[..., Cluster]) -> None:
    limit = 1 << 20
    cluster = start_cluster(2, "--max-message-bytes", str(limit), metrics=True)
    pids = [cluster.pids(shard)[-1] for shard in range(2)]
    failures: list[BaseException] = []
    stop = threading.Event()
    refused: dict[tuple[str, str], int] = {}

    def good(number: int) -> None:
        rng = np.random.default_rng(number)
        with Client(cluster.addresses, timeout=60.0) as client:
            table = client.table("shared")
            for step in range(PUSHES):
                some = rng.choice(KEYS, 500)
                table.push(some, np.full((500, DIM), -1.0, np.float32), step=step)
                table.pull(some)

    def garbage() -> None:
        rng = np.random.default_rng(99)
        with grpc.insecure_channel(cluster.addresses[0]) as channel:
            while not stop.is_set():
                data = rng.bytes(int(rng.integers(1, 5_000)))
                for kind in ("Pull", "Push", "Exchange"):
                    with pytest.raises(grpc.RpcError) as raised:
                        channel.unary_unary(f"/ps.v1.RowService/{kind}")(b"\xff" + data)
                    assert _refusal(raised.value) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
                replies = channel.stream_stream("/ps.v1.RowService/Stream")(iter([b"\xff" + data]))
                with pytest.raises(grpc.RpcError) as raised:
                    list(replies)
                assert _refusal(raised.value) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")

    def wrong() -> None:
        asked = _bad_requests("shared", limit // 8 + 1)
        with grpc.insecure_channel(cluster.addresses[0]) as channel:
            while not stop.is_set():
                for expected, (kind, data) in asked.items():
                    with pytest.raises(grpc.RpcError) as raised:
                        channel.unary_unary(f"/ps.v1.RowService/{kind}")(data)
                    assert _refusal(raised.value) == expected
                    refused[expected] = refused.get(expected, 0) + 1

    def fickle() -> None:
        while not stop.is_set():
            with Client(cluster.addresses) as client:
                client.table("shared").start_pull(KEYS)  # and leaves without its reply

    def guarded(work: Callable[..., None], *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                work(*args)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with Client(cluster.addresses) as client:
        empty = [_resident(pid) for pid in pids]
        zeros: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0, "initializer": "zeros"}
        shared = client.create_table("shared", DIM, **zeros)
        doomed = client.create_table("doomed", DIM, **zeros)
        context = multiprocessing.get_context("spawn")
        going = context.Event()
        victim = context.Process(
            target=_push_until_killed, args=(cluster.addresses, "doomed", going)
        )
        victim.start()
        bad = [guarded(garbage), guarded(wrong), guarded(fickle)]
        trainers = [guarded(good, number) for number in range(GOOD)]
        assert going.wait(60)
        time.sleep(0.3)
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)  # in mid-push, more likely than not
        victim.join()
        for trainer in trainers:
            trainer.join(100)
        stop.set()
        for thread in bad:
            thread.join(30)
        assert failures == []
        assert set(refused) == set(_bad_requests("shared", 1))

        expected = dict.fromkeys(KEYS.tolist(), 0.0)
        for number in range(GOOD):
            rng = np.random.default_rng(number)
            for _ in range(PUSHES):
                for key in rng.choice(KEYS, 500).tolist():
                    expected[key] += 1.0
        sums = np.array([expected[key] for key in KEYS.tolist()], np.float32)
        assert_array_equal(shared.pull(KEYS), np.repeat(sums[:, None], DIM, axis=1))

        # Each shard applied whole pushes of the killed trainer: all its rows there are equal.
        split = routing.split(KEYS.view(np.uint64), routing.even_map(2))
        rows = doomed.pull(split.keys)
        for first, last in zip(split.bounds[:-1], split.bounds[1:], strict=True):
            assert len(np.unique(rows[first:last])) == 1
            assert rows[first, 0] >= 1.0

        for info in client.list_tables():
            client.drop_table(info.name)
        for shard, pid in enumerate(pids):
            eventually(lambda shard=shard: _metric(cluster, shard, "ps_inflight_bytes") == 0)
            assert _metric(cluster, shard, "ps_memory_bytes") == 0
            eventually(lambda pid=pid, shard=shard: _resident(pid) - empty[shard] <= MARGIN)


def _metric(cluster: Cluster, shard: int, name: str) -> float:
    """Return the value of a metric without labels."""
    found = [value for (each, _), value in cluster.metrics(shard).items() if each == name]
    assert len(found) == 1
    return found[0]
