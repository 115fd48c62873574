"""Named checkpoints: the rows of all shards as files, each shard's at one version of its log.

    checkpoint  = NAME/MANIFEST.json               written last: without it there is no checkpoint
                | NAME/ATTEMPT/SSSSS.json          manifest of shard SSSSS, written after its files
                | NAME/ATTEMPT/SSSSS.NNNNNN.KIND   its files, numbered in the order of writing
    NAME        = [A-Za-z0-9_][A-Za-z0-9_.-]{0,127}
    ATTEMPT     = 16 hexadecimal digits, drawn anew for each attempt to take it
    KIND        = blocks | records | counters | sessions
    blocks      = entry*                           of rows and tombstones
    counters    = entry*                           of exact counters, all of them
    entry       = size u64 | block | 0..7 zeros    block.py; every entry begins at a multiple of 8
    records     = record*
    record      = version u64 | size u32 | kind u32 | payload | 0..7 zeros             records.py
    sessions    = the sessions of the clients, in the engine's own format
    manifest    = JSON, to the byte what ``json.dumps(..., sort_keys=True, indent=1)`` and a line
                  feed make of {"checksum": C, "content": {...}}, where C is the xxh3_128 in
                  hexadecimal of what it makes of the content alone

Little-endian. Files have their size and xxh3_128 in the shard's manifest, these have theirs in
MANIFEST.json. So every byte of a checkpoint is covered by a checksum, and a file is read whole
(64 MiB) and checked before anything in it is believed.

**One cut.** A shard is copied while pushes go on. It is at version S when the copying begins and
at E when it ends. Rows that were last changed up to S are in blocks. Rows that changed since are
not, or not as they were, or torn; but each change in S+1..E is in the records. A checkpoint is the
shard at E: blocks, then records.

Counters of keys that wait for a row are copied likewise, anew for each checkpoint, and the records
say what became of them. Sketches are left out: what they have counted starts again.

**Incremental.** A checkpoint that has a base holds what changed after the base's E: rows, and
tombstones of deleted keys. It means nothing without the base, whose MANIFEST.json it names with
its checksum.

**Reading** goes from the newest to the oldest, and takes of each key what it meets first: records
from the last to the first, then blocks from the last to the first, then the base. Only the keys of
newer layers are kept in memory, never those of the oldest, which is the large one.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from storage.arena import Budget
from storage.block import ROWS, Block, unpack
from storage.errors import Corrupt, UnknownCheckpoint, UnknownFormat
from storage.index import Index
from storage.kernels import Keys, Rows
from storage.records import Delete, Push, decode
from storage.segment import Frame
from storage.store import Output, Store

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
ATTEMPT = re.compile(r"[0-9a-f]{16}")
MANIFEST = "MANIFEST.json"
FILE_BYTES = 64 << 20  # of a file, about
CLOSING = 4  # files that are written and not finished, at most
MAX_MANIFEST = 256 << 20  # bytes
MAX_CHAIN = 64  # checkpoints, from an incremental one to the full one
SEEN_BYTES = 1 << 40  # address space for the keys of newer layers

_ENTRY = struct.Struct("<Q")
_RECORD = struct.Struct("<QII")
_ZEROS = bytes(8)
T = TypeVar("T")
Tell = Callable[[int], None]  # is told how many more bytes were read or written


# ---- manifests


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of a checkpoint, as a manifest names it."""

    path: str  # within the checkpoint
    bytes: int
    checksum: str  # xxh3_128, hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTable:
    """A table of one shard at the version of the checkpoint."""

    number: int  # on that shard
    name: str
    schema: str  # JSON
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The checkpoint that an incremental one builds on."""

    name: str
    checksum: str  # xxh3_128 of its MANIFEST.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one shard wrote."""

    name: str
    attempt: str
    shard: int
    shards: int
    buckets: tuple[tuple[int, int], ...]  # that the shard owned: first, last + 1
    lineage: str  # hexadecimal
    version: int  # E
    copied: int  # S
    after: int  # the version of the base; 0 without
    base: Base | None
    tables: tuple[PartTable, ...]
    blocks: tuple[File, ...]
    records: tuple[File, ...]
    counters: tuple[File, ...]
    sessions: tuple[File, ...]  # one, or none
    micros: int  # since 1970, at E

    @property
    def files(self) -> tuple[File, ...]:
        """All of them."""
        return (*self.blocks, *self.records, *self.counters, *self.sessions)

    @property
    def bytes(self) -> int:
        """Of the files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTable:
    """A table over all shards."""

    name: str
    schema: str  # JSON
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole checkpoint."""

    name: str
    attempt: str
    base: Base | None
    parts: tuple[File, ...]  # the shards' manifests, by shard
    versions: tuple[int, ...]  # by shard
    tables: tuple[CheckpointTable, ...]  # by name
    bytes: int  # of everything, the base not counted
    micros: int  # since 1970


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose manifests are intact, and what it builds on."""

    manifest: Manifest
    checksum: str  # of MANIFEST.json
    parts: tuple[Part, ...]  # by shard
    base: Checkpoint | None

    @property
    def chain(self) -> list[Checkpoint]:
        """This one, its base, the base of that, and so on."""
        found: list[Checkpoint] = []
        at: Checkpoint | None = self
        while at is not None:
            found.append(at)
            at = at.base
        return found


def to_json(content: dict[str, Any]) -> bytes:
    """A content as it is stored, with its checksum."""
    checksum = xxh3_128_hexdigest(_dumps(content).encode())
    return f"{_dumps({'checksum': checksum, 'content': content})}\n".encode()


def from_json(data: bytes, where: str) -> dict[str, Any]:
    """The content that ``to_json`` made so; Corrupt if a single byte is another."""
    try:
        whole = json.loads(data)
        content = dict(whole["content"])
        intact = to_json(content) == data
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Corrupt(where, f"no manifest: {error}") from error
    if not intact:
        raise Corrupt(where, "the checksum of the manifest does not fit its content")
    held = content.pop("format", None)
    if held != FORMAT:
        raise UnknownFormat(where, held if isinstance(held, int) else 0, FORMAT)
    return content


def open_checkpoint(store: Store, name: str, *, depth: int = MAX_CHAIN) -> Checkpoint:
    """Read and check the manifests of a checkpoint and of all that it builds on.

    Raises UnknownCheckpoint, Corrupt naming the file, or UnknownFormat.
    """
    manifest, checksum = read_manifest(store, name)
    where = store.where(f"{name}/{MANIFEST}")
    parts = [open_part(store, name, file) for file in manifest.parts]
    for shard, part in enumerate(parts):
        told = (part.name, part.attempt, part.shard, part.shards, part.base)
        if told != (name, manifest.attempt, shard, len(parts), manifest.base):
            raise Corrupt(store.where(f"{name}/{manifest.parts[shard].path}"), "is of another one")
    base = None
    if manifest.base is not None:
        base = _open_base(store, manifest.base, where, depth - 1)
        for part, before in zip(parts, base.parts, strict=False):
            if not _follows(part, before):
                raise Corrupt(where, f"shard {part.shard} does not follow {base.manifest.name!r}")
    return Checkpoint(manifest, checksum, tuple(parts), base)


def _follows(part: Part, before: Part) -> bool:
    """Whether a part holds what changed since another."""
    told = (part.after, part.lineage, part.shards, part.buckets)
    return told == (before.version, before.lineage, before.shards, before.buckets)


def _open_base(store: Store, named: Base, where: str, depth: int) -> Checkpoint:
    if depth <= 0:
        raise Corrupt(where, f"more than {MAX_CHAIN} checkpoints build on each other")
    try:
        base = open_checkpoint(store, named.name, depth=depth)
    except UnknownCheckpoint as error:
        raise Corrupt(where, f"builds on {named.name!r}, but {error}") from error
    if base.checksum != named.checksum:
        raise Corrupt(where, f"builds on another {named.name!r} than the one that is there now")
    return base


def read_manifest(store: Store, name: str) -> tuple[Manifest, str]:
    """A checkpoint's MANIFEST.json and its checksum; nothing else is looked at."""
    path = f"{name}/{MANIFEST}"
    where = store.where(path)
    try:
        data = store.read(path, MAX_MANIFEST)
    except FileNotFoundError:
        raise UnknownCheckpoint(name, where) from None
    manifest = _parse(Manifest, from_json(data, where), where)
    if manifest.name != name or not manifest.parts:
        raise Corrupt(where, f"is the manifest of {manifest.name!r}")
    return manifest, xxh3_128_hexdigest(data)


def open_part(store: Store, name: str, file: File) -> Part:
    """The manifest of a shard, checked."""
    where = store.where(f"{name}/{file.path}")
    return _parse(Part, from_json(read_file(store, name, file), where), where)


def read_file(store: Store, name: str, file: File) -> bytes:
    """A file of checkpoint ``name``; Corrupt names it if it is missing or not what was written."""
    where = store.where(f"{name}/{file.path}")
    try:
        data = store.read(f"{name}/{file.path}", file.bytes + 1)
    except FileNotFoundError:
        raise Corrupt(where, "the file is missing") from None
    if len(data) != file.bytes:
        size = "more" if len(data) > file.bytes else len(data)
        raise Corrupt(where, f"{size} bytes, the manifest says {file.bytes}")
    if xxh3_128_hexdigest(data) != file.checksum:
        raise Corrupt(where, "the checksum of the file is not the one in the manifest")
    return data


def facts(item: Any) -> dict[str, Any]:
    """A manifest as what json can express, with its format."""
    return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(item)))}


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1)


def _parse(kind: type[T], content: dict[str, Any], where: str) -> T:
    """A dataclass of what ``facts`` made."""
    try:
        values = dict(content)
        if values["base"] is not None:
            values["base"] = Base(**values["base"])
        for field, item in _ITEMS[kind].items():
            values[field] = tuple(item(**each) for each in values[field])
        for field in ("versions", "buckets"):
            if field in values:
                values[field] = tuple(
                    tuple(each) if isinstance(each, list) else each for each in values[field]
                )
        return kind(**values)
    except (TypeError, KeyError) as error:
        raise Corrupt(where, f"no manifest of this kind: {error}") from error


_ITEMS: dict[type, dict[str, type]] = {
    Manifest: {"parts": File, "tables": CheckpointTable},
    Part: {"tables": PartTable}
    | dict.fromkeys(("blocks", "records", "counters", "sessions"), File),
}


# ---- writing


class _Closing(NamedTuple):
    """A file that is written, on its way to the disk."""

    kind: str
    path: str
    output: Output
    checksum: Future[str]


class PartWriter:
    """Writes what one shard adds to a checkpoint: blocks, then records, then the rest.

    Files are finished on a thread of its own, which waits for the disk, while the next are written:
    the sooner all rows are copied, the fewer records come meanwhile.
    """

    def __init__(self, store: Store, name: str, attempt: str, shard: int, tell: Tell) -> None:
        """``tell`` is called after each block and each run of records."""
        self._store = store
        self._name = name
        self._prefix = f"{attempt}/{shard:05}"
        self._tell = tell
        self._files: dict[str, list[File]] = {
            kind: [] for kind in ("blocks", "records", "counters", "sessions")
        }
        self._output: Output | None = None
        self._path = self._kind = ""
        self._count = 0
        self._closing: deque[_Closing] = deque()
        self._closer = ThreadPoolExecutor(1, "checkpoint files")

    def block(self, data: Any, kind: str = "blocks") -> None:
        """Append a sealed block; of counters, with that as its kind."""
        view = memoryview(data).cast("B")
        self._append(kind, [_ENTRY.pack(len(view)), view, _ZEROS[: -len(view) % 8]])

    def frames(self, frames: Iterable[Frame]) -> None:
        """Append records of the log."""
        for frame in frames:
            size = len(frame.payload)
            head = _RECORD.pack(frame.version, size, frame.kind)
            self._append("records", [head, frame.payload, _ZEROS[: -size % 8]])

    def sessions(self, data: bytes) -> None:
        """Write the sessions."""
        if data:
            self._append("sessions", [data])

    def finish(self, **rest: Any) -> tuple[Part, File]:
        """Write the shard's manifest; ``rest`` are the fields of Part that are not known here."""
        self._close(0)
        self._closer.shutdown()
        part = Part(
            name=self._name,
            blocks=tuple(self._files["blocks"]),
            records=tuple(self._files["records"]),
            counters=tuple(self._files["counters"]),
            sessions=tuple(self._files["sessions"]),
            **rest,
        )
        data, path = to_json(facts(part)), f"{self._prefix}.json"
        self._store.publish(f"{self._name}/{path}", data)
        return part, File(path=path, bytes=len(data), checksum=xxh3_128_hexdigest(data))

    def discard(self) -> None:
        """Give up; the files are left to whoever completes or removes the checkpoint."""
        self._closer.shutdown(cancel_futures=True)
        for each in self._closing:
            each.output.discard()
        if self._output is not None:
            self._output.discard()

    def _append(self, kind: str, parts: Sequence[Any]) -> None:
        if self._output is None or kind != self._kind or self._output.bytes >= FILE_BYTES:
            self._close(CLOSING)
            self._kind, self._path = kind, f"{self._prefix}.{self._count:06}.{kind}"
            self._count += 1
            self._output = self._store.create(f"{self._name}/{self._path}")
        before = self._output.bytes
        self._output.write(parts)
        self._tell(self._output.bytes - before)

    def _close(self, most: int) -> None:
        """Have the file finished; return once at most so many are not."""
        if self._output is not None:
            output, self._output = self._output, None
            checksum = self._closer.submit(output.close)
            self._closing.append(_Closing(self._kind, self._path, output, checksum))
        while len(self._closing) > most:
            kind, path, output, done = self._closing.popleft()
            file = File(path=path, bytes=output.bytes, checksum=done.result())
            self._files[kind].append(file)


# ---- reading


class Piece(NamedTuple):
    """Rows of one table of a shard: views that are valid until the next piece."""

    table: int  # its number on that shard
    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]
    rows: Rows  # float32[n, width]


def blocks_in(data: bytes, where: str) -> list[Block]:
    """The blocks of a file whose checksum was right."""
    found, at = [], 0
    while at < len(data):
        if at + _ENTRY.size > len(data):
            raise Corrupt(f"{where} at byte {at}", "no whole entry")
        size: int = _ENTRY.unpack_from(data, at)[0]
        at += _ENTRY.size
        if size > len(data) - at:
            raise Corrupt(f"{where} at byte {at}", f"a block of {size} bytes goes beyond the end")
        found.append(unpack(memoryview(data)[at : at + size], f"{where} at byte {at}"))
        at += size + -size % 8
    return found


def frames_in(data: bytes, where: str) -> list[Frame]:
    """The records of a file whose checksum was right, undecoded."""
    found, at, view = [], 0, memoryview(data)
    while at < len(data):
        if at + _RECORD.size > len(data):
            raise Corrupt(f"{where} at byte {at}", "no whole record")
        version, size, kind = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if size > len(data) - at:
            raise Corrupt(f"{where} at byte {at}", f"a record of {size} bytes goes beyond the end")
        found.append(Frame(version, kind, view[at : at + size]))
        at += size + -size % 8
    return found


def rows_of(
    store: Store, checkpoint: Checkpoint, shard: int, tables: Iterable[int], tell: Tell
) -> Iterator[Piece]:
    """The rows of a shard's tables at the checkpoint's version, each key once, in no order.

    tables  their numbers on that shard

    All files are checked, those without such rows too; Corrupt names the bad one, or says that the
    checkpoint yields another number of rows than it was taken from.
    """
    part = checkpoint.parts[shard]
    asked = {table.number: table for table in part.tables}
    asked = {number: asked[number] for number in tables}
    seen = {number: _Seen() for number in asked}
    found = dict.fromkeys(asked, 0)
    try:
        for piece in _newest_first(store, checkpoint, shard, seen, tell):
            found[piece.table] += len(piece.keys)
            yield piece
    finally:
        for each in seen.values():
            each.close()
    for number, table in asked.items():
        if found[number] != table.rows:
            raise Corrupt(
                store.where(f"{part.name}/{part.attempt}/{shard:05}"),
                f"table {table.name!r} has {found[number]} rows, the shard had {table.rows}",
            )


def counters_of(
    store: Store, checkpoint: Checkpoint, shard: int, tables: Iterable[int], tell: Tell
) -> Iterator[tuple[int, Keys, NDArray[np.uint32], NDArray[np.uint64]]]:
    """The exact counters of a shard's tables at the checkpoint's version: number of the table,
    keys uint64[n], totals uint32[n], versions uint64[n]; all of a table at once.

    There may be some of keys that have a row, which need none.
    """
    part, name = checkpoint.parts[shard], checkpoint.manifest.name
    found: dict[int, list[tuple[Any, ...]]] = {number: [] for number in tables}
    for file in part.counters:
        data = read_file(store, name, file)
        for block in blocks_in(data, store.where(f"{name}/{file.path}")):
            if block.table in found:
                found[block.table].append((block.keys, block.totals, block.versions))
        tell(len(data))
    for file in part.records:  # in order: the last word on a key counts
        data = read_file(store, name, file)
        for frame in frames_in(data, store.where(f"{name}/{file.path}")):
            record = decode(frame)
            if isinstance(record, Push | Delete) and record.table in found:
                told = found[record.table]
                none = np.zeros(len(record.keys), np.uint32)
                told.append((record.keys, none, none.astype(np.uint64)))
                if isinstance(record, Push):
                    versions = np.full(len(record.waiting), frame.version, np.uint64)
                    told.append((record.waiting, record.totals, versions))
    for number, told in found.items():
        if any(len(keys) for keys, _, _ in told):
            keys, totals, versions = map(np.concatenate, zip(*told, strict=True))
            order = np.argsort(keys, kind="stable")
            last = order[np.append(np.flatnonzero(np.diff(keys[order])), len(order) - 1)]
            last = last[totals[last] > 0]
            yield number, keys[last], totals[last], versions[last]


def verify_part(store: Store, checkpoint: Checkpoint, shard: int, tell: Tell) -> None:
    """Read everything that a checkpoint says of one shard; raises Corrupt or UnknownFormat."""
    part = checkpoint.parts[shard]
    for piece in rows_of(store, checkpoint, shard, [table.number for table in part.tables], tell):
        del piece
    for each in checkpoint.chain:
        for file in (*each.parts[shard].counters, *each.parts[shard].sessions):
            tell(len(read_file(store, each.manifest.name, file)))


class _Seen:
    """Keys that a newer layer has told about; made when there is one."""

    def __init__(self) -> None:
        self._index: Index | None = None

    def new(self, keys: Keys) -> Any:
        """Which of the keys it does not hold: a slice where that is all of them."""
        if self._index is None:
            return slice(None)
        locations, absent = self._index.find(keys)
        return slice(None) if absent == len(keys) else np.flatnonzero(locations == 0)

    def add(self, keys: Keys) -> None:
        """Hold keys that it does not hold yet."""
        if len(keys):
            if self._index is None:
                self._index = Index(Budget(SEEN_BYTES))
            self._index.insert(keys, np.ones(len(keys), np.uint64))

    def close(self) -> None:
        """Return the memory."""
        if self._index is not None:
            self._index.close()


def _newest_first(
    store: Store, checkpoint: Checkpoint, shard: int, seen: dict[int, _Seen], tell: Tell
) -> Iterator[Piece]:
    files = [
        (each, file, file in each.parts[shard].records)
        for each in checkpoint.chain
        for file in (*each.parts[shard].blocks, *each.parts[shard].records)[::-1]
    ]

    def read(item: tuple[Checkpoint, File, bool]) -> bytes:
        return read_file(store, item[0].manifest.name, item[1])

    for (each, file, is_records), data in zip(files, ahead(read, files), strict=True):
        where = store.where(f"{each.manifest.name}/{file.path}")
        if is_records:
            yield from _from_records(frames_in(data, where), seen)
        else:
            yield from _from_blocks(blocks_in(data, where), seen, last=each.base is None)
        tell(len(data))


def _from_records(frames: list[Frame], seen: dict[int, _Seen]) -> Iterator[Piece]:
    for frame in reversed(frames):
        record = decode(frame)
        if not isinstance(record, Push | Delete) or record.table not in seen:
            continue
        held = seen[record.table]
        new = held.new(record.keys)
        keys = record.keys[new]
        held.add(keys)
        if isinstance(record, Push) and len(keys):
            versions = np.full(len(keys), frame.version, np.uint64)
            steps = np.full(len(keys), record.origin.step, np.int64)
            rest = (record.frequencies[new], record.rows[new])
            yield Piece(record.table, keys, versions, steps, *rest)


def _from_blocks(blocks: list[Block], seen: dict[int, _Seen], *, last: bool) -> Iterator[Piece]:
    for block in reversed(blocks):
        if block.table not in seen:
            continue
        held = seen[block.table]
        new = held.new(block.keys)
        keys = block.keys[new]
        if not last:
            held.add(keys)
        if block.kind == ROWS and len(keys):
            rest = (block.steps[new], block.frequencies[new], block.rows[new])
            yield Piece(block.table, keys, block.versions[new], *rest)


def ahead(read: Callable[[Any], T], items: Sequence[Any], by: int = 1) -> Iterator[T]:
    """``read`` of each item in order, begun on another thread before it is asked for."""
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
