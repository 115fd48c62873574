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

from collections.abc import Callable
from dataclasses import dataclass

from xxhash import xxh3_128_hexdigest

from storage.errors import Corrupt, UnknownCheckpoint
from storage.manifest import MANIFEST, MAX_CHAIN, MAX_MANIFEST, Base, File, Manifest, Part, parse
from storage.sealed import unseal
from storage.store import Store

Tell = Callable[[int], None]  # is told how many more bytes were read or written


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
    manifest = parse(Manifest, unseal(data, where), where)
    if manifest.name != name or not manifest.parts:
        raise Corrupt(where, f"is the manifest of {manifest.name!r}")
    return manifest, xxh3_128_hexdigest(data)


def open_part(store: Store, name: str, file: File) -> Part:
    """The manifest of a shard, checked."""
    where = store.where(f"{name}/{file.path}")
    return parse(Part, unseal(read_file(store, name, file), where), where)


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
