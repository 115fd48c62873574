"""Restore one shard from a checkpoint, in steps that a client takes on all shards alike.

One client drives a restore, its owner. Another client is refused while the owner calls or polls,
and may take over once the owner has been silent for LEASE_SECONDS. swap.py has the phases.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

from psproto import ps_pb2 as pb
from psserver.checkpoints import Checkpoints
from psserver.engine import Engine
from psserver.errors import NoLog, NotEmpty, RestoreConflict
from psserver.shard import Shard
from psserver.staging import stage
from psserver.stored import require_id, require_name
from psserver.swap import (
    ABORTED,
    ABORTING,
    COMMITTED,
    FAILED,
    HELD,
    LOADED,
    OVER,
    PREPARED,
    RELEASED,
    State,
    clean,
    clear,
    write_state,
)
from psserver.work import Progress
from storage.disk import as_disk_full

Step = pb.RestoreRequest
STATE_BYTES = 4096  # that a new STATE takes on the disk
LEASE_SECONDS = 6.0  # an owner that has not called for this time may be replaced
PHASES = {
    PREPARED: pb.RestoreStatus.PHASE_PREPARED,
    HELD: pb.RestoreStatus.PHASE_HELD,
    COMMITTED: pb.RestoreStatus.PHASE_COMMITTED,
    LOADED: pb.RestoreStatus.PHASE_LOADED,
    FAILED: pb.RestoreStatus.PHASE_FAILED,
    ABORTING: pb.RestoreStatus.PHASE_ABORTING,
    RELEASED: pb.RestoreStatus.PHASE_RELEASED,
    ABORTED: pb.RestoreStatus.PHASE_ABORTED,
}


class Restores:
    """The restore of one shard, if one is under way. Thread-safe.

    directory  data directory of the shard; None: there is nothing to restore into
    state      as ``settle`` returned it
    restart    makes the process start again; called on any thread, returns at once
    clock      monotonic seconds
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        checkpoints: Checkpoints,
        directory: Path | None,
        state: State | None,
        restart: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._checkpoints = checkpoints
        self._directory = directory
        self._restart = restart
        self._state = state
        self._clock = clock
        self._owner = ""  # the client that drives the restore, from HOLD on
        self._seen = 0.0  # when it last called
        self._changing = threading.Lock()

    @property
    def held(self) -> bool:
        """Return whether the shard must refuse work."""
        state = self._state
        return state is not None and state.phase not in (PREPARED, *OVER)

    def prepare(
        self, request: pb.PrepareRestoreRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Stage a checkpoint next to the live data, without touching the live data."""
        name, id = require_name(request.name), require_id("id", request.id)
        if self._directory is None:
            raise NoLog
        with self._checkpoints.work.alone(f"it prepares a restore of {name!r}"):
            with self._changing:
                self._require_free()
                self._require_empty(request.replace)
                self._state, self._owner = None, ""
                clear(self._directory)
            progress.stage = pb.CheckpointProgress.STAGE_READY
            try:
                catalog = self._checkpoints.catalog
                target = self._directory / "restore" / "base"
                with catalog.reading(name, "it is being restored") as checkpoint:
                    rows = stage(self._shard, catalog.store, checkpoint, target, progress)
            except BaseException:
                clear(self._directory)  # the room may be wanted
                raise
            self._reach(State(id=id, name=name, replace=request.replace, phase=PREPARED))
        return pb.CheckpointProgress(bytes=progress.bytes, total=progress.total, rows=rows)

    def _require_free(self) -> None:
        if self.held:
            state = self._state
            assert state is not None
            raise RestoreConflict(
                f"restore {state.id} of {state.name!r} is {state.phase}: finish or abort it"
            )

    def step(self, request: pb.RestoreRequest) -> pb.RestoreStatus:
        """Take a step, or only return the status. A step that was taken before is no error."""
        with self._changing:
            state = self._state
            if state is not None and state.id == request.id:
                if request.step == Step.STEP_UNSPECIFIED:
                    self._stay(request.owner)
                else:
                    self._require_owner(request, state)
                    self._take(request.step, state)
            elif request.step in (Step.STEP_HOLD, Step.STEP_COMMIT) or (
                self.held and request.step != Step.STEP_UNSPECIFIED
            ):
                raise RestoreConflict(f"restore {request.id[:16]!r} is not under way here")
            return self._status()

    def _stay(self, owner: str) -> None:
        """Note that the owner is there; after a restart, the first client that says so is it."""
        if owner and owner == (self._owner or owner):
            self._owner, self._seen = owner, self._clock()

    def _require_owner(self, request: pb.RestoreRequest, state: State) -> None:
        """Make a client the owner, unless another one has called a moment ago.

        Every client may abort.
        """
        idle = self._clock() - self._seen
        other = self._owner not in ("", request.owner)
        if other and idle < LEASE_SECONDS and request.step != Step.STEP_ABORT:
            raise RestoreConflict(
                f"restore {state.id} of {state.name!r} is driven by another client, which called"
                f" {idle:.1f} s ago: wait for it, or abort it"
            )
        self._owner, self._seen = request.owner, self._clock()

    def _take(self, step: int, state: State) -> None:
        match step, state.phase:
            case (Step.STEP_HOLD, "prepared"):
                with self._checkpoints.work.alone(f"it restores {state.name!r}"):
                    self._hold(state)
            case (Step.STEP_COMMIT, "held"):
                self._reach(dataclasses.replace(state, phase=COMMITTED))
                self._restart()
            case (Step.STEP_RELEASE, "loaded"):
                self._end(dataclasses.replace(state, phase=RELEASED))
            case (Step.STEP_ABORT, "prepared" | "held" | "failed"):
                self._end(dataclasses.replace(state, phase=ABORTED))
            case (Step.STEP_ABORT, "committed" | "loaded"):
                self._reach(dataclasses.replace(state, phase=ABORTING))
                self._restart()
            case (
                (Step.STEP_HOLD, "held" | "committed" | "loaded")
                | (Step.STEP_COMMIT, "committed" | "loaded" | "failed")
                | (Step.STEP_ABORT, "aborting" | "aborted")
                | (Step.STEP_RELEASE, "released")
            ):
                pass  # taken before
            case _:
                raise RestoreConflict(f"restore {state.id} of {state.name!r} is {state.phase}")

    def _hold(self, state: State) -> None:
        self._reach(dataclasses.replace(state, phase=HELD))  # from now on nothing begins
        try:
            self._require_empty(state.replace)  # after all that began before
        except NotEmpty:
            self._reach(state)
            raise

    def _require_empty(self, replace: bool) -> None:
        tables = self._engine.run(self._shard.tables)
        if tables and not replace:
            raise NotEmpty(
                f"shard {self._shard.number} has tables, {tables[0]!r} among them, which the"
                " restore would replace"
            )

    def _status(self) -> pb.RestoreStatus:
        state = self._state
        if state is None:
            return pb.RestoreStatus()
        return pb.RestoreStatus(
            id=state.id, name=state.name, phase=PHASES[state.phase], why=state.why
        )

    def _reach(self, state: State) -> None:
        assert self._directory is not None
        with as_disk_full(self._directory, STATE_BYTES):
            write_state(self._directory, state)
        self._state = state

    def _end(self, state: State) -> None:
        assert self._directory is not None
        self._reach(state)
        clean(self._directory)
