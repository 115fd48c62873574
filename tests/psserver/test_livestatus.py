"""GetStatus of a real server: figures of what it did, and of what it refused."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest
from peers import Peer, with_server

from psproto import ps_pb2 as pb
from psserver.livestatus import _with_pauses
from psserver.recent import KEPT, MESSAGE_BYTES, RecentErrors


async def figures(peer: Peer) -> pb.GetStatusResponse:
    return pb.GetStatusResponse.FromString(await peer.call("InfoService/GetStatus", b""))


def test_it_counts_what_was_served_and_refused(tmp_path: Path) -> None:
    keys = np.arange(3, dtype=np.uint64)

    async def act(peer: Peer) -> pb.GetStatusResponse:
        pull = pb.PullRequest(header=pb.PullHeader(table="t"), keys=keys.tobytes())
        for _ in range(2):
            await peer.call("RowService/Pull", pull.SerializeToString())
        pull.header.table = "no-table"
        with pytest.raises(grpc.aio.AioRpcError):
            await peer.call("RowService/Pull", pull.SerializeToString())
        return await figures(peer)

    found = with_server(act, "--data-dir", str(tmp_path))
    assert found.phase == pb.PHASE_READY
    assert found.start
    assert found.uptime_seconds > 0
    assert (found.shard, found.shards, found.table_count, found.version) == (0, 1, 1, 1)
    (table,) = found.tables
    assert (table.name, table.requests, table.pulled_keys) == ("t", 2, 6)
    assert [tier.tier for tier in table.tiers] == ["host", "lmdb"]
    (method,) = found.methods
    assert (method.method, method.requests, method.keys) == ("Pull", 2, 6)
    assert sum(method.latency.buckets) == method.latency.count == 2
    refused = ("Pull", "NOT_FOUND", "TABLE_NOT_FOUND", 1)
    errors = [(each.method, each.code, each.reason, each.count) for each in found.errors]
    assert refused in errors
    (recent,) = found.recent_errors
    assert (recent.method, recent.code, recent.reason, recent.count) == refused
    assert "no-table" in recent.message
    assert found.engine.busy_seconds > 0
    assert found.log.written_version == 1
    assert {"host_bytes", "max_inflight_bytes", "process", "disk", "max_tables"} <= {
        each.name for each in found.budgets
    }


def test_it_has_the_tables_with_the_most_rows() -> None:
    async def act(peer: Peer) -> pb.GetStatusResponse:
        for number in range(5):
            await peer.create(f"t{number}", 4)
        return peer.server._live.read(most_tables=2)

    found = with_server(act)
    assert (found.table_count, len(found.tables)) == (6, 2)
    assert not found.HasField("log")


def test_other_threads_may_run_after_a_few_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr("time.sleep", lambda seconds: done.append(-1))
    for item in _with_pauses(range(5), 2):
        done.append(item)
    assert done == [0, 1, -1, 2, 3, -1, 4]


class TestRecentErrors:
    def test_the_newest_are_first_and_few(self) -> None:
        errors = RecentErrors(now=iter(range(1000)).__next__)
        for number in range(100):
            errors.add("Pull", "NOT_FOUND", "X", chr(ord("a") + number % 26) * (1 + number // 26))
        found = errors.newest()
        assert len(found) == KEPT
        assert [each.time for each in found] == list(range(99, 99 - KEPT, -1))

    def test_errors_that_differ_in_numbers_are_one(self) -> None:
        errors = RecentErrors()
        errors.add("Push", "INVALID_ARGUMENT", "Y", "other")
        for number in range(1000):
            errors.add("Pull", "RESOURCE_EXHAUSTED", "OVERLOADED", f"{number} bytes")
        first, second = errors.newest()
        assert (first.message, first.count) == ("999 bytes", 1000)
        assert (second.message, second.count) == ("other", 1)

    def test_keys_and_control_characters_are_left_out(self) -> None:
        errors = RecentErrors()
        errors.add("Pull", "X", "Y", "table 't': key 12345678 belongs to shard 1\n\x1b[31m")
        assert errors.newest()[0].message == ("table 't': key (not shown) belongs to shard 1  [31m")

    def test_a_long_message_is_cut(self) -> None:
        errors = RecentErrors()
        errors.add("Pull", "X", "Y", "é" * 1000)
        assert len(errors.newest()[0].message.encode()) <= MESSAGE_BYTES
