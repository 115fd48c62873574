"""The checkpoints at the place that the configuration names: listed, opened, verified."""

from __future__ import annotations

import json

from psproto import ps_pb2 as pb
from psserver.errors import NoCheckpointUrl
from psserver.schemas import from_json, write_schema
from psserver.shard import Shard
from psserver.stored import require_name
from psserver.work import Progress
from storage.checkpoint import Checkpoint, open_checkpoint, read_manifest
from storage.errors import StorageError, UnknownCheckpoint
from storage.manifest import NAME, Manifest
from storage.part_reader import verify_part
from storage.store import Store


class Catalog:
    """The checkpoints that one shard can see. Thread-safe.

    store  None: the configuration names no place for checkpoints
    """

    def __init__(self, shard: Shard, store: Store | None) -> None:
        self._shard = shard
        self._store = store

    @property
    def store(self) -> Store:
        """Where checkpoints are."""
        if self._store is None:
            raise NoCheckpointUrl
        return self._store

    def open(self, name: str) -> Checkpoint:
        """A checkpoint's manifests, checked."""
        return open_checkpoint(self.store, require_name(name))

    def listed(self, request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsResponse:
        """All of them, or one."""
        if request.name:
            info = describe(self.open(request.name).manifest, schemas=True)
            return pb.ListCheckpointsResponse(checkpoints=[info])
        names = [name for name in self.store.directories() if NAME.fullmatch(name)]
        return pb.ListCheckpointsResponse(checkpoints=map(self._look, names))

    def _look(self, name: str) -> pb.CheckpointInfo:
        try:
            return describe(read_manifest(self.store, name)[0], schemas=False)
        except UnknownCheckpoint:
            return pb.CheckpointInfo(name=name, problem="not completed")
        except StorageError as error:
            return pb.CheckpointInfo(name=name, problem=str(error))

    def verify(
        self, request: pb.VerifyCheckpointRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Read everything of the parts that are this shard's to verify."""
        checkpoint = self.open(request.name)
        mine = self.share(checkpoint)
        progress.total = sum(each.parts[p].bytes for each in checkpoint.chain for p in mine)
        for part in mine:
            verify_part(self.store, checkpoint, part, progress.tell)
        return pb.CheckpointProgress(bytes=progress.bytes, total=progress.total)

    def share(self, checkpoint: Checkpoint) -> range:
        """The parts that this shard looks at, where every part is looked at once."""
        return range(self._shard.number, len(checkpoint.parts), self._shard.shard_map.shards)


def describe(manifest: Manifest, *, schemas: bool) -> pb.CheckpointInfo:
    """The message about a checkpoint."""
    tables = []
    for table in manifest.tables:
        told = pb.CheckpointTable(name=table.name, rows=table.rows)
        if schemas:
            told.schema.CopyFrom(write_schema(from_json(json.loads(table.schema))))
        tables.append(told)
    return pb.CheckpointInfo(
        name=manifest.name,
        base=manifest.base.name if manifest.base else "",
        shards=len(manifest.parts),
        versions=manifest.versions,
        bytes=manifest.bytes,
        time_us=manifest.micros,
        tables=tables,
    )
