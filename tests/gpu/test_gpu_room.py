"""Room in host memory for the rows of a shard that also has rows in GPU memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic")  # what a server needs may be missing where the GPU is
pytest.importorskip("lmdb")

from cpukernels import compiler
from fakedevice import FakeDevice

from storage.errors import NoRoom
from storage.gpu.gpu import Gpu
from storage.optimizers import make_optimizer
from tests.stores import Home, push, schema

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")
MIB, DIM = 1 << 20, 256
HOST = 8 * MIB  # some 3000 rows


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    gpu = Gpu(FakeDevice("early"), 64 * MIB)
    with Home(tmp_path / "home", memory_bytes=HOST, segment_bytes=4 * MIB, gpu=gpu) as made:
        optimizer = make_optimizer("adagrad", 0.1, {})
        made.shard.create_table(schema(name="t", dim=DIM, optimizer=optimizer))
        yield made


def apply(home: Home, keys: range) -> bool:
    """Push 1 to rows as a server does; return whether the memory budget had to be exceeded."""
    item = push(keys, gradients=np.ones((len(keys), DIM), np.float32))
    for _ in range(20):
        try:
            home.shard.exchange([item], [])
            return False
        except NoRoom as error:
            home.flusher.flush()
            if error.oversized:
                home.shard.exchange([item], [], exceed=True)
                return True
    raise AssertionError("no room after 20 flushes")


def lift(home: Home) -> Any:
    """Let all rows in host memory enter the GPU; return the store of the table."""
    store = home.shard._tables.get("t").table.store
    assert store.balance is not None
    while store.balance.slice():
        pass
    assert store.host.hbm_rows == store.host.rows
    return store


def test_rows_in_gpu_memory_stay_while_others_can_leave_host_memory(home: Home) -> None:
    apply(home, range(2000))
    home.flusher.flush()
    store = lift(home)
    for first in range(2000, 12_000, 1000):
        apply(home, range(first, first + 1000))
        assert store.host.hbm_rows == 2000
        assert home.shard.budget.held <= home.shard.budget.limit
    assert store.moves.demotions > 5000
    home.flusher.flush()
    assert store.shrink(4 * MIB) > 3 * MIB
    assert store.host.hbm_rows == 2000
    home.flusher.flush()
    apply(home, range(12_000))  # each row was pushed once before
    rows = home.shard.dump()["t"].rows[:, DIM:]
    assert len(rows) == 12_000
    assert (rows == rows[0]).all()


def test_rows_in_gpu_memory_are_no_room_for_a_push_larger_than_host_memory(home: Home) -> None:
    for first in range(0, 20_000, 2000):
        apply(home, range(first, first + 2000))
        home.flusher.flush()
        store = lift(home)
    assert apply(home, range(20_000, 24_000))
    assert len(store) == 24_000
    home.flusher.flush()
    while home.shard.pushroom.trim():
        pass
    assert home.shard.budget.held <= home.shard.budget.limit


def test_all_clean_rows_can_leave_host_memory_if_none_is_in_gpu_memory(home: Home) -> None:
    apply(home, range(1000))
    home.flusher.flush()
    store = home.shard._tables.get("t").table.store
    while store.shrink(1):
        pass
    assert (store.host.rows, store.blocks.rows) == (0, 1000)


def test_rows_in_gpu_memory_leave_if_their_keys_fill_host_memory(home: Home) -> None:
    apply(home, range(2000))
    home.flusher.flush()
    store = lift(home)
    held = store.host.bytes
    assert store.shrink(4 * MIB) > held // 2
    assert store.host.hbm_rows < 2000
