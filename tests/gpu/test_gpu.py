"""What the tables of a shard share of a GPU: its budget, page-locked memory, queues for scans."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cpukernels import compiler
from fakedevice import MODES, FakeDevice

from storage import balance, owners
from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.gpu.device import OutOfDeviceMemory
from storage.gpu.gpu import PAUSE_SECONDS, PINNED_BYTES, Gpu
from storage.gpu.slab import Slab
from storage.gpu.staging import SCANS
from storage.initializers import make_initializer
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.schema import MAX_DIM, TableSchema
from storage.table import Table
from storage.tiers import places
from storage.tiers.hbm import HbmTier

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")
ROWS, WIDTH = 1500, 200  # more than page-locked memory takes at once


def slab_of(gpu: Gpu) -> tuple[Slab, np.ndarray]:
    """A slab with ROWS rows, and these rows."""
    slab = Slab(WIDTH, gpu.staging, gpu.budget)
    slab.grow(ROWS)
    rows = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    slab.scatter(np.arange(ROWS), rows)
    return slab, rows


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_scans_use_the_page_locked_memory_of_the_start(mode: str) -> None:
    device = FakeDevice(mode)
    gpu = Gpu(device, 1 << 30)
    assert device.pinned_bytes == PINNED_BYTES
    slab, rows = slab_of(gpu)
    threads = 2 * SCANS
    together = threading.Barrier(threads)

    def read(number: int) -> bool:
        scan, slots = slab.snapshot(), np.random.default_rng(number).permutation(ROWS)
        together.wait()
        out = np.full((ROWS, WIDTH), np.nan, np.float32)
        scan.gather(slots, out)
        norms = scan.measure(slots, WIDTH)
        return out.tobytes() == rows[slots].tobytes() and bool(np.isfinite(norms).all())

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(read, range(threads)))
    assert device.pinned_bytes == PINNED_BYTES
    assert len(device.queues) == 1 + SCANS


def test_a_scan_whose_memory_is_borrowed_waits_until_it_is_returned() -> None:
    gpu = Gpu(FakeDevice("early"), 1 << 30)
    slab, rows = slab_of(gpu)
    out, done = np.empty_like(rows), threading.Event()
    held = [gpu.staging.scans.borrow(gpu.staging.queue.mark()) for _ in range(SCANS)]
    for each in held:
        each.__enter__()
    scan = slab.snapshot()
    thread = threading.Thread(
        target=lambda: (scan.gather(np.arange(ROWS), out), done.set()), daemon=True
    )
    thread.start()
    assert not done.wait(0.2)
    for each in held:
        each.__exit__(None, None, None)
    assert done.wait(60)
    assert out.tobytes() == rows.tobytes()


def test_a_row_of_every_table_fits_into_page_locked_memory() -> None:
    gpu = Gpu(FakeDevice("early"), 1 << 30)
    for name in OPTIMIZERS:
        assert gpu.takes(MAX_DIM + make_optimizer(name, None, {}).state_width(MAX_DIM))
    assert not gpu.takes(1 << 20)


def test_without_page_locked_memory_there_is_no_gpu() -> None:
    class Swamped(FakeDevice):
        def pinned(self, size: int) -> object:
            raise OutOfDeviceMemory(size, self.free, "page-locked memory of the host")

    with pytest.raises(OutOfMemory, match=r"^page-locked memory of the host is full: "):
        Gpu(Swamped("early"), 1 << 30)


def schema_of(name: str) -> TableSchema:
    optimizer, initializer = make_optimizer("adam", None, {}), make_initializer("uniform", {})
    return TableSchema(name=name, dim=512, optimizer=optimizer, initializer=initializer)


def test_a_table_for_which_the_gpu_has_no_room_stays_in_host_memory() -> None:
    gpu = Gpu(FakeDevice("early"), 40 << 20)
    tables = []
    for name in ("first", "second"):
        tables.append(Table(schema_of(name), Budget(1 << 30)))
        tables[-1].attach_gpu(gpu)
    keys = np.arange(2000, dtype=np.uint64)
    for version, table in enumerate(tables, 1):
        gradients = np.ones((len(keys), 512), np.float32)
        table.push(keys, gradients, np.ones(len(keys), np.uint32), version=version, step=1)
        balance = table.store.balance
        assert balance is not None
        while balance.slice():
            pass
    found = [{tier.tier: tier.rows for tier in table.stats().tiers} for table in tables]
    assert found == [{"hbm": 2000, "host": 0}, {"hbm": 0, "host": 2000}]


def test_a_server_compiles_nothing_when_rows_first_move() -> None:
    kernels = balance._scores, balance._choose, owners._take, owners._give, owners._without
    kernels = *kernels, places._split
    pytest.importorskip("psserver.warm").warm()
    compiled = [len(each.signatures) for each in kernels]
    assert all(compiled)
    table = Table(schema_of("t"), Budget(1 << 30))
    table.attach_gpu(Gpu(FakeDevice("early"), 64 << 20))
    keys = np.arange(12_000, dtype=np.uint64)  # more than the GPU has room for
    for version in (1, 2, 3):
        pushed = np.split(keys, 6) if version < 3 else [keys[:3000], keys[9000:]]
        for some in pushed:
            gradients = np.ones((len(some), 512), np.float32)
            table.push(some, gradients, np.ones(len(some), np.uint32), version=version, step=1)
            chooses = table.store.balance
            assert chooses is not None
            while chooses.slice():
                pass
        table.delete(keys[:1000])
    host = table.store.host
    assert isinstance(host, HbmTier)
    assert 0 < host.hbm_rows < len(table)
    host.compact(1 << 30)
    table.delete(keys)
    host.shrink_hbm()
    assert [len(each.signatures) for each in kernels] == compiled


class TestPause:
    """A full device pauses promotion, and is asked again from time to time."""

    def test_only_a_full_device_pauses_and_is_reported_once(self) -> None:
        now, told = [0.0], list[str]()
        device = FakeDevice("early", limit=40 << 20)
        gpu = Gpu(device, 1 << 30, told.append, clock=lambda: now[0])
        slab = Slab(WIDTH, gpu.staging, gpu.budget)
        small = Slab(WIDTH, gpu.staging, Budget(1 << 20))
        for each in (small, slab, slab):
            with pytest.raises(OutOfMemory) as raised:
                each.grow(1_000_000)
            gpu.full(raised.value)
            assert gpu.paused == (each is slab)
            assert gpu.promotes == (each is small)
        assert len(told) == 1
        assert told[0].startswith("GPU memory is full: ")
        now[0] += PAUSE_SECONDS
        assert (gpu.promotes, gpu.promotes, gpu.paused) == (True, False, True)
        device.limit = 1 << 30
        slab.grow(1000)
        gpu.resume()
        assert (gpu.promotes, gpu.promotes, gpu.paused) == (True, True, False)
