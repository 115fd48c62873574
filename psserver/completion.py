"""Complete a named checkpoint: make the parts that all shards have written one checkpoint.

An attempt is one run of a client's checkpoint command; its random id names the directory of its
files. A checkpoint is complete once its manifest exists. The manifest lists the manifests of the
parts, one per shard.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress

import structlog

from psproto import ps_pb2 as pb
from psserver.catalog import Catalog, describe
from psserver.errors import CheckpointExists, CheckpointUnfit
from psserver.shard import Shard
from psserver.stored import require_id, require_name
from storage.checkpoint import Checkpoint, open_part, read_manifest
from storage.errors import StorageError
from storage.manifest import (
    ATTEMPT,
    MANIFEST,
    MAX_MANIFEST,
    CheckpointTable,
    File,
    Manifest,
    Parent,
    Part,
    tables_over,
)
from storage.sealed import seal

logger = structlog.get_logger()


class Completion:
    """Answers CompleteCheckpoint on one shard, on behalf of all shards. Thread-safe.

    now  returns seconds since 1970
    """

    def __init__(self, shard: Shard, catalog: Catalog, now: Callable[[], float]) -> None:
        self._shard = shard
        self._catalog = catalog
        self._now = now

    def complete(self, request: pb.CompleteCheckpointRequest) -> pb.CheckpointInfo:
        """Write the manifest that makes the parts of all shards one checkpoint. Idempotent.

        Raises CheckpointUnfit if the parts do not belong together, CheckpointExists if a different
        attempt has completed a checkpoint of this name.
        """
        name, attempt = require_name(request.name), require_id("attempt", request.attempt)
        what = f"checkpoint {name!r} is being completed"
        parents = self._catalog.reading(request.parent, what) if request.parent else nullcontext()
        with self._catalog.uses.using([name], what), parents as parent:
            return self._complete(request, name, attempt, parent)

    def _complete(
        self,
        request: pb.CompleteCheckpointRequest,
        name: str,
        attempt: str,
        parent: Checkpoint | None,
    ) -> pb.CheckpointInfo:
        """Publish the manifest of the checkpoint ``name``, then remove files of other attempts.

        attempt  id of the attempt that wrote the parts
        parent   opened parent of an incremental checkpoint; None: the checkpoint is full
        """
        store, path = self._catalog.store, f"{name}/{MANIFEST}"
        if not store.exists(path):
            data = seal(self._manifest(request, parent))
            if len(data) > MAX_MANIFEST:
                raise CheckpointUnfit(
                    f"checkpoint {name!r}: its manifest would have {len(data)} bytes, but the limit"
                    f" is {MAX_MANIFEST}"
                )
            with suppress(FileExistsError):
                store.publish(path, data)
        manifest, _ = read_manifest(store, name)
        if manifest.attempt != attempt:
            raise CheckpointExists(name)
        store.sync(path)  # a server that published it may have died before its own sync
        self._clear_away(name, attempt)
        return describe(manifest, schemas=True)

    def _manifest(
        self, request: pb.CompleteCheckpointRequest, checkpoint: Checkpoint | None
    ) -> Manifest:
        """Build the manifest of the checkpoint from the manifests of its parts.

        checkpoint  opened parent of an incremental checkpoint; None: the checkpoint is full

        Raises CheckpointUnfit if the parts do not belong together.
        """
        parent = Parent(name=request.parent, checksum=checkpoint.checksum) if checkpoint else None
        parts = self._parts(request, parent)
        files = tuple(
            File(path=each.path, bytes=each.bytes, checksum=each.checksum) for each in request.parts
        )
        manifest = Manifest(
            name=request.name,
            attempt=request.attempt,
            parent=parent,
            parts=files,
            versions=tuple(part.version for part in parts),
            tables=_tables_over(parts),
            bytes=sum(part.bytes for part in parts) + sum(file.bytes for file in files),
            micros=int(self._now() * 1e6),
        )
        if why := manifest.contradiction(parts):
            raise CheckpointUnfit(f"checkpoint {request.name!r}: {why}")
        return manifest

    def _parts(
        self, request: pb.CompleteCheckpointRequest, parent: Parent | None
    ) -> tuple[Part, ...]:
        """Return the manifests of the parts that the client lists, in the order of the shards.

        parent  parent of the checkpoint; None: the checkpoint is full

        Raises CheckpointUnfit if a part is missing or has a different parent or number of shards.
        """
        shards = self._shard.shard_map.shards
        if len(request.parts) != shards:
            raise CheckpointUnfit(
                f"expected {shards} parts, one per shard, got {len(request.parts)}"
            )
        parts = tuple(
            self._part(request, shard, claimed) for shard, claimed in enumerate(request.parts)
        )
        for shard, part in enumerate(parts):
            if (part.parent, part.shard, part.shards) != (parent, shard, len(parts)):
                raise CheckpointUnfit(
                    f"the part of shard {shard} was written with a different parent or a different"
                    " number of shards: take the checkpoint again"
                )
        return parts

    def _clear_away(self, name: str, kept: str) -> None:
        """Delete the files of all attempts to write the checkpoint ``name``, except those of one.

        kept  id of the attempt whose files stay

        A StorageError is only logged as a warning; the remaining files then stay too.
        """
        try:
            for other in self._catalog.store.directories(name):
                if other != kept and ATTEMPT.fullmatch(other):
                    self._catalog.store.remove(f"{name}/{other}")
        except StorageError as error:
            logger.warning("earlier attempts are left", checkpoint=name, error=str(error))

    def _part(
        self, request: pb.CompleteCheckpointRequest, shard: int, claimed: pb.CheckpointPart
    ) -> Part:
        """Read the manifest of the part that ``shard`` wrote.

        claimed  path, size and checksum of the manifest, as reported by the client

        Raises CheckpointUnfit if the shard cannot have written a file of this path or size.
        """
        path = f"{request.attempt}/{shard:05}.json"  # the only one that a shard writes
        if claimed.path != path or not 0 < claimed.bytes <= MAX_MANIFEST:
            raise CheckpointUnfit(
                f"part of shard {shard}: expected the file {path!r} with 1 to {MAX_MANIFEST} bytes,"
                f" got {claimed.path[:200]!r} with {claimed.bytes} bytes"
            )
        file = File(path=path, bytes=claimed.bytes, checksum=claimed.checksum)
        return open_part(self._catalog.store, request.name, file)


def _tables_over(parts: tuple[Part, ...]) -> tuple[CheckpointTable, ...]:
    """Return the tables of a checkpoint.

    Raises CheckpointUnfit if its parts have different tables.
    """
    try:
        return tables_over(parts)
    except KeyError as error:
        raise CheckpointUnfit(
            f"table {error} was created, altered or dropped while the checkpoint was taken: take"
            " the checkpoint again"
        ) from error
