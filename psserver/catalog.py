"""List, open and verify the checkpoints that are stored at the setting checkpoint_url."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from psproto import ps_pb2 as pb
from psserver.errors import CheckpointBusy, NoCheckpointUrl
from psserver.schemas import write_schema
from psserver.shard import Shard
from psserver.stored import read_stored, require_name, require_width, sessions_in
from psserver.uses import Uses
from psserver.work import Progress
from storage.checkpoint import Checkpoint, open_checkpoint, read_manifest
from storage.errors import StorageError, UnknownCheckpoint
from storage.manifest import NAME, Manifest
from storage.part_reader import verify_part
from storage.store import Store

logger = structlog.get_logger()


class Catalog:
    """Reads the named checkpoints that one shard can see. Thread-safe.

    store  file store that contains the checkpoints; None: checkpoint_url is not set
    uses   registry of the checkpoints that are being read or deleted
    """

    def __init__(self, shard: Shard, store: Store | None) -> None:
        self._shard = shard
        self._store = store
        self.uses = Uses()

    @property
    def store(self) -> Store:
        """Return the store of the checkpoints. Raises NoCheckpointUrl if there is none."""
        if self._store is None:
            raise NoCheckpointUrl
        return self._store

    def stop(self) -> None:
        """Make all file operations on checkpoints fail, those in progress and all later ones."""
        if self._store is not None:
            self._store.stop()

    def open(self, name: str) -> Checkpoint:
        """Read and check the manifests of the checkpoint ``name`` and of its ancestors.

        Raises BadRequest for an invalid name, UnknownCheckpoint if there is no such checkpoint,
        Corrupt or UnknownFormat if a manifest cannot be used.
        """
        return open_checkpoint(self.store, require_name(name))

    @contextmanager
    def reading(self, name: str, what: str) -> Iterator[Checkpoint]:
        """Open a checkpoint. While the block runs, it and its ancestors cannot be deleted.

        name  name of the checkpoint
        what  describes the work, for the error that a client gets if it tries to delete them

        Raises CheckpointBusy if one of them is being deleted, or if the checkpoint was replaced
        while it was opened.
        """
        checkpoint = self.open(name)
        names = [each.manifest.name for each in checkpoint.chain]
        with self.uses.using(names, what):
            if read_manifest(self.store, name)[1] != checkpoint.checksum:
                raise CheckpointBusy(f"checkpoint {name!r} was replaced just now; try again")
            yield checkpoint

    def listed(self, request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsResponse:
        """Describe the checkpoint ``request.name`` with the schemas of its tables.

        If the name is empty, describe all checkpoints, without schemas.
        """
        if request.name:
            info = describe(self.open(request.name).manifest, schemas=True)
            return pb.ListCheckpointsResponse(checkpoints=[info])
        return pb.ListCheckpointsResponse(checkpoints=map(self._look, self.names()))

    def names(self) -> list[str]:
        """Return the sorted names of all checkpoints, including those not yet completed."""
        return [name for name in self.store.directories() if NAME.fullmatch(name)]

    def _look(self, name: str) -> pb.CheckpointInfo:
        """Describe the checkpoint ``name``, without the schemas of its tables.

        Never raises. If the checkpoint is damaged or incomplete, the field ``problem`` of the
        result says why.
        """
        try:
            return describe(read_manifest(self.store, name)[0], schemas=False)
        except UnknownCheckpoint:
            return pb.CheckpointInfo(name=name, problem="not completed")
        except StorageError as error:
            return pb.CheckpointInfo(name=name, problem=str(error))
        except Exception as error:
            logger.exception("cannot list a checkpoint", checkpoint=name)
            return pb.CheckpointInfo(name=name, problem=f"damaged: {type(error).__name__}")

    def verify(
        self, request: pb.VerifyCheckpointRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Read and check every byte of this shard's share of a checkpoint and of its ancestors.

        progress  counts the bytes read

        Raises Corrupt or UnknownFormat, which name the file, if a byte has changed since it was
        written, or if two files of the checkpoint contradict each other.
        """
        with self.reading(request.name, "it is being verified") as checkpoint:
            schemas = {
                table.name: read_stored(checkpoint.manifest.name, table.name, table.schema)
                for table in checkpoint.manifest.tables
            }
            mine = self.share(checkpoint)
            progress.total = checkpoint.bytes_of(mine)
            for part in mine:
                tables = checkpoint.parts[part].tables
                by_number = {each.number: schemas[each.name] for each in tables}
                for piece in verify_part(self.store, checkpoint, part, progress.add):
                    require_width(checkpoint, by_number[piece.table], piece.rows)
                sessions_in(self.store, checkpoint, part)
        return pb.CheckpointProgress(bytes=progress.bytes, total=progress.total)

    def share(self, checkpoint: Checkpoint) -> range:
        """Return the indices of the checkpoint's parts (files of one shard) that this shard reads.

        The shards of the cluster read each part exactly once, even if the cluster that took the
        checkpoint had a different number of shards.
        """
        return range(self._shard.number, len(checkpoint.parts), self._shard.shard_map.shards)


def describe(manifest: Manifest, *, schemas: bool) -> pb.CheckpointInfo:
    """Convert a manifest to a CheckpointInfo message.

    schemas  include the schema of each table; raises CheckpointUnfit if this release cannot read it
    """
    tables = []
    for table in manifest.tables:
        message = pb.CheckpointTable(name=table.name, rows=table.rows)
        if schemas:
            schema = read_stored(manifest.name, table.name, table.schema)
            message.schema.CopyFrom(write_schema(schema))
        tables.append(message)
    return pb.CheckpointInfo(
        name=manifest.name,
        parent=manifest.parent.name if manifest.parent else "",
        shards=len(manifest.parts),
        versions=manifest.versions,
        bytes=manifest.bytes,
        time_us=manifest.micros,
        tables=tables,
    )
