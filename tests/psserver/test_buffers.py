"""Nothing that a shard keeps outside its budget grows without bound."""

from __future__ import annotations

import gc
import sys
import types
from typing import Any

import numpy as np
import pytest
from stores import change, make_shard, push, schema
from test_shard_log import Log

from psserver.afterimages import KEPT, KEPT_BYTES, ImageBuffers
from psserver.sessions import LEAST_WINDOW, RECORDED, WINDOW, Sessions
from psserver.shard import Shard
from storage.eviction.rules import StepTtl

MIB = 1 << 20
OUTSIDE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, Log)


def size_of(root: Any) -> int:
    """Bytes of everything that can be reached from an object, memory of the budget left out."""
    seen: set[int] = set()
    stack, size = [root], 0
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, OUTSIDE):
            continue
        seen.add(id(item))
        size += sys.getsizeof(item)
        stack += gc.get_referents(item)
        if isinstance(item, np.ndarray) and item.base is not None:
            stack.append(item.base)
    return size


# ---- after-images


def test_a_buffer_is_used_again_once_the_log_has_written_it() -> None:
    buffers = ImageBuffers()
    first = buffers.take(10, 4, 1, 0)[1].base
    assert buffers.take(10, 4, 2, 0)[1].base is not first
    assert buffers.take(5, 4, 3, 1)[1].base is first
    assert buffers.bytes == 2 * 10 * 24


def test_buffers_hold_what_was_asked_for() -> None:
    buffers = ImageBuffers()
    for version, count in enumerate((3, 0, 1000, 7), 1):
        frequencies, rows = buffers.take(count, 5, version, version - 2)
        assert (frequencies.shape, frequencies.dtype) == ((count,), np.uint64)
        assert (rows.shape, rows.dtype) == ((count, 5), np.float32)
        frequencies[:], rows[:] = 1, 2


def test_a_stall_of_the_log_leaves_no_more_than_the_bound() -> None:
    buffers = ImageBuffers()
    for version in range(1, 2001):  # small pushes while the log stands still
        buffers.take(10, 4, version, 0)
    for version in range(2001, 2201):  # then larger ones, of which none waits for long
        buffers.take(20_000, 16, version, version - 1)
        assert buffers.bytes <= KEPT_BYTES + 2 * 20_000 * 72
    assert len(buffers._kept) <= KEPT
    buffers.drain(2199)
    assert buffers.bytes == 20_000 * 72  # in flight
    buffers.drain(2200)
    assert buffers.bytes == 0


def test_a_buffer_larger_than_the_bound_is_freed_when_it_is_written() -> None:
    buffers = ImageBuffers()
    buffers.take(1 << 20, 32, 1, 0)
    buffers.take(1, 1, 2, 1)
    assert buffers.bytes == 12


# ---- sessions


@pytest.mark.parametrize("clients", [1, 1000, 20_000])
def test_clients_that_acknowledge_nothing_share_a_bound(clients: int) -> None:
    sessions = Sessions(clients, 600.0, lambda: 0.0)
    for client in range(1, clients + 1):
        sessions.record(client, 1, 1, 0, 1)
    for sequence in range(2, {1: 6000, 1000: 1200, 20_000: 70}[clients]):
        for client in range(1, clients + 1, max(1, clients // 20)):
            sessions.record(client, 1, sequence, 0, sequence)
    window = {1: WINDOW, 1000: RECORDED // 1000, 20_000: LEAST_WINDOW}[clients]
    longest = max(len(each.versions) for each in sessions._sessions.values())
    assert longest == window


# ---- all of it


def traffic(shard: Shard, log: Log, keys: int, times: int) -> None:
    """Everything that a shard does, with a log that stands still meanwhile."""
    log.writes = False
    for i in range(times):
        who = {"client": 1 + i % 8, "sequence": 1 + i}
        shard.exchange([push(range(keys), **who)], [])
        shard.delete(change([i % keys]))
        if not i % 10:
            shard.create_table(schema(f"u{i % 3}"))
            shard.exchange([push([i], table=f"u{i % 3}")], [])
            shard.drop_table(f"u{i % 3}")
        shard.sweeps.tick()
        shard.barrier("b")
    log.write()
    log.writes = True
    log.frames.clear()
    for _ in range(3):
        shard.exchange([push([1], client=9, sequence=10_000_000 + shard.version)], [])
    shard.capture()


def test_what_a_shard_keeps_does_not_grow_with_what_it_did() -> None:
    log = Log()
    shard = make_shard(log=log, max_tombstones=100, max_sessions=16)
    shard.create_table(schema(evictions=(StepTtl(steps=1_000_000),)))
    traffic(shard, log, 1000, 50)
    before = size_of(shard)
    traffic(shard, log, 1000, 1000)  # 16 MB of after-images
    assert size_of(shard) - before < MIB
    assert shard.buffer_bytes < 65_536
