"""Compile every kernel, or load it from the cache, before the first request needs it."""

from __future__ import annotations

import numpy as np

from psproto import codec, routing
from psproto import ps_pb2 as pb
from storage import initializers, optimizers
from storage.admission import rules as admission
from storage.analysis import RowColumns, Summary
from storage.arena import Budget
from storage.eviction import sweep as eviction
from storage.index import SEGMENT, Index
from storage.kernels import Images
from storage.schema import TableSchema
from storage.table import Table

BUDGET = 64 << 20  # bytes for the tables that are made here


def warm() -> None:
    """Run each kernel once on a few rows: a minute to compile, a second from the cache."""
    initializers.compile_all()
    optimizers.compile_all()
    admission.compile_all()
    eviction.compile_all()
    schema = TableSchema(
        name="warm",
        dim=2,
        optimizer=optimizers.make_optimizer("sgd", None, {}),
        initializer=initializers.make_initializer("uniform", {}),
    )
    table = Table(schema, Budget(BUDGET))
    keys = np.arange(4, dtype=np.uint64)
    rows = np.ones((4, 2), np.float32)
    slots = table.push(keys, rows, np.ones(4, np.uint32), version=1, step=0).slots
    frequencies, steps = np.ones(4, np.uint64), np.ones(4, np.int64)
    table.images(slots, frequencies, rows)
    table.put(Images(keys, frequencies, steps, frequencies, rows))
    table.check_push(keys, rows, step=0, largest=1e30)
    table.scan().copy(table.scan().find(0, 0, 1, 4)[0], frequencies, rows)
    norms = np.empty(4)
    meta = table.scan().measure(slots, norms)
    table.scan().read(slots, rows)
    of_table = meta[:, 0], meta[:, 1], meta[:, 2].view(np.int64), meta[:, 3]
    for columns in (of_table, [column.copy() for column in of_table]):  # those of checkpoints
        Summary().add(RowColumns._make([*columns, norms, "host"]), 0)
    table.delete(keys[:1])
    table.pull(keys, "train", rows)
    table.close()
    index = Index(Budget(BUDGET))
    many = np.arange(SEGMENT, dtype=np.uint64)
    index.insert(many, many + np.uint64(1))
    index.assign(keys, keys + np.uint64(1))
    index.remove(keys)
    index.close()
    shard_map = routing.even_map(2)
    split = routing.split(keys, shard_map)
    routing.check(keys, shard_map, 0)
    routing.owners(keys, shard_map)
    routing.stray(keys, shard_map, 0)
    routing.sum_rows(rows, split.inverse, np.zeros((len(split.keys), 2), np.float32))
    routing.all_finite(rows.reshape(-1).view(np.uint32))
    codec.to_wire(rows, pb.DTYPE_BFLOAT16)
