"""Compile every Numba kernel, or load it from the cache, before the first request needs it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import codec, routing
from psproto import ps_pb2 as pb
from storage import initializers, optimizers
from storage.admission import rules as admission
from storage.analysis import RowColumns, Summary
from storage.arena import Budget
from storage.eviction import sweep as eviction
from storage.index import SEGMENT, Index
from storage.kernels import Images, Keys
from storage.schema import TableSchema
from storage.table import Table

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
    for written in (True, False):
        keys = _view(np.arange(4, dtype=np.uint64), written)
        _warm_table(keys, written)
        _warm_index(keys)
        _warm_routing(keys, written)


def _view(array: NDArray[Any], written: bool) -> Any:
    """Return a view of an array: writable if ``written``, else read-only."""
    view = array.view()
    view.flags.writeable = written
    return view


def _warm_table(keys: Keys, written: bool) -> None:
    """Run the kernels of tables, with arrays that are writable if ``written``, else read-only."""
    schema = TableSchema(
        name="warm",
        dim=2,
        optimizer=optimizers.make_optimizer("sgd", None, {}),
        initializer=initializers.make_initializer("uniform", {}),
    )
    table = Table(schema, Budget(BUDGET))
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
    table.close()


def _warm_scan(table: Table, keys: Keys, written: bool) -> None:
    """Run the kernels that scan, copy and summarize the rows of a table.

    keys     uint64[n], keys of all rows of the table
    written  whether the metadata of a checkpoint, which is summarized like that of a live table, is
             an array that can be written
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
    of_table = meta[:, 0], meta[:, 1], meta[:, 2].view(np.int64), meta[:, 3]
    of_checkpoint = [_view(column.copy(), written) for column in of_table]
    for columns in (of_table, of_checkpoint):
        Summary().add(RowColumns._make([*columns, norms, "host"]), 0)


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
    routing.check(keys, shard_map, 0)
    routing.owners(keys, shard_map)
    routing.first_foreign(keys, shard_map, 0)
    routing.sum_rows(rows, split.inverse, np.zeros((len(split.keys), 2), np.float32))
    routing.all_finite(rows.reshape(-1).view(np.uint32))
    codec.to_wire(np.ones((4, 2), np.float32), pb.DTYPE_BFLOAT16)
