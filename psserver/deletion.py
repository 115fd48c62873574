"""Delete checkpoints, but never one that a remaining checkpoint needs as its parent.

Children are deleted before their parents, and of each checkpoint the manifest before the other
files. So if the server dies during the work, no checkpoint has lost its parent, and none that is
listed as complete has lost files. A partly deleted checkpoint is listed as "not completed", and can
be deleted again.
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

DELETER = 0  # number of the shard that deletes the files, on behalf of all shards


class Deletion:
    """Answers DeleteCheckpoints. Shard 0 deletes the files; other shards only stop using them."""

    def __init__(self, shard: Shard, catalog: Catalog, calls: Calls) -> None:
        self._shard = shard
        self._catalog = catalog
        self._calls = calls

    def delete(
        self, request: pb.DeleteCheckpointsRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Delete the checkpoints ``request.names``, or all except the newest ``request.keep``.

        progress  reports to the client that this shard is ready

        Ancestors of a kept checkpoint are kept too. Before anything is deleted, the call waits for
        the client's Continue request, which means that all shards are ready. Raises BadRequest,
        CheckpointNeeded, CheckpointBusy or UnknownCheckpoint; nothing is deleted then. Raises
        Draining if the server stops or the client is gone; the remaining checkpoints stay then.
        """
        _require_valid(request)
        with self._calls.open(request.id, progress) as call:
            manifests = self._manifests()
            names = newest_first(request.names or surplus(manifests, request.keep), manifests)
            self._require_deletable(names, manifests)
            if request.dry_run:
                return pb.CheckpointProgress(names=names)
            with self._catalog.uses.deleting(names):
                progress.stage = pb.CheckpointProgress.STAGE_READY
                call.wait(Step.STEP_START)
                if self._shard.number == DELETER:
                    # another client may have completed a child since the first check
                    self._require_deletable(names, self._manifests())
                    for name in names:
                        progress.require_wanted()
                        self._remove(name)
        return pb.CheckpointProgress(names=names, stage=pb.CheckpointProgress.STAGE_DONE)

    def _manifests(self) -> dict[str, Manifest | None]:
        """Return name -> manifest of all checkpoints; None for an incomplete or damaged checkpoint.

        Raises StoreFailed or UnknownFormat if a manifest cannot be read or understood, because it
        is then unknown which parent its checkpoint needs.
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
        """Raise an error unless the checkpoints ``names`` can be deleted together.

        manifests  name -> manifest of every checkpoint; None: incomplete or damaged

        Raises UnknownCheckpoint if one does not exist, CheckpointNeeded if one is the parent of a
        checkpoint that is not in ``names``.
        """
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
        """Delete the files of one checkpoint, its manifest first."""
        store = self._catalog.store
        with suppress(Corrupt):  # ``name`` is a symbolic link; only the link is deleted below
            store.remove(f"{name}/{MANIFEST}")  # synced before the other files are deleted
        store.remove(name)


def _require_valid(request: pb.DeleteCheckpointsRequest) -> None:
    """Raise BadRequest unless the request has either valid names or a number to keep."""
    if bool(request.names) == bool(request.keep):
        raise BadRequest(
            "INVALID_ARGUMENT",
            "expected exactly one of the fields 'names' and 'keep', got"
            f" {'both' if request.keep else 'none'}",
        )
    for name in request.names:
        require_name(name)


def surplus(manifests: dict[str, Manifest | None], keep: int) -> list[str]:
    """Return the names of complete checkpoints, except the newest ``keep`` and all their ancestors.

    manifests  name -> manifest of every checkpoint; None: incomplete or damaged
    """
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
    """Return the distinct ``names``, sorted so that each checkpoint comes before its parent.

    manifests  name -> manifest of every checkpoint; None: incomplete or damaged
    """

    def depth(name: str) -> int:
        steps, seen = 0, {name}
        at = manifests.get(name)
        while at is not None and at.parent and at.parent.name not in seen:
            steps += 1
            seen.add(at.parent.name)
            at = manifests.get(at.parent.name)
        return steps

    return sorted(set(names), key=lambda name: (-depth(name), name))
