"""Delete checkpoints, and never one that another checkpoint needs.

The newest is deleted first, and of each checkpoint the manifest first. So a server that dies in
between leaves no checkpoint without its parent, and none that is listed as good and has lost files.
What is left of it is listed as "not completed", and can be deleted.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from psproto import ps_pb2 as pb
from psserver.calls import Calls, Step
from psserver.catalog import Catalog
from psserver.errors import BadRequest, CheckpointNeeded
from psserver.shard import Shard
from psserver.stored import require_name
from psserver.work import Progress
from storage.checkpoint import read_manifest
from storage.errors import Corrupt, UnknownCheckpoint
from storage.manifest import MANIFEST, Manifest

EVERYBODY = 0  # the shard that deletes, for all shards


class Deletion:
    """Deletes checkpoints for all shards, or keeps this one from reading them meanwhile."""

    def __init__(self, shard: Shard, catalog: Catalog, calls: Calls) -> None:
        self._shard = shard
        self._catalog = catalog
        self._calls = calls

    def delete(
        self, request: pb.DeleteCheckpointsRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Delete checkpoints. See DeleteCheckpoints in ps.proto for the steps of the client.

        Raises CheckpointNeeded, CheckpointBusy, UnknownCheckpoint, and deletes nothing then.
        """
        if bool(request.names) == bool(request.keep):
            raise BadRequest("INVALID_ARGUMENT", "either names or keep must be given")
        for name in request.names:
            require_name(name)
        with self._calls.open(request.id, progress) as call:
            manifests = self._manifests()
            names = list(request.names) or surplus(manifests, request.keep)
            names = newest_first(names, manifests)
            self._require_deletable(names, manifests)
            if request.dry_run:
                return pb.CheckpointProgress(names=names)
            with self._catalog.uses.deleting(names):
                progress.stage = pb.CheckpointProgress.STAGE_READY
                call.wait(Step.STEP_START)
                if self._shard.number == EVERYBODY:
                    # a child that another client has completed since is seen now
                    self._require_deletable(names, self._manifests())
                    for name in names:
                        self._remove(name)
        return pb.CheckpointProgress(names=names, stage=pb.CheckpointProgress.STAGE_DONE)

    def _manifests(self) -> dict[str, Manifest | None]:
        """Read the manifests of all checkpoints; None for one that is incomplete or damaged.

        Raises StoreFailed and UnknownFormat: what such a checkpoint needs cannot be known.
        """
        found: dict[str, Manifest | None] = {}
        for name in self._catalog.names():
            try:
                found[name] = read_manifest(self._catalog.store, name)[0]
            except (UnknownCheckpoint, Corrupt):  # it cannot be restored, whatever is deleted
                found[name] = None
        return found

    def _require_deletable(
        self, names: Iterable[str], manifests: dict[str, Manifest | None]
    ) -> None:
        chosen = set(names)
        for name in chosen:
            if name not in manifests:
                raise UnknownCheckpoint(name, self._catalog.store.where(name))
        for child, manifest in manifests.items():
            parent = manifest.parent.name if manifest and manifest.parent else None
            if parent in chosen and child not in chosen:
                raise CheckpointNeeded(
                    f"checkpoint {parent!r} is needed by {child!r}, which builds on it: delete both"
                    " or none"
                )

    def _remove(self, name: str) -> None:
        store = self._catalog.store
        with suppress(Corrupt):  # a symbolic link: it goes, not what it links to
            store.remove(f"{name}/{MANIFEST}")  # on disk before the rest goes
        store.remove(name)


def surplus(manifests: dict[str, Manifest | None], keep: int) -> list[str]:
    """Return the complete checkpoints but the newest ``keep``, and but those that these need."""
    complete = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    by_age = sorted(complete.values(), key=lambda each: (each.micros, each.name))
    kept: set[str] = set()
    for manifest in by_age[-keep:]:
        at: Manifest | None = manifest
        while at is not None and at.name not in kept:
            kept.add(at.name)
            at = complete.get(at.parent.name) if at.parent else None
    return [name for name in complete if name not in kept]


def newest_first(names: Iterable[str], manifests: dict[str, Manifest | None]) -> list[str]:
    """Sort checkpoints so that each comes before the one that it needs."""

    def depth(name: str) -> int:
        steps, seen = 0, {name}
        at = manifests.get(name)
        while at is not None and at.parent and at.parent.name not in seen:
            steps += 1
            seen.add(at.parent.name)
            at = manifests.get(at.parent.name)
        return steps

    return sorted(set(names), key=lambda name: (-depth(name), name))
