"""Compile every Numba kernel, or load it from the cache, before the first request needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import codec, routing
from psproto import ps_pb2 as pb
from storage import balance, initializers, optimizers
from storage.admission import rules as admission
from storage.analysis import RowColumns, Summary
from storage.arena import Budget
from storage.block import Block
from storage.blockfile import BlockFile
from storage.directory import Zones
from storage.eviction import sweep as eviction
from storage.index import SEGMENT, Index
from storage.kernels import Images, Keys
from storage.schema import TableSchema
from storage.slots import FREQUENCY, KEY, STEP, VERSION
from storage.table import Table
from storage.tiers.lmdb import Blocks

BLOCK_AT = 4096 + 16  # offset of the first block in a file: as in the base's, after a page header
BUDGET = 64 << 20  # memory limit, in bytes, of the tables created here


def warm() -> None:
    """Run each kernel once on a few rows, so that it is compiled, or loaded from the cache.

    Takes about a minute to compile all kernels, or a second to load them. Numba compiles a kernel
    separately for read-only arrays, such as those in received messages, log records and blocks. So
    the kernels are run with both writable and read-only arrays.
    """
    initializers.compile_all()
    optimizers.compile_all()
    admission.compile_all()
    eviction.compile_all()
    balance.compile_all()
    for written in (True, False):
        keys = _view(np.arange(4, dtype=np.uint64), written)
        _warm_table(keys, written)
        _warm_blocks(keys, written)
        _warm_index(keys)
        _warm_routing(keys, written)


def _view(array: NDArray[Any], written: bool) -> Any:
    """Return a view of an array: writable if ``written``, else read-only."""
    view = array.view()
    view.flags.writeable = written
    return view


def _schema() -> TableSchema:
    return TableSchema(
        name="warm",
        dim=2,
        optimizer=optimizers.make_optimizer("sgd", None, {}),
        initializer=initializers.make_initializer("uniform", {}),
    )


def _warm_table(keys: Keys, written: bool) -> None:
    """Run the kernels of tables, with arrays that are writable if ``written``, else read-only."""
    table = Table(_schema(), Budget(BUDGET))
    rows, frequencies = np.ones((4, 2), np.float32), np.ones(4, np.uint64)
    sent = _view(rows, written)
    counts = _view(np.ones(4, np.uint32), written)
    table.check_push(keys, sent, step=0, largest=1e30)
    wild = 1e13  # so large that the rows are checked for overflow
    for version in (1, 2):  # the first push creates the rows, the second updates them
        pushed = table.push(keys, sent, counts, version=version, step=0, lr=1.0, largest=wild)
    slots = pushed.slots
    table.images(slots, frequencies, rows)
    versions, steps = np.ones(4, np.uint64), np.ones(4, np.int64)
    stored = _view(frequencies, written)
    table.put(Images(keys, versions, steps, stored, sent))  # as in a log record
    table.put(Images(keys, _view(versions, written), _view(steps, written), stored, sent))
    _warm_scan(table, keys, written)
    table.pull(keys, "train", rows)
    table.pull(keys, "serve", rows)
    table.delete(keys[:1])
    table.reuse.make_room()
    table.close()


def _warm_scan(table: Table, keys: Keys, written: bool) -> None:
    """Run the kernels that scan, copy and summarize the rows of a table.

    keys     uint64[n], keys of all rows of the table
    written  whether the arrays of metadata that are summarized as those of a checkpoint are
             writable
    """
    rows, frequencies = np.empty((len(keys), 2), np.float32), np.empty(len(keys), np.uint64)
    scan = table.scan()
    places = scan.find(0, 0, 2, len(keys))[0]
    assert len(places) == len(keys)  # else the kernels below would run on no rows
    scan.copy(places, frequencies, rows)
    norms = np.empty(len(keys))
    meta = scan.measure(places, norms)
    scan.read(places, rows)
    table.exact_scan().next(len(keys), 1, norms=True)
    of_table = meta[:, KEY], meta[:, VERSION], meta[:, STEP].view(np.int64), frequencies
    of_checkpoint = [_view(column.copy(), written) for column in of_table]
    for columns in (of_table, of_checkpoint):
        Summary().add(RowColumns._make([*columns, norms, "host"]), 0)


def _warm_blocks(keys: Keys, written: bool) -> None:
    """Run the kernels for rows on disk, with a file that exists only in memory.

    keys     uint64[n], distinct
    written  whether the arrays of pushes are writable
    """
    file = os.memfd_create("warm")
    try:
        os.truncate(file, BLOCK_AT + (1 << 20))
        with BlockFile(Path(f"/proc/self/fd/{file}"), reserved=1 << 20) as mapped:
            _use_blocks(mapped, file, keys, written)
    finally:
        os.close(file)


def _use_blocks(mapped: BlockFile, file: int, keys: Keys, written: bool) -> None:
    """Flush rows, demote and promote them, and read them from disk.

    mapped  map of the file in which the rows are stored
    file    its descriptor, to write to
    """
    budget, schema = Budget(BUDGET), _schema()
    blocks = Blocks(schema.dim, schema.width, mapped, budget)
    table = Table(schema, budget)
    table.attach(blocks, lambda: None)
    gradients = _view(np.ones((len(keys), 2), np.float32), written)
    counts = _view(np.ones(len(keys), np.uint32), written)
    table.push(keys, gradients, counts, version=1, step=0)
    first = _flush(table, file, BLOCK_AT)
    table.store.demote(1)
    _read_blocks(table, keys)
    table.store.move(first, np.arange(len(keys)), _write(table, file, BLOCK_AT + 65_536), 0)
    for _ in range(2):  # promotes
        table.push(keys, gradients, counts, version=2, step=0)
    table.store.shrink(1)
    table.close()


def _read_blocks(table: Table, keys: Keys) -> None:
    """Read rows that are on disk only, in each way in which a server reads them."""
    rows, n = np.empty((len(keys), 2), np.float32), len(keys)
    assert table.store.blocks is not None
    for _ in range(2):  # the second time, the pages are in memory
        pages = table.store.pages(keys, whole=True, meta=True)
        assert pages is not None  # else the kernels below would run on no rows
        pages.warm()
        table.store.blocks.settle(pages)
    table.metadata(table.pull(keys, "train", rows))
    scan = table.scan()
    start: int | None = 0
    while start is not None:
        places, start = scan.find(start, 0, 2, n)
        scan.copy(places, np.empty(len(places), np.uint64), rows[: len(places)])
        scan.measure(places, np.empty(len(places)))
        scan.read(places, rows[: len(places)])
    exact = table.exact_scan()
    for _ in range(3):
        exact.next(n, 1, norms=True)()
    cold = table.contents().cold
    assert cold is not None
    cold.bounds(0)
    for _, number in table.store.blocks.extents():
        if reads := cold.reads(number, True):
            reads()
        view = cold.view(number)
        assert view is not None
        view.norms(np.arange(n))


def _flush(table: Table, file: int, at: int) -> int:
    """Write the dirty rows of a table to a block at offset ``at``, and make them clean."""
    scan = table.store.host.scan()
    slots, _ = scan.dirty(0, 1, 64)
    table.store.waiting(slots, 1)
    extent = _write(table, file, at)
    blocks = table.store.blocks
    assert blocks is not None
    table.store.adopt(extent, slots, blocks.keys(extent), blocks.versions(extent))
    return extent


def _write(table: Table, file: int, at: int) -> int:
    """Write the rows of a table to a block at offset ``at`` of a file. Returns the extent."""
    block = Block.empty(1, table.schema.width, len(table))
    keys = table.store.keys()
    locations, _ = table.store.find(keys)
    table.store.gather(locations, block.rows)
    meta = table.store.meta(locations)
    block.keys[:], block.versions[:] = meta[:, KEY], meta[:, VERSION]
    block.steps[:], block.frequencies[:] = meta[:, STEP].view(np.int64), meta[:, FREQUENCY]
    os.pwrite(file, block.seal(table.schema.dim), at)
    assert table.store.blocks is not None
    return table.store.blocks.add(at, at, len(block), Zones.of(block), verified=False)


def _warm_index(keys: Keys) -> None:
    index = Index(Budget(BUDGET))
    many = np.arange(SEGMENT, dtype=np.uint64)
    index.insert(many, many + np.uint64(1))  # enough for a segment to be split
    index.insert(keys + np.uint64(SEGMENT), keys + np.uint64(1))
    index.assign(keys, keys + np.uint64(1))
    index.find(keys)
    index.remove(keys)
    index.insert(keys, keys + np.uint64(1))
    index.close()


def _warm_routing(keys: Keys, written: bool) -> None:
    rows = _view(np.ones((4, 2), np.float32), written)
    shard_map = routing.even_map(2)
    split = routing.split(keys, shard_map)
    routing.split(keys, routing.even_map(1))
    routing.check(keys, shard_map, 0)
    routing.owners(keys, shard_map)
    routing.first_foreign(keys, shard_map, 0)
    routing.sum_rows(rows, split.inverse, np.zeros((len(split.keys), 2), np.float32))
    routing.all_finite(rows.reshape(-1).view(np.uint32))
    codec.to_wire(np.ones((4, 2), np.float32), pb.DTYPE_BFLOAT16)
