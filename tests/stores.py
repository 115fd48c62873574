"""A shard with its data directory, in this process: a server without its network."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from psproto.routing import even_map
from psserver.analysis import Analyses
from psserver.checkpoints import Checkpoints
from psserver.flusher import Flusher
from psserver.pace import Pace
from psserver.replay import Recovered, recover
from psserver.requests import Delete, Push
from psserver.shard import Shard
from psserver.tombstones import joined
from storage.base import Base
from storage.block import COUNTERS, TOMBSTONES
from storage.directory import unpack
from storage.disk import Disk
from storage.initializers import make_initializer
from storage.logfiles import SEGMENT_NAME
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.segment import HEADER
from storage.versionlog import VersionLog

DIM = 2
MEMORY = 256 << 20  # bytes
CHUNK = 1 << 16  # bytes copied at once
SECTOR = 512  # bytes that a disk writes whole
NEVER = 3600.0  # seconds


class Direct:
    """An engine without a thread of its own: calls run on the caller's thread."""

    def run(self, call: Callable[[], Any]) -> Any:
        return call()


def make_shard(**changes: Any) -> Shard:
    settings: dict[str, Any] = {
        "number": 0,
        "shard_map": even_map(1),
        "memory_bytes": MEMORY,
        "reply_bytes": 1 << 20,
        "max_tables": 8,
        "max_sessions": 8,
        "session_ttl": 600.0,
        "clock": lambda: 0.0,
        "now": lambda: 1.5,
    }
    return Shard(**{**settings, **changes})


class Home:
    """A shard, its log, base and flusher over one directory, from open() to close().

    Checkpoints are made when a test says so. ``failures`` is what the log could not do.
    """

    def __init__(
        self,
        directory: Path,
        *,
        engine: Any = None,
        disk: Disk | None = None,
        segment_bytes: int = 1 << 16,
        sync_seconds: float = 0.002,
        keep: tuple[int, float] = (0, 0.0),
        excess: int | None = None,
        **shard: Any,
    ) -> None:
        self.directory = directory
        self.failures: list[Exception] = []
        self._engine = engine or Direct()
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._sync_seconds = sync_seconds
        self._keep = keep
        self._excess = excess
        self._settings = shard

    def open(self) -> Self:
        self.directory.mkdir(exist_ok=True)
        self.shard = make_shard(**self._settings)
        self.base = Base(self.directory / "base").open()
        try:
            state = self.base.state
            self.log = VersionLog.open(
                self.directory / "log",
                fail=self.failures.append,
                wake=lambda: None,
                segment_bytes=self._segment_bytes,
                sync_seconds=self._sync_seconds,
                lineage=state.lineage if state else None,
                after=state.version if state else None,
                made=state is not None and state.logged,
                disk=self._disk,
            )
            try:
                self.recovered: Recovered = recover(self.shard, self.base, self.log, self._excess)
            except BaseException:
                self.log.close()
                raise
        except BaseException:
            self.base.close()
            raise
        self.shard.attach(self.log)
        self.flusher = Flusher(
            self.shard,
            self._engine,
            self.recovered.writer,
            self.log,
            fail=self.failures.append,
            seconds=NEVER,
            keep=self._keep,
        )
        return self

    def close(self) -> None:
        self.log.close()
        self.base.close()
        self.shard.close()

    def reopen(self) -> Self:
        self.close()
        return self.open()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def flush(self) -> None:
        self.flusher.flush()

    def written(self) -> None:
        """Return once everything appended was handed to the operating system."""
        self.log.sync(self.log.last)


def stored(base: Base) -> list[tuple[int, list[int], list[int]]]:
    """Kind, keys and versions of each block: of the current rows, of tombstones, of counters."""
    state = base.state
    assert state is not None
    end = len(state.blocks) - state.cells
    live = {
        entry.number: entry.live
        for number in state.blocks[end - state.directory : end]
        for entry in unpack(base.block(number), "directory")
    }
    found = []
    for number, block in base.blocks():
        if block.kind in (TOMBSTONES, COUNTERS):
            found.append((block.kind, block.keys.tolist(), block.versions.tolist()))
        elif number in live:
            chosen = live[number]
            keys, versions = block.keys[chosen].tolist(), block.versions[chosen].tolist()
            found.append((block.kind, keys, versions))
    return found


def schema(name: str = "t", **changes: Any) -> TableSchema:
    """SGD on rows that start at 0, so that a row is minus the sum of its gradients."""
    fields: dict[str, Any] = {
        "name": name,
        "dim": DIM,
        "optimizer": make_optimizer("sgd", 1.0, {}),
        "initializer": make_initializer("zeros", {}),
    }
    return TableSchema(**{**fields, **changes})


def change(keys: Sequence[int], table: str = "t", **changes: Any) -> Delete:
    """A delete."""
    fields: dict[str, Any] = {
        "table": table,
        "keys": np.array(keys, np.uint64),
        "client": 0,
        "incarnation": 0,
        "sequence": 0,
        "acknowledged": 0,
    }
    return Delete(**{**fields, **changes})


def push(keys: Sequence[int], value: float = 1.0, table: str = "t", **changes: Any) -> Push:
    n = len(keys)
    fields: dict[str, Any] = {
        "table": table,
        "keys": np.array(keys, np.uint64),
        "counts": np.ones(n, np.uint32),
        "gradients": np.full((n, DIM if n else 0), value, np.float32),
        "step": 5,
        "lr": None,
        "client": 0,
        "incarnation": 0,
        "sequence": 0,
        "acknowledged": 0,
    }
    return Push(**{**fields, **changes})


def contents(shard: Shard) -> dict[str, Any]:
    """Everything that a restart must recover, as plain values."""
    captured = shard.capture()
    numbers = {each.base.number for each in captured.tables}
    sessions = {}
    for client, session in shard.sessions._sessions.items():
        fields = dataclasses.asdict(session)
        fields.pop("used")
        sessions[client] = {**fields, "versions": dict(session.versions)}
    return {
        "version": shard.version,
        "next_table": captured.next_table,
        "tables": sorted(
            (each.base.number, each.base.schema, each.base.created) for each in captured.tables
        ),
        "rows": {
            name: (
                dump.keys.tolist(),
                dump.rows.tolist(),
                dump.meta.tolist(),
                dump.counters.tolist(),
                dump.cells.tolist(),
            )
            for name, dump in shard.dump().items()
        },
        "steps": sorted(
            (each.base.number, each.table.evictor.now(0).step) for each in captured.tables
        ),
        "sessions": sessions,
        "tombstones": sorted(
            (version, table, key, cause)
            for table, key, version, cause in zip(
                *(column.tolist() for column in joined(captured.tombstones).columns()), strict=True
            )
            if table in numbers
        ),
    }


def tail(directory: Path) -> tuple[Path, int]:
    """Return the last segment file of a shard's log and the offset up to which it was synced."""
    paths = sorted(p for p in (directory / "log").iterdir() if SEGMENT_NAME.fullmatch(p.name))
    first = int(paths[-1].stem)
    data = (directory / "log" / "SYNCED").read_bytes()
    marks = [struct.unpack_from("<QQQ", data, at) for at in (0, SECTOR) if len(data) >= at + 24]
    ends = [end for _, of, end in marks if of == first]
    return paths[-1], max(ends, default=HEADER.size)  # the header is synced before the name


def copy_of(source: Path, target: Path) -> Path:
    """Return a copy of the directory as after `kill -9`. Nobody may write to it meanwhile."""
    shutil.copytree(source, target, copy_function=_copy_file)
    return target


def _copy_file(source: str, target: str) -> None:
    """Copy a file without its zeros: most of a data directory is preallocated."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but holes up to the end
                return
            end = min(os.lseek(old.fileno(), at, os.SEEK_HOLE), size)
            for start in range(at, end, CHUNK):
                data = os.pread(old.fileno(), min(CHUNK, end - start), start)
                if data.strip(b"\0"):
                    os.pwrite(new.fileno(), data, start)
            at = end


def power_cut(source: Path, target: Path, rng: random.Random) -> Path:
    """Return a copy of the directory as after a power loss: some unsynced sectors are lost.

    The checkpoints' base is synced whenever a test can look, and is copied as it is.
    """
    copy_of(source, target)
    path, synced = tail(target)
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        keep = rng.choice((0.0, 0.5, 0.9))
        for at in range(synced - synced % SECTOR, size, SECTOR):
            start = max(at, synced)
            file.seek(start)
            old = file.read(min(SECTOR, size - at) - (start - at))
            if any(old) and rng.random() >= keep:
                file.seek(start)
                file.write(bytes(len(old)))
    return target


def shard_of_all_kinds() -> Shard:
    """Return a shard with a table of 300 rows, free slots, and all kinds of metadata."""
    shard = make_shard()
    shard.create_table(schema())
    rng = np.random.default_rng(0)
    for step in range(40):
        keys = [*np.unique(rng.integers(0, 400, 30)).tolist(), (1 << 64) - 1 - step]
        shard.exchange([push(keys, float(rng.normal()), step=3 * step - 9)], [])
    shard.delete(change(range(0, 400, 5)))
    shard.exchange([push([1000], step=50)], [])  # reuses a slot
    return shard


def analyses_of(shard: Shard, log: VersionLog | None = None) -> Analyses:
    """Return the analyses of a shard, without pauses."""
    engine: Any = Direct()
    checkpoints = Checkpoints(shard, engine, None, None, None)
    return Analyses(shard, engine, checkpoints, log, Pace(engine, 0.0))
