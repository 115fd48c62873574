"""Checkpointer: save a trainer together with its rows, and let it come back after a crash.

    ck = Checkpointer(ps, directory="run-7", every=1000)
    start = ck.resume(policy="rewind")
    if start.path:
        model.load_state_dict(torch.load(start.path / "dense.pt"))
    for step in range(start.step, 1 + steps):
        ...  # pull, compute, ps.push(..., step=step)
        ck.at(step, save=lambda path: torch.save(model.state_dict(), path / "dense.pt"))

A *cut* is a moment between two training steps. At a cut, all pushes are answered; the Checkpointer
places a barrier on the servers, and calls ``save`` for the dense state. The servers copy their rows
before, while training goes on, and complete their checkpoint afterwards: it has exactly the rows of
the barrier. trainerstate.py describes the files. No framework is imported.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from psclient import behind, checked, pruning
from psclient.calls import links
from psclient.checkpoints import CheckpointInfo, checkpoint
from psclient.client import Client
from psclient.errors import (
    BarrierMissed,
    CheckpointNeeded,
    CheckpointNotFound,
    DeadlineExceeded,
    InvalidArgument,
    LogDiverged,
    PsError,
    ResourceExhausted,
    RestoreConflict,
    Unavailable,
)
from psclient.restores import restore
from psclient.together import Alone, Flushes, Ranks, on_rank_0
from psclient.trainerstate import (
    Directory,
    RankState,
    SessionState,
    ShardState,
    TrainerState,
    require_json,
)
from psclient.writing import Pace, Writing

Policy = Literal["rewind", "once", "ahead"]
Save = Callable[[Path], Any]
PASSING = (Unavailable, DeadlineExceeded, ResourceExhausted, BarrierMissed)  # errors to try again
ATTEMPTS = 2  # checkpoints that are begun for one cut, if the first fails
BUSY_SECONDS, BUSY_PAUSE = 60.0, 0.2  # how long and how often to ask shards that are busy
STEPS = 1 << 47  # training steps are smaller
log = logging.getLogger("psclient")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a trainer begins, or goes on."""

    step: int  # training step to compute next, from 1 on
    path: Path | None  # directory with the files that ``save`` wrote; None: begin with a new model
    position: Any  # where this rank stood in its data at the cut, as given to ``at``; None: start
    skip: int  # batches to leave out after ``position``; more than 0 only with policy "ahead"
    gap: int  # steps that the servers had seen after the cut
    policy: str | None  # the policy that was applied; None: trainer and servers agreed


class Checkpointer:
    """Saves a trainer at regular steps, and brings it back.

    client      client of the trainer. From ``resume`` on, a push whose session is lost raises
                SessionExpired: the servers were restored, so the trainer must resume, too
    pipe        Pipeline, or anything else with pushes in progress, with a method ``flush`` that
                waits for them; None: each push is answered before ``at`` is called. It may be set
                later, as attribute ``pipe``, because a Pipeline is made with the step at which
                ``resume`` begins
    directory   directory for the dense state, which must survive a crash. Only rank 0 uses it
    every       training steps from one cut to the next
    keep        number of newest cuts to keep, at least 1; older ones are deleted, here and on the
                servers
    name        beginning of the names that the checkpoints have on the servers
    full_every  take one full checkpoint out of this many; the others contain only changes
    tables      names of the tables that the trainer pushes to: their steps tell how far the servers
                are; None: all tables of the cluster, which must all be those of this trainer
    ranks       the processes that train together; None: only this one. Rank 0 takes the
                checkpoints and saves. All ranks make the same calls with the same steps
    timeout     seconds that the servers wait for a cut. If it has not come by then, they give this
                checkpoint up

    If a checkpoint fails because a shard was lost, a warning goes to the logger "psclient", and the
    next cut takes another one. Errors that do not pass are raised by ``at``.

    waited   seconds that training has waited for servers that had not copied their rows yet
    failure  error of the newest cut; None: it succeeded, or is not complete yet
    """

    def __init__(
        self,
        client: Client,
        pipe: Flushes | None = None,
        *,
        directory: str | os.PathLike[str],
        every: int = 1000,
        keep: int = 3,
        name: str = "trainer",
        full_every: int = 1,
        tables: Iterable[str] | None = None,
        ranks: Ranks | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.waited = 0.0
        self.failure: PsError | None = None
        self._client = client
        self.pipe = pipe
        self._every = checked.integer("every", every, 1, STEPS)
        self._keep = checked.integer("keep", keep, 1, 1 << 20)
        self._name = checked.name("checkpoint", name)
        self._full_every = checked.integer("full_every", full_every, 1, 65)
        self._tables = None if tables is None else checked.names_of("tables", tables)
        self._ranks: Ranks = ranks or Alone()
        self._timeout = checked.seconds("timeout", timeout)
        self._directory = Directory(directory)
        self._pace = Pace(self._every, 0.0)
        self._writing: Writing | None = None
        self._partial: Path | None = None  # directory of the cut that is being taken
        self._pending: dict[int, list[SessionState]] = {}  # sessions of this rank at cuts, by step
        self._complete = 0  # step of the newest complete cut of this run
        self._newest: tuple[str, int] | None = None  # (its checkpoint, number of its ancestors)
        self._lineages: list[str] = []  # of the shards since ``resume``; []: not resumed yet
        self._last = 0  # step of the newest call of ``at``

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(Exception):
                self.close()

    def close(self) -> None:
        """Wait until the checkpoint of the last cut is complete. Give up one without a cut.

        Raises the error of a checkpoint that failed for good.
        """
        self._abandon(placed=False)
        if self._writing is not None:
            self._writing.join()
            self._collect()

    # ---- coming back

    def resume(self, policy: Policy | None = None) -> Start:
        """Find out where the trainer goes on, and prepare the servers. Call it before any push.

        policy  what to do if the servers are not where they were at the newest complete cut:
                "rewind": restore the servers' checkpoint of the cut. This undoes all pushes since,
                          also those of other trainers
                "once":   keep the rows. The trainer computes the batches since the cut again; their
                          pushes get their old numbers, so that each takes effect exactly once
                "ahead":  keep the rows. The trainer leaves out the batches since the cut, so that
                          the dense state never sees them
                None:     raise TrainerBehind

        If the directory is empty, the trainer begins at step 1, and the servers first take a
        checkpoint. Raises TrainerBehind, too, if the policy is not possible.
        """
        if policy is not None and policy not in behind.POLICIES:
            known = ", ".join(behind.POLICIES)
            raise InvalidArgument(f"policy must be one of {known} or None, got {policy!r}")
        if any(session.sequence for session in self._sessions()):
            raise InvalidArgument("resume must be called before the first push of the client")
        everybody = self._ranks.gather(self._sessions())
        state, gap, applied = on_rank_0(self._ranks, lambda: self._decide(policy, everybody))
        mine = state.ranks[self._ranks.rank]
        for link, at in zip(links(self._client), mine.sessions, strict=True):
            with link.lock:
                link.session.go_back(at.client_id, at.incarnation, at.sequence)
                link.session.renews = False
        self._complete, self._last = state.step, state.seen
        self._pace = Pace(self._every, state.seconds)
        self._lineages = [each.lineage for each in state.shards]
        return Start(
            step=state.seen + 1,
            path=self._directory.of(state.step) if state.step else None,
            position=mine.position,
            skip=state.seen - state.step,
            gap=gap,
            policy=applied,
        )

    def _decide(
        self, policy: Policy | None, everybody: list[list[SessionState]]
    ) -> tuple[TrainerState, int, str | None]:
        """Apply a policy. Returns (state from which the trainer goes on, gap, applied policy).

        everybody  the new sessions of all ranks, without pushes
        """
        state = self._directory.newest()
        if interrupted := behind.interrupted(self._client):
            if state is None or policy != "rewind" or interrupted != {state.checkpoint}:
                raise RestoreConflict(
                    f"a restore of {', '.join(sorted(interrupted))} was interrupted: resume with"
                    " policy 'rewind' if that is the checkpoint of the newest cut, or finish or"
                    " abort it (psctl restore)"
                )
            self._restore(state.checkpoint)
        self._clean()
        servers = behind.look(self._client, self._tables)
        if state is None:
            return self._first(everybody), 0, None
        gap = behind.gap_of(state, servers)
        applied = behind.require_policy(policy, state, servers, len(everybody))
        if applied in (None, "once"):
            return state, gap, applied
        if applied == "rewind":
            self._restore(state.checkpoint)
            state = replace(state, shards=behind.shards_of(self._client), seen=state.step)
        else:
            seen = max(state.seen, servers.step)
            state = replace(state, shards=servers.shards, seen=seen)
        state = replace(state, ranks=behind.renumbered(state, everybody))
        self._directory.change(state)
        log.info("trainer resumes at step %d: %s, gap of %d steps", state.seen + 1, applied, gap)
        return state, gap, applied

    def _first(self, everybody: list[list[SessionState]]) -> TrainerState:
        """Make the cut before the first step, of which there is no dense state; return it."""
        name, partial = self._new_partial(0)
        began = time.monotonic()
        info = checkpoint(self._client, name)
        seconds = time.monotonic() - began
        shards = [
            ShardState(each.lineage, version)
            for each, version in zip(behind.shards_of(self._client), info.versions, strict=True)
        ]
        ranks = [RankState(None, each) for each in everybody]
        state = TrainerState(0, shards, ranks, name, seconds=seconds)
        self._directory.complete(partial, state)
        return state

    def _new_partial(self, step: int) -> tuple[str, Path]:
        """Return (name of a new checkpoint, directory of its cut after ``step``)."""
        attempt = secrets.token_hex(4)
        name = f"{self._name}-{step:012}-{attempt}"
        return name, self._directory.partial(step, attempt, name)

    def _restore(self, name: str) -> None:
        """Restore the servers. Waits while they end what a trainer before has left unfinished."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                restore(self._client, name, replace=True)
                return
            except ResourceExhausted as error:
                if error.reason != "CHECKPOINT_BUSY" or time.monotonic() > deadline:
                    raise
            time.sleep(BUSY_PAUSE)

    def _clean(self) -> None:
        """Remove what interrupted cuts have left, here and on the servers."""
        for path, name in self._directory.partials():
            try:
                if name:
                    pruning.delete(self._client, name)
            except CheckpointNotFound:
                pass
            except PsError as error:
                log.warning("checkpoint %s of an interrupted cut remains: %s", name, error)
                continue
            self._directory.remove(path)

    # ---- cuts

    def at(self, step: int, *, save: Save, position: Any = None, now: bool = False) -> bool:
        """Note that all pushes of a training step were made; make a cut if its time has come.

        step      the step, as given to ``push``; larger than that of the previous call
        save      called at a cut, on rank 0, with a directory into which it writes the dense state:
                  model, optimizer, scheduler, scaler. It must return when the files are written
        position  where this rank stands in its data after this step: numbers, texts, lists and
                  objects, as in JSON. None if the step tells it
        now       make a cut after this step, although it is not a multiple of ``every``

        Returns whether there was a cut. Raises what ``save`` and the flush of pushes raise.
        """
        if not self._lineages:
            raise InvalidArgument("resume must be called before at")
        require_json("position", position)
        self._last = checked.integer("step", step, self._last + 1, STEPS)
        first, due = self._ranks.rank == 0, now or step % self._every == 0
        if first:
            self._collect()
            begins = self._pace.begins(step)
            if begins and self._writing is None and not due:
                self._begin(step + (-step) % self._every)
        if due:
            self._cut(step, save, position)
        return due

    def _cut(self, step: int, save: Save, position: Any) -> None:
        """Wait for the pushes of all ranks, place the barrier, and save. All ranks call it."""
        ranks = self._drained(step, position)
        told = on_rank_0(self._ranks, lambda: self._placed(step))
        if told is None:
            return
        shards, complete = told
        self._pending[step] = ranks[self._ranks.rank].sessions
        self._hold(complete)
        if self._ranks.rank == 0:
            self._save(step, shards, ranks, save)

    def _drained(self, step: int, position: Any) -> list[RankState]:
        """Wait until the pushes of all ranks are answered; return where each rank stands.

        Raises the error of a push, on all ranks.
        """
        failure: Exception | None = None
        try:
            if self.pipe is not None:
                self.pipe.flush()
        except Exception as error:
            failure = error
        everybody = self._ranks.gather((step, RankState(position, self._sessions()), failure))
        failures = [error for _, _, error in everybody if error is not None]
        if failures:
            self._abandon(placed=False)
            raise failure or failures[0]
        steps = [each for each, _, _ in everybody]
        if len(set(steps)) > 1:
            self._abandon(placed=False)
            raise InvalidArgument(f"step must be equal on all ranks, got {steps}")
        return [each for _, each, _ in everybody]

    def _placed(self, step: int) -> tuple[list[ShardState], int] | None:
        """Place the barrier of a cut, once all shards have copied their rows. Runs on rank 0.

        Returns (the shards at the barrier, step of the newest complete cut), or None if the shards
        do not take a checkpoint because of an error that may pass.
        """
        for _ in range(ATTEMPTS):
            began = time.monotonic()
            writing = self._writing
            if writing is not None and writing.placed:  # of the cut before
                writing.join()
                self._collect()
            writing = self._writing or self._begin(step)
            try:
                writing.ready()
                self.waited += time.monotonic() - began
                now = behind.shards_of(self._client)
                if [each.lineage for each in now] != self._lineages:
                    raise LogDiverged(
                        "the servers were restored while the trainer ran: start the trainer again,"
                        " with Checkpointer.resume"
                    )
                versions = self._client.barrier(writing.name)
            except BaseException as error:
                self._abandon()
                self._note(error)
            else:
                writing.placed = True
                self._pace.seconds = writing.copied
                shards = [
                    ShardState(each.lineage, version)
                    for each, version in zip(now, versions, strict=True)
                ]
                return shards, self._complete
        return None

    def _begin(self, step: int) -> Writing:
        """Let the servers begin to copy their rows for the cut after ``step``."""
        name, self._partial = self._new_partial(step)
        parent = None
        if self._newest is not None and self._newest[1] + 1 < self._full_every:
            parent = self._newest[0]
        self._writing = Writing(self._client, name, parent, self._timeout)
        return self._writing

    def _save(
        self, step: int, shards: list[ShardState], ranks: list[RankState], save: Save
    ) -> None:
        """Save the dense state, and let the background thread complete the cut."""
        writing, partial = self._writing, self._partial
        assert writing is not None
        assert partial is not None
        try:
            save(partial)
        except BaseException:
            self._abandon()
            raise

        def finish(info: CheckpointInfo) -> None:
            at = [
                replace(each, version=version)
                for each, version in zip(shards, info.versions, strict=True)
            ]
            state = TrainerState(step, at, ranks, info.name, seen=step, seconds=writing.copied)
            self._directory.complete(partial, state)
            try:
                self._prune()
            except Exception as error:
                log.warning("old cuts remain: %s", error)

        writing.finish(finish)

    def _collect(self) -> None:
        """Take note of a checkpoint that has ended. Raises its error, unless that may pass."""
        writing = self._writing
        if writing is None or not writing.ended:
            return
        self._writing = None
        if writing.error is not None:
            if writing.stored:  # the next ``resume`` finds out whether the cut is complete
                self._partial = None
            self._discard()
            self._note(writing.error)
            return
        self.failure, self._partial = None, None
        older = 0 if writing.full or self._newest is None else self._newest[1] + 1
        self._newest = writing.name, older
        self._complete = max(self._pending, default=self._complete)
        self._hold(self._complete)

    def _abandon(self, *, placed: bool = True) -> None:
        """Give up the checkpoint that is being taken, if there is one.

        placed  whether also if its barrier was placed
        """
        writing = self._writing
        if writing is not None and (placed or not writing.placed):
            self._writing = None
            writing.give_up()
            self._discard()

    def _discard(self) -> None:
        """Remove the directory of a cut that failed."""
        partial, self._partial = self._partial, None
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)

    def _note(self, error: BaseException) -> None:
        """Log an error of a cut that may pass; raise any other."""
        if not isinstance(error, PASSING):
            raise error
        self.failure = error
        log.warning("no checkpoint of this cut: %s", error)

    def _prune(self) -> None:
        """Delete the cuts before the newest ``keep``, here and on the servers; the newest first,
        because others may build on older ones. One that another one needs, stays.
        """
        for step in reversed(self._directory.steps()[: -self._keep]):
            name = self._directory.read(step).checkpoint
            try:
                pruning.delete(self._client, name)
            except CheckpointNotFound:
                pass
            except (CheckpointNeeded, *PASSING) as error:
                log.info("checkpoint %s remains: %s", name, error)
                continue
            self._directory.remove(self._directory.of(step))

    # ---- sessions

    def _sessions(self) -> list[SessionState]:
        """Return the numbers of the last pushes of this rank, by shard."""
        found = []
        for link in links(self._client):
            with link.lock:
                found.append(SessionState(**link.session.state()))
        return found

    def _hold(self, complete: int) -> None:
        """Let the shards forget the pushes up to the cut after step ``complete``."""
        if complete in self._pending:
            for link, at in zip(links(self._client), self._pending[complete], strict=True):
                with link.lock:
                    link.session.held = at.sequence
            self._pending = {step: each for step, each in self._pending.items() if step > complete}
