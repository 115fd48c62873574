"""Restore one shard from a checkpoint, in phases that a client requests from all shards.

The client that drives a restore is its owner. Other clients may only abort the restore. If the
owner has not called for LEASE_SECONDS, another client may take its place. swap.py describes the
phases.
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
STATE_BYTES = 4096  # disk space that a new STATE file takes, in bytes
LEASE_SECONDS = 6.0  # seconds without a call after which another client may replace the owner
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
    """Runs the requests of a restore on one shard: prepare, hold, commit, release, abort.

    Thread-safe.

    checkpoints  reads the checkpoint, and refuses other long operations during the restore
    directory    data directory of the shard; None: the shard has none, so restores are refused
    state        progress of a restore that began before this start of the server, as
                 ``swap.settle`` returned it; None: no restore
    restart      makes the server process start again; called on any thread, returns immediately
    clock        returns monotonic seconds
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
        self._owner = ""  # id of the client that drives the restore, from HOLD on
        self._seen = 0.0  # monotonic seconds of the owner's last call
        self._changing = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether a restore makes the shard refuse all other requests: from the step HOLD until the
        restore is released or aborted.
        """
        state = self._state
        return state is not None and state.phase not in (PREPARED, *OVER)

    @property
    def running(self) -> tuple[str, str] | None:
        """(Name of the checkpoint, phase) of the restore in progress; None: there is none."""
        state = self._state
        return None if state is None or state.phase in OVER else (state.name, state.phase)

    def prepare(
        self, request: pb.PrepareRestoreRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Stage the checkpoint: write it next to the live data, which stays unchanged.

        request   has the checkpoint's name, the restore's id, and whether the restore may delete
                  existing tables
        progress  updated while this runs, for the client to see

        Returns bytes read, bytes in total and rows staged. Raises NoLog without a data directory,
        RestoreConflict during another restore, NotEmpty if tables exist and may not be deleted,
        BadRequest for an invalid name or id. After an error the staged files are removed.
        """
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
                progress.require_wanted()  # nobody may continue what a revoked right began
            except BaseException:
                clear(self._directory)  # frees disk space
                raise
            self._reach(State(id=id, name=name, replace=request.replace, phase=PREPARED))
        return pb.CheckpointProgress(bytes=progress.bytes, total=progress.total, rows=rows)

    def _require_free(self) -> None:
        """Raise RestoreConflict if a restore has passed the step HOLD and is not finished."""
        if self.held:
            state = self._state
            assert state is not None
            raise RestoreConflict(
                f"restore {state.id} of checkpoint {state.name!r} is in phase {state.phase!r}:"
                " finish or abort it before the next restore"
            )

    def step(self, request: pb.RestoreRequest) -> pb.RestoreStatus:
        """Move the restore to the phase that the request's ``step`` asks for; return its status.

        Without a step, only returns the status. Repeating a step succeeds and changes nothing.
        Raises RestoreConflict if the restore has a different id, is in a phase that does not allow
        the step, or is driven by another client.
        """
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
                raise RestoreConflict(
                    f"restore {request.id[:16]!r} is not in progress on this shard: prepare it"
                )
            return self._status()

    def _stay(self, owner: str) -> None:
        """Record the time of a call of the owner, so that no other client takes its place.

        owner  id of the calling client; it becomes the owner if there is none since a restart
        """
        if owner and owner == (self._owner or owner):
            self._owner, self._seen = owner, self._clock()

    def _require_owner(self, request: pb.RestoreRequest, state: State) -> None:
        """Make the client of a request the owner of the restore.

        Raises RestoreConflict if another owner called less than LEASE_SECONDS ago, except for an
        abort, which any client may request.
        """
        idle = self._clock() - self._seen
        other = self._owner not in ("", request.owner)
        if other and idle < LEASE_SECONDS and request.step != Step.STEP_ABORT:
            raise RestoreConflict(
                f"restore {state.id} of checkpoint {state.name!r} is driven by another client,"
                f" which called {idle:.1f} s ago: wait until it finishes, or abort the restore"
            )
        self._owner, self._seen = request.owner, self._clock()

    def _take(self, step: int, state: State) -> None:
        """Carry out a step of the restore, unless it was done before.

        step   pb.RestoreRequest.Step
        state  the restore before the step

        Raises RestoreConflict if the restore's phase does not allow the step.
        """
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
                pass  # done before
            case _:
                known = step in Step.Step.values()
                raise RestoreConflict(
                    f"restore {state.id} of checkpoint {state.name!r} is in phase {state.phase!r},"
                    f" which does not allow {Step.Step.Name(step) if known else f'step {step}'}"
                )

    def _hold(self, state: State) -> None:
        """Make the shard refuse other requests from now on.

        Raises NotEmpty, and lets the shard accept requests again, if tables exist that the restore
        may not delete.
        """
        self._reach(dataclasses.replace(state, phase=HELD))  # new requests are refused from here on
        try:
            self._require_empty(state.replace)  # runs after all requests that began earlier
        except NotEmpty:
            self._reach(state)
            raise

    def _require_empty(self, replace: bool) -> None:
        """Raise NotEmpty if the shard has tables, unless ``replace`` allows to delete them."""
        tables = self._engine.run(self._shard.tables)
        if tables and not replace:
            raise NotEmpty(
                f"shard {self._shard.number} has tables, for example {tables[0]!r}, which the"
                " restore would delete: drop them, or restore with 'replace'"
            )

    def _status(self) -> pb.RestoreStatus:
        """Return the restore's id, checkpoint, phase and error; all are empty without a restore."""
        state = self._state
        if state is None:
            return pb.RestoreStatus()
        return pb.RestoreStatus(
            id=state.id, name=state.name, phase=PHASES[state.phase], why=state.why
        )

    def _reach(self, state: State) -> None:
        """Set the state of the restore, on disk first. Raises DiskFull."""
        assert self._directory is not None
        with as_disk_full(self._directory, STATE_BYTES):
            write_state(self._directory, state)
        self._state = state

    def _end(self, state: State) -> None:
        """Set the final state of the restore, and delete the staged and the old data."""
        assert self._directory is not None
        self._reach(state)
        clean(self._directory)
