"""Named checkpoints: copies of the rows of all shards as files, each at one version of its shard.

    checkpoint  = NAME/MANIFEST.json               written last: without it there is no checkpoint
                | NAME/ATTEMPT/SSSSS.json          manifest of shard SSSSS, written after its files
                | NAME/ATTEMPT/SSSSS.NNNNNN.KIND   its files, numbered in the order of writing
    NAME        = [A-Za-z0-9_][A-Za-z0-9_.-]{0,127}
    ATTEMPT     = 16 hexadecimal digits, drawn anew for each attempt to take it
    KIND        = blocks | records | counters | sessions
    blocks      = entry*                           of rows and tombstones
    counters    = entry*                           of exact counters, all of them
    entry       = size u64 | block | 0..7 zeros    block.py; every entry begins at a multiple of 8
    records     = record*                          of the version log
    record      = version u64 | size u32 | kind u32 | payload | 0..7 zeros             records.py
    sessions    = record of the pushes already applied, by client, in the engine's own format
    manifest    = a sealed file of the schemas in manifest.py                           sealed.py

Little-endian. A shard's manifest has the size and the xxh3_128 of each file of the shard, and
MANIFEST.json has those of the shards' manifests. So a checksum covers every byte of a checkpoint.
A file is read whole (64 MiB) and checked before anything in it is used.

**Consistent cut.** A shard is copied while pushes continue: note version S; copy the rows; note
version E; copy the log records S+1..E; write the manifest. Blocks contain the rows that were last
changed up to S. A row that changed after S may be missing in the blocks, outdated, or half old and
half new. But the records contain every change of S+1..E, with whole rows. So blocks, then records,
give the exact state of the shard at E.

Exact counters of keys without a row are copied the same way, all of them for each checkpoint.
Sketches are not copied: after a restore they count from zero.

**Incremental.** A checkpoint with a parent contains what changed after the parent's E: rows, and
tombstones of deleted keys. It cannot be read without the parent. Its manifest has the name of the
parent and the checksum of the parent's MANIFEST.json. (The field is called "base" in the file.)

**Reading** goes from the newest layer to the oldest: records from the last to the first, then
blocks from the last to the first, then the parent in the same way. The first row or delete found
for a key is valid; later ones are skipped. For this, the keys of the newer layers are kept in
memory, but never those of the oldest layer, which is the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xxhash import xxh3_128_hexdigest

from storage.errors import Corrupt, UnknownCheckpoint
from storage.manifest import MANIFEST, MAX_CHAIN, MAX_MANIFEST, File, Manifest, Parent, Part
from storage.sealed import unseal
from storage.store import Store

Report = Callable[
    [int], None
]  # called with the number of bytes read or written since the last call


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: its manifests, which are intact and consistent, and its parent."""

    manifest: Manifest
    checksum: str  # xxh3_128 of MANIFEST.json, hexadecimal
    parts: tuple[Part, ...]  # the shards' manifests, by number of the shard
    parent: Checkpoint | None  # None for a full checkpoint

    @property
    def chain(self) -> list[Checkpoint]:
        """Return this checkpoint, its parent, the parent's parent, and so on."""
        chain: list[Checkpoint] = []
        at: Checkpoint | None = self
        while at is not None:
            chain.append(at)
            at = at.parent
        return chain

    def bytes_of(self, parts: Iterable[int]) -> int:
        """Return the bytes of the files of some shards, including those in the parents.

        parts  numbers of the shards
        """
        chosen = list(parts)
        return sum(each.parts[part].bytes for each in self.chain for part in chosen)


def open_checkpoint(store: Store, name: str, *, depth: int = MAX_CHAIN) -> Checkpoint:
    """Read and check the manifests of a checkpoint, of its parent, the parent's parent, and so on.

    depth  maximum number of checkpoints in this chain

    Raises UnknownCheckpoint, UnknownFormat, or Corrupt, which names the file, if a manifest is
    damaged or two manifests contradict each other.
    """
    manifest, checksum = read_manifest(store, name)
    where = store.where(f"{name}/{MANIFEST}")
    parts = tuple(open_part(store, name, file) for file in manifest.parts)
    for shard, part in enumerate(parts):
        written = (part.name, part.attempt, part.shard, part.shards, part.parent)
        if written != (name, manifest.attempt, shard, len(parts), manifest.parent):
            path = store.where(f"{name}/{manifest.parts[shard].path}")
            raise Corrupt(
                path, f"the name, attempt, shard, shards or parent in it differs from {where}"
            )
    if error := manifest.contradiction(parts):
        raise Corrupt(where, error)
    parent = None
    if manifest.parent is not None:
        parent = _open_parent(store, manifest.parent, parts, where, depth - 1)
    return Checkpoint(manifest, checksum, parts, parent)


def _follows(part: Part, before: Part) -> bool:
    """Return whether ``part`` contains the changes of the same log that follow on ``before``.

    part    manifest of a shard
    before  manifest of the same shard in the parent
    """
    needed = (part.after, part.lineage, part.shards, part.buckets)
    return needed == (before.version, before.lineage, before.shards, before.buckets)


def _open_parent(
    store: Store, named: Parent, parts: tuple[Part, ...], where: str, depth: int
) -> Checkpoint:
    """Open the parent of a checkpoint.

    named  name of the parent, and the checksum that its MANIFEST.json must have
    parts  the shards' manifests in the checkpoint, by number of the shard
    where  name of the checkpoint's manifest, for errors
    depth  maximum number of checkpoints in the chain that begins with the parent

    Raises Corrupt if the parent is missing, was replaced or does not fit, or the chain is too long.
    """
    if depth <= 0:
        raise Corrupt(
            where,
            f"expected a chain of at most {MAX_CHAIN} checkpoints, each the parent of the"
            " checkpoint before it, got a longer one",
        )
    try:
        parent = open_checkpoint(store, named.name, depth=depth)
    except UnknownCheckpoint as error:
        raise Corrupt(where, f"its parent {named.name!r} is missing: {error}") from error
    if parent.checksum != named.checksum:
        raise Corrupt(where, f"its parent {named.name!r} was replaced by a different checkpoint")
    for part, before in zip(parts, parent.parts, strict=False):
        if not _follows(part, before):
            what = f"shard {part.shard} does not continue its parent {named.name!r}"
            raise Corrupt(where, f"{what}: versions, lineage, shards or buckets differ")
    return parent


def read_manifest(store: Store, name: str) -> tuple[Manifest, str]:
    """Read a checkpoint's MANIFEST.json and no other file. Returns (manifest, its checksum).

    Raises UnknownCheckpoint if it is missing, Corrupt or UnknownFormat if it cannot be read.
    """
    path = f"{name}/{MANIFEST}"
    where = store.where(path)
    try:
        data = store.read(path, MAX_MANIFEST)
    except FileNotFoundError:
        raise UnknownCheckpoint(name, where) from None
    manifest = unseal(Manifest, data, where)
    if manifest.name != name:
        raise Corrupt(
            where, f"expected the manifest of checkpoint {name!r}, got that of {manifest.name!r}"
        )
    return manifest, xxh3_128_hexdigest(data)


def open_part(store: Store, name: str, file: File) -> Part:
    """Read and check the manifest of one shard.

    name  the checkpoint's name
    file  path, size and checksum of the manifest

    Raises Corrupt or UnknownFormat.
    """
    where = store.where(f"{name}/{file.path}")
    if file.bytes > MAX_MANIFEST:
        raise Corrupt(where, f"a manifest may have at most {MAX_MANIFEST} bytes, got {file.bytes}")
    part = unseal(Part, read_file(store, name, file), where)
    if error := part.contradiction():
        raise Corrupt(where, error)
    return part


def read_file(store: Store, name: str, file: File) -> bytes:
    """Read a whole file of checkpoint ``name``, and verify its size and checksum.

    Raises Corrupt, which names the file, if it is missing or differs from what was written.
    """
    where = store.where(f"{name}/{file.path}")
    try:
        data = store.read(f"{name}/{file.path}", file.bytes)
    except FileNotFoundError:
        raise Corrupt(where, "the file is missing") from None
    if len(data) != file.bytes:
        raise Corrupt(where, f"found {len(data)} bytes, but the manifest says {file.bytes}")
    if xxh3_128_hexdigest(data) != file.checksum:
        raise Corrupt(where, "the checksum of the file does not match the one in the manifest")
    return data
