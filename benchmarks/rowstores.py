"""Peers of the cold tier: stores on disk that get and put rows of random keys.

    lmdb     LMDB with a row per key, through py-lmdb
    rocksdb  RocksDB with a row per key, through rocksdict

Each is used in the way that was fastest here. RocksDB reads from memory maps of its files, has
Bloom filters, and does not compress. LMDB looks up one key after the other, because its batch call
is slower. Neither syncs its puts until ``sync``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import lmdb
import numpy as np

from benchmarks.peers import Unavailable
from storage.kernels import Keys, Rows

MAP_BYTES = 64 << 30  # address space of the peer's memory map
BATCH = 10_000  # rows per put while a store is filled
BLOOM_BITS = 10.0  # bits of RocksDB's Bloom filters per key


class RowStore(Protocol):
    """A store of rows by key.

    directory  all its files are below it
    """

    directory: Path

    def fill(self, keys: Keys, rows: Rows) -> None:
        """Store the first rows, float32[n, width], as fast as the store can, and sync them.

        keys  uint64[n], distinct
        """

    def get(self, keys: Keys) -> Rows:
        """Return the embeddings of keys, the first ``dim`` numbers of their rows."""

    def put(self, keys: Keys, rows: Rows) -> None:
        """Replace the rows of keys. They need not be on disk before ``sync``."""

    def sync(self) -> None:
        """Return when all rows that were put are on disk."""

    def close(self) -> None:
        """Close all files."""


def key_bytes(keys: Keys) -> list[bytes]:
    """Return each key as 8 bytes, whose order is that of the keys."""
    data = keys.astype(">u8").tobytes()
    return [data[at : at + 8] for at in range(0, len(data), 8)]


def row_bytes(rows: Rows) -> list[bytes]:
    """Return each row as bytes."""
    data, size = rows.tobytes(), 4 * rows.shape[1]
    return [data[at : at + size] for at in range(0, len(data), size)]


def embeddings(values: list[Any], dim: int) -> Rows:
    """Return the first ``dim`` numbers of rows that are given as bytes."""
    return np.frombuffer(b"".join(values), np.float32).reshape(len(values), -1)[:, :dim].copy()


def batches(count: int, size: int = BATCH) -> Iterator[slice]:
    """Yield slices that divide 0..count-1 into batches."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class RowPerKey:
    """LMDB with a row per key."""

    def __init__(self, directory: Path, dim: int) -> None:
        self.directory, self._dim = directory, dim
        directory.mkdir()
        self._env = lmdb.open(str(directory), map_size=MAP_BYTES, readahead=False, sync=False)

    def fill(self, keys: Keys, rows: Rows) -> None:
        """Store the rows in the order of their keys, which is fastest and takes least space."""
        order = np.argsort(keys)
        for at in batches(len(keys)):
            chosen = order[at]
            items = zip(key_bytes(keys[chosen]), row_bytes(rows[chosen]), strict=True)
            with self._env.begin(write=True) as txn:
                txn.cursor().putmulti(list(items), append=True)
        self.sync()

    def get(self, keys: Keys) -> Rows:
        """Look up one key after the other in one transaction."""
        with self._env.begin(buffers=True) as txn:
            return embeddings([txn.get(key) for key in key_bytes(keys)], self._dim)

    def put(self, keys: Keys, rows: Rows) -> None:
        """Put all rows in one transaction."""
        with self._env.begin(write=True) as txn:
            txn.cursor().putmulti(list(zip(key_bytes(keys), row_bytes(rows), strict=True)))

    def sync(self) -> None:
        """Sync the file."""
        self._env.sync(True)

    def close(self) -> None:
        """Close the file."""
        self._env.close()


class RocksDb:
    """RocksDB with a row per key. Raises Unavailable if rocksdict is not installed."""

    def __init__(self, directory: Path, dim: int) -> None:
        try:
            import rocksdict
        except ImportError as missing:
            raise Unavailable(f"{missing}; pip install '.[bench]'") from None
        self.directory, self._dim = directory, dim
        self._batch = rocksdict.WriteBatch
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.increase_parallelism(2)
        options.set_allow_mmap_reads(True)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        blocks = rocksdict.BlockBasedOptions()
        blocks.set_bloom_filter(BLOOM_BITS, False)
        options.set_block_based_table_factory(blocks)
        self._db = rocksdict.Rdict(str(directory), options)

    def fill(self, keys: Keys, rows: Rows) -> None:
        """Put all rows, then compact the files, so that each key is in one of them."""
        for at in batches(len(keys)):
            self.put(keys[at], rows[at])
        self.sync()
        self._db.compact_range(None, None)

    def get(self, keys: Keys) -> Rows:
        """Look up all keys in one call."""
        return embeddings(self._db.get(key_bytes(keys)), self._dim)

    def put(self, keys: Keys, rows: Rows) -> None:
        """Put all rows in one batch."""
        batch = self._batch(raw_mode=True)
        for key, row in zip(key_bytes(keys), row_bytes(rows), strict=True):
            batch.put(key, row)
        self._db.write(batch)

    def sync(self) -> None:
        """Write the rows in memory to files."""
        self._db.flush()

    def close(self) -> None:
        """Close the files."""
        self._db.close()


STORES: dict[str, Callable[[Path, int], RowStore]] = {
    "lmdb, row per key": RowPerKey,
    "rocksdb": RocksDb,
}
