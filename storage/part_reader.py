"""Read the rows and counters of one shard's part of a checkpoint.

The layers of a checkpoint are its records, its blocks, then those of its parent, and so on. They
are read from the newest to the oldest, so that the first row or delete found for a key is the
newest one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.arena import Budget
from storage.block import COUNTERS, ROWS, TOMBSTONES, Block, unpack
from storage.checkpoint import Checkpoint, Report, read_file
from storage.errors import Corrupt
from storage.index import Index
from storage.kernels import Keys, Rows
from storage.manifest import File
from storage.part_writer import ENTRY, RECORD
from storage.records import AlterRecord, DeleteRecord, PushRecord, decode
from storage.segment import Frame
from storage.store import Store

SEEN_BYTES = 1 << 40  # limit of memory and address space for the keys of newer layers
T = TypeVar("T")


class Piece(NamedTuple):
    """Some rows of one table of a shard. The arrays are valid until the next piece is read."""

    table: int  # number of the table on that shard
    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]
    rows: Rows  # float32[n, width]


def blocks_in(data: bytes, where: str, kinds: Sequence[int]) -> list[Block]:
    """Split the contents of a "blocks" or "counters" file into blocks.

    data   contents of the file; the caller has verified its checksum
    where  file name, for errors
    kinds  kinds of blocks that the file may contain

    Raises Corrupt for damage or a block of a different kind, and UnknownFormat.
    """
    found, at = [], 0
    while at < len(data):
        if at + ENTRY.size > len(data):
            raise Corrupt(f"{where} at byte {at}", "the file ends within a block's size field")
        size: int = ENTRY.unpack_from(data, at)[0]
        at += ENTRY.size
        if size > len(data) - at:
            raise Corrupt(
                f"{where} at byte {at}",
                f"a block declares {size} bytes, but {len(data) - at} bytes are left",
            )
        block = unpack(memoryview(data)[at : at + size], f"{where} at byte {at}")
        if block.kind not in kinds:
            raise Corrupt(
                f"{where} at byte {at}", f"expected a block of kind {kinds}, got {block.kind}"
            )
        found.append(block)
        at += size + -size % 8
    return found


def frames_in(data: bytes, where: str) -> list[Frame]:
    """Split the contents of a "records" file into raw records.

    data   contents of the file; the caller has verified its checksum
    where  file name, for errors

    Raises Corrupt if a record is incomplete.
    """
    found, at, view = [], 0, memoryview(data)
    while at < len(data):
        if at + RECORD.size > len(data):
            raise Corrupt(f"{where} at byte {at}", "the file ends within a record's header")
        version, size, kind = RECORD.unpack_from(data, at)
        at += RECORD.size
        if size > len(data) - at:
            raise Corrupt(
                f"{where} at byte {at}",
                f"a record declares {size} bytes, but {len(data) - at} bytes are left",
            )
        found.append(Frame(version, kind, view[at : at + size]))
        at += size + -size % 8
    return found


def rows_of(
    store: Store, checkpoint: Checkpoint, shard: int, tables: Iterable[int], report: Report
) -> Iterator[Piece]:
    """Yield the rows of some tables of one shard, as of the checkpoint's version.

    shard   number of the shard
    tables  numbers of the tables on that shard
    report  called with the bytes read since the last call

    Each key comes once, in no particular order. Verifies the checksum of every file with rows.
    Raises Corrupt, which names the damaged file, or the table if its number of rows is wrong.
    """
    part = checkpoint.parts[shard]
    asked = {table.number: table for table in part.tables}
    asked = {number: asked[number] for number in tables}
    budget = Budget(SEEN_BYTES, SEEN_BYTES)  # of all tables: there may be thousands
    seen = {number: _Seen(budget) for number in asked}
    found = dict.fromkeys(asked, 0)
    try:
        for piece in _newest_first(store, checkpoint, shard, seen, report):
            found[piece.table] += len(piece.keys)
            yield piece
    finally:
        for each in seen.values():
            each.close()
    where = store.where(f"{part.name}/{part.attempt}/{shard:05}")
    for number, table in asked.items():
        if found[number] != (rows := table.rows):
            what = f"found {found[number]} rows, but the manifest says {rows}"
            raise Corrupt(where, f"table {table.name!r}: {what}")


def counters_of(
    store: Store, checkpoint: Checkpoint, shard: int, tables: Iterable[int], report: Report
) -> Iterator[tuple[int, Keys, NDArray[np.uint32], NDArray[np.uint64]]]:
    """Yield the exact admission counters of some tables of one shard in a checkpoint.

    shard   number of the shard
    tables  numbers of the tables on that shard
    report  called with the bytes read since the last call

    Yields (number of the table, keys uint64[n], totals uint32[n], versions uint64[n]) once per
    table that has counters. Some of the keys may have a row; ignore their counters.
    """
    part, name = checkpoint.parts[shard], checkpoint.manifest.name
    found: dict[int, list[_Counters]] = {number: [] for number in tables}
    for file in part.counters:
        data = read_file(store, name, file)
        for block in blocks_in(data, store.where(f"{name}/{file.path}"), (COUNTERS,)):
            if block.table in found:
                found[block.table].append((block.keys, block.totals, block.versions))
        report(len(data))
    for file in part.records:  # oldest first; the last record of a key is valid
        data = read_file(store, name, file)
        for frame in frames_in(data, store.where(f"{name}/{file.path}")):
            _update_counters(found, frame)
    for number, columns in found.items():
        if any(len(keys) for keys, _, _ in columns):
            yield number, *_newest_counters(columns)


_Counters = tuple[Keys, NDArray[np.uint32], NDArray[np.uint64]]  # keys, totals, versions


def _update_counters(found: dict[int, list[_Counters]], frame: Frame) -> None:
    """Append the counters that a log record set or removed to those of its table.

    found  counters found so far, oldest first, by number of each wanted table; a total of 0 means
           that the key has no counter; updated
    frame  the log record
    """
    record = decode(frame)
    if isinstance(record, AlterRecord) and record.dropped and record.table in found:
        found[record.table].clear()
    if isinstance(record, PushRecord | DeleteRecord) and record.table in found:
        columns = found[record.table]
        none = np.zeros(len(record.keys), np.uint32)
        columns.append((record.keys, none, none.astype(np.uint64)))
        if isinstance(record, PushRecord):
            versions = np.full(len(record.waiting), frame.version, np.uint64)
            columns.append((record.waiting, record.totals, versions))


def _newest_counters(columns: list[_Counters]) -> _Counters:
    """Return the last counter of each key in ``columns``, except those with a total of 0."""
    keys, totals, versions = map(np.concatenate, zip(*columns, strict=True))
    order = np.argsort(keys, kind="stable")
    last = order[np.append(np.flatnonzero(np.diff(keys[order])), len(order) - 1)]
    last = last[totals[last] > 0]
    return keys[last], totals[last], versions[last]


def verify_part(
    store: Store, checkpoint: Checkpoint, shard: int, report: Report
) -> Iterator[Piece]:
    """Read and verify all files of one shard in a checkpoint and its parents.

    shard   number of the shard
    report  called with the bytes read since the last call

    Yields the rows of all tables, so that the caller can make further checks. Raises Corrupt or
    UnknownFormat.
    """
    numbers = [table.number for table in checkpoint.parts[shard].tables]
    yield from rows_of(store, checkpoint, shard, numbers, report)
    for each in checkpoint.chain:
        name, part = each.manifest.name, each.parts[shard]
        for file in part.counters:
            data = read_file(store, name, file)
            blocks_in(data, store.where(f"{name}/{file.path}"), (COUNTERS,))
            report(len(data))
        for file in part.sessions:
            report(len(read_file(store, name, file)))


class _Seen:
    """Set of the keys of one table that were found in newer layers. Takes no memory while empty."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._index: Index | None = None

    def new(self, keys: Keys) -> Any:
        """Return the indices, int64[] or a slice, of those ``keys`` that are not in the set."""
        if self._index is None:
            return slice(None)
        locations, absent = self._index.find(keys)
        return slice(None) if absent == len(keys) else np.flatnonzero(locations == 0)

    def add(self, keys: Keys) -> None:
        """Add distinct keys, none of which is in the set."""
        if len(keys):
            if self._index is None:
                self._index = Index(self._budget)
            self._index.insert(keys, np.ones(len(keys), np.uint64))

    def close(self) -> None:
        """Return the memory to the budget."""
        if self._index is not None:
            self._index.close()


def _newest_first(
    store: Store, checkpoint: Checkpoint, shard: int, seen: dict[int, _Seen], report: Report
) -> Iterator[Piece]:
    """Yield the rows of a shard, the newest layer first, each key once.

    shard   number of the shard
    seen    set of the keys found so far, by number of each table to read; updated
    report  called with the bytes read since the last call
    """
    files = [
        (each, file, is_records)
        for each in checkpoint.chain
        for is_records, kind in ((True, "records"), (False, "blocks"))
        for file in reversed(getattr(each.parts[shard], kind))
    ]

    def read(item: tuple[Checkpoint, File, bool]) -> bytes:
        return read_file(store, item[0].manifest.name, item[1])

    for (each, file, is_records), data in zip(files, ahead(read, files), strict=True):
        where = store.where(f"{each.manifest.name}/{file.path}")
        if is_records:
            yield from _from_records(frames_in(data, where), seen)
        else:
            yield from _from_blocks(
                blocks_in(data, where, (ROWS, TOMBSTONES)), seen, last=each.parent is None
            )
        report(len(data))


def _from_records(frames: list[Frame], seen: dict[int, _Seen]) -> Iterator[Piece]:
    """Yield the rows of pushed keys that are not in ``seen``, the last record first.

    frames  log records, oldest first
    seen    set of the keys found in newer layers, by number of each table to read; the keys of all
            pushes and deletes are added
    """
    for frame in reversed(frames):
        record = decode(frame)
        if not isinstance(record, PushRecord | DeleteRecord) or record.table not in seen:
            continue
        newer = seen[record.table]
        new = newer.new(record.keys)
        keys = record.keys[new]
        newer.add(keys)
        if isinstance(record, PushRecord) and len(keys):
            versions = np.full(len(keys), frame.version, np.uint64)
            steps = np.full(len(keys), record.origin.step, np.int64)
            rest = (record.frequencies[new], record.rows[new])
            yield Piece(record.table, keys, versions, steps, *rest)


def _from_blocks(blocks: list[Block], seen: dict[int, _Seen], *, last: bool) -> Iterator[Piece]:
    """Yield the rows of blocks whose keys are not in ``seen``, the last block first.

    seen  set of the keys found so far, by number of each table to read
    last  True for blocks of the oldest layer, whose keys need not be added to ``seen``
    """
    for block in reversed(blocks):
        if block.table not in seen:
            continue
        newer = seen[block.table]
        new = newer.new(block.keys)
        keys = block.keys[new]
        if not last:
            newer.add(keys)
        if block.kind == ROWS and len(keys):
            rest = (block.steps[new], block.frequencies[new], block.rows[new])
            yield Piece(block.table, keys, block.versions[new], *rest)


def ahead(read: Callable[[Any], T], items: Sequence[Any], by: int = 1) -> Iterator[T]:
    """Yield ``read(item)`` for each item in order. A background thread reads ``by`` items ahead."""
    with ThreadPoolExecutor(1, "checkpoint reader") as pool:
        begun: deque[Future[T]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(read, item))
                if len(begun) > by:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for each in begun:
                each.cancel()
