"""Pull the rows of a table into GPU memory, instead of host memory."""

from __future__ import annotations

import numpy as np

from storage.gpu.gpu import Gpu
from storage.gpu.slab import write_rows
from storage.index import places
from storage.kernels import Keys
from storage.table import Mode, Table
from storage.tiers.hbm import HbmTier
from storage.tiers.places import find_near


def pull_to_gpu(gpu: Gpu, table: Table, keys: Keys, mode: Mode, target: int) -> None:
    """Write the embeddings of ``keys`` to GPU memory. Otherwise like Table.pull.

    gpu     the GPU of the shard
    target  address of float32[n, dim], a multiple of 16

    A kernel copies rows that are in GPU memory. Others go through page-locked memory.
    """
    store, tier, dim = table.store, table.store.host, table.schema.dim
    locations, absent = store.find(keys)
    slots, misses = places(locations, tier.code)
    rest = np.arange(len(keys))
    try:
        if isinstance(tier, HbmTier) and tier.hbm_rows:
            near = np.empty(len(keys), np.int64)
            there = find_near(tier.where, slots, near)
            tier.hbm.gather_into(near, dim, target)
            rest = rest[:0] if there == len(keys) else np.flatnonzero(near < 0)
        if len(rest):
            rows = np.empty((len(rest), dim), np.float32)
            table.pull(keys[rest], mode, rows, count=False)
            write_rows(gpu.staging, target, rest, rows)
    finally:
        gpu.staging.finish()
    if isinstance(tier, HbmTier):
        tier.recent = len(keys) - len(rest)
    store.count(len(keys) - absent - misses, misses)
    table.reuse.pulled(keys, locations, len(keys) - absent)
