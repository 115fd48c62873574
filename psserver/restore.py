"""A shard's state replaced by a checkpoint's: all of it or nothing, wherever the process dies.

    data directory  = LOCK  SHARD  log/  base/  restore/
    restore/        = STATE                     which step is reached (checkpoint.py's JSON)
                    | base/                     what is to take the place of base/; complete once
                                                STATE is there
                    | old/base/  old/log/       what it took the place of
                    | dead/base/  dead/log/     what was given up again

    PREPARED -- HOLD --> HELD -- COMMIT --> COMMITTED -- start --> LOADED -- RELEASE --> RELEASED
                                                     `-- start --> FAILED
    PREPARED, HELD, FAILED -- ABORT --> ABORTED
    COMMITTED, LOADED -- ABORT --> ABORTING -- start --> ABORTED

Steps that exchange base and log write STATE and start the process anew; the directories are moved
before anything is opened (``settle``), each move when it is found not to have happened. A start
that cannot load what was restored, because it needs more memory than there is, moves everything
back. From HELD to the end the shard refuses work, so that no client meets restored shards beside
others. STATE stays when it is over, so that whoever finds other shards on their way knows whether
it was on to the end or back.

What is restored begins a new lineage, at the largest version of the checkpoint, which may be below
the shard's: tokens of subscribers are of another history, and so are their versions. Its log is
empty. Sessions of clients are kept if the cluster has the shards that it had; else a client whose
repetition cannot be told is refused with SESSION_EXPIRED.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psserver.checkpoints import (
    Checkpoints,
    Progress,
    overlapping,
    own,
    require_id,
    require_name,
    require_width,
    runs,
    schema_of,
)
from psserver.engine import Engine
from psserver.errors import NoLog, NotEmpty, RestoreConflict
from psserver.schemas import to_json
from psserver.shard import Shard
from storage import checkpoint as files
from storage.base import DATA, Base
from storage.basestate import BaseState, BaseTable
from storage.block import Block, pack_counters, rows_per_block, tombstones_per_block
from storage.checkpoint import Checkpoint, Piece
from storage.disk import replace, sync
from storage.errors import Corrupt
from storage.kernels import Keys

Step = pb.RestoreRequest
PREPARED, HELD, COMMITTED = "prepared", "held", "committed"
LOADED, FAILED, ABORTING = "loaded", "failed", "aborting"
RELEASED, ABORTED = "released", "aborted"
OVER = (RELEASED, ABORTED)
AHEAD_BLOCKS = 24  # packed and not yet written: more than go into a transaction
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


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a restore is."""

    id: str
    name: str  # of the checkpoint
    replace: bool  # tables that are there may go
    phase: str
    why: str = ""  # it failed


class Restores:
    """The restore of one shard, if one is under way. Thread-safe.

    directory  the shard's data directory; None: there is nothing to restore into
    state      as ``settle`` found it
    restart    makes the process start anew; called on any thread, returns at once
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        checkpoints: Checkpoints,
        directory: Path | None,
        state: State | None,
        restart: Callable[[], None],
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._checkpoints = checkpoints
        self._directory = directory
        self._restart = restart
        self._state = state
        self._changing = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether the shard must refuse work."""
        state = self._state
        return state is not None and state.phase not in (PREPARED, *OVER)

    def prepare(
        self, request: pb.PrepareRestoreRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Write what is to be restored beside what is there."""
        name, id = require_name(request.name), require_id("id", request.id)
        if self._directory is None:
            raise NoLog
        with self._checkpoints.alone():
            state = self._state
            if self.held:
                assert state is not None
                raise RestoreConflict(
                    f"restore {state.id} of {state.name!r} is {state.phase}: finish or abort it"
                )
            self._require_empty(request.replace)
            self._state = None
            _clear(self._directory)
            try:
                rows = self._stage(self._checkpoints.open(name), progress)
            except BaseException:
                _clear(self._directory)  # the room may be wanted
                raise
            self._reach(State(id=id, name=name, replace=request.replace, phase=PREPARED))
        return pb.CheckpointProgress(bytes=progress.bytes, total=progress.total, rows=rows)

    def step(self, request: pb.RestoreRequest) -> pb.RestoreStatus:
        """Take a step, unless it is taken already."""
        with self._changing:
            state = self._state
            if state is not None and state.id == request.id:
                if request.step != Step.STEP_UNSPECIFIED:
                    self._take(request.step, state)
            elif request.step in (Step.STEP_HOLD, Step.STEP_COMMIT) or (
                self.held and request.step != Step.STEP_UNSPECIFIED
            ):
                raise RestoreConflict(f"restore {request.id[:16]!r} is not under way here")
            return self._status()

    def _take(self, step: int, state: State) -> None:
        match step, state.phase:
            case (Step.STEP_HOLD, "prepared"):
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
        self._reach(dataclasses.replace(state, phase=HELD))  # from here on nothing is begun
        try:
            self._require_empty(state.replace)  # by now: behind all that was begun before
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
        _write_state(self._directory, state)
        self._state = state

    def _end(self, state: State) -> None:
        assert self._directory is not None
        _write_state(self._directory, state)
        _clean(self._directory)
        self._state = state

    # ---- what is to be restored

    def _stage(self, checkpoint: Checkpoint, progress: Progress) -> int:
        """Make a base of this shard's rows in a checkpoint; how many they are."""
        assert self._directory is not None
        manifest, shard = checkpoint.manifest, self._shard
        schemas = {table.name: schema_of(checkpoint, table.schema) for table in manifest.tables}
        numbers = {name: number for number, name in enumerate(sorted(schemas), 1)}
        version = max(manifest.versions)
        parts = overlapping(checkpoint, shard)
        progress.total = sum(each.parts[p].bytes for each in checkpoint.chain for p in parts)
        with _Writer(self._directory / "restore" / "base") as writer:
            packers = {
                name: _Packer(numbers[name], schema.width, writer)
                for name, schema in schemas.items()
            }
            for p in parts:
                of = {table.number: table.name for table in checkpoint.parts[p].tables}
                rows = files.rows_of(self._checkpoints.store, checkpoint, p, of, progress.tell)
                for piece in rows:
                    name = of[piece.table]
                    require_width(checkpoint, schemas[name], piece.rows)
                    packers[name].add(piece, own(piece.keys, shard))
            for packer in packers.values():
                packer.flush()
            for p in parts:
                of = {table.number: table.name for table in checkpoint.parts[p].tables}
                store = self._checkpoints.store
                waiting = files.counters_of(store, checkpoint, p, of, progress.tell)
                for number, keys, totals, versions in waiting:
                    mine = own(keys, shard)
                    arrays = keys[mine], totals[mine], versions[mine]
                    writer.counters(numbers[of[number]], *arrays)
            writer.commit(
                BaseState(
                    lineage=os.urandom(16),
                    epoch=1,
                    version=version,
                    next_table=len(numbers) + 1,
                    tables=tuple(
                        BaseTable(number=number, schema=_text(schemas[name]), created=version)
                        for name, number in numbers.items()
                    ),
                    horizon=version,
                    sessions=self._sessions(checkpoint),
                )
            )
        return sum(packer.rows for packer in packers.values())

    def _sessions(self, checkpoint: Checkpoint) -> bytes:
        """The sessions of this shard, if the checkpoint is of the same shards."""
        shard = self._shard
        if len(checkpoint.parts) != shard.shard_map.shards:
            return b""
        part = checkpoint.parts[shard.number]
        if part.buckets != runs(shard):
            return b""
        read = (
            files.read_file(self._checkpoints.store, checkpoint.manifest.name, file)
            for file in part.sessions
        )
        return b"".join(read)


class _Writer:
    """A new base, written by a thread of its own: its syncs take as long as all the rest."""

    def __init__(self, directory: Path) -> None:
        self._base = Base(directory)
        self._thread = ThreadPoolExecutor(1, "restore writer")
        self._begun: deque[Future[int]] = deque()
        self._added: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._thread.submit(self._base.open).result()
        except BaseException:
            self._thread.shutdown()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in self._begun:
            each.cancel()
        self._thread.submit(self._base.close).result()
        self._thread.shutdown()

    def add(self, block: Block) -> None:
        """Store a block, whose arrays nobody changes any more."""
        data = block.seal()
        self._begun.append(self._thread.submit(self._base.add, data))
        if len(self._begun) > AHEAD_BLOCKS:
            self._added.append(self._begun.popleft().result())

    def counters(
        self,
        table: int,
        keys: Keys,
        totals: NDArray[np.uint32],
        versions: NDArray[np.uint64],
    ) -> None:
        """Store counters, as many blocks as they take."""
        most = tombstones_per_block()
        for at in range(0, len(keys), most):
            part = slice(at, at + most)
            block = pack_counters(table, keys[part], versions[part], totals[part])
            self._begun.append(self._thread.submit(self._base.add, block))

    def commit(self, state: BaseState) -> None:
        """Commit the state with all that was added."""
        self._added += [each.result() for each in self._begun]
        self._begun.clear()
        whole = dataclasses.replace(state, blocks=tuple(self._added))
        self._thread.submit(self._base.commit, whole).result()


class _Packer:
    """Full blocks of one table's rows, out of pieces of any size."""

    def __init__(self, number: int, width: int, writer: _Writer) -> None:
        self.rows = 0
        self._writer = writer
        self._most = rows_per_block(width)
        self._number, self._width = number, width
        self._block: Block | None = None
        self._used = 0

    def add(self, piece: Piece, chosen: Any) -> None:
        """Take the chosen rows of a piece."""
        arrays = [each[chosen] for each in piece[1:]]
        at, end = 0, len(arrays[0])
        self.rows += end
        while at < end:
            if self._block is None:
                self._block = Block.empty(self._number, self._width, self._most)
            n = min(end - at, self._most - self._used)
            for target, array in zip(_arrays(self._block), arrays, strict=True):
                target[self._used : self._used + n] = array[at : at + n]
            at, self._used = at + n, self._used + n
            if self._used == self._most:
                self._writer.add(self._block)
                self._block, self._used = None, 0

    def flush(self) -> None:
        """Add the block that is not full."""
        if self._block is not None and self._used:
            rest = Block.empty(self._number, self._width, self._used)
            for target, array in zip(_arrays(rest), _arrays(self._block), strict=True):
                target[:] = array[: self._used]
            self._writer.add(rest)
        self._block, self._used = None, 0


def _arrays(block: Block) -> tuple[Any, ...]:
    return block.keys, block.versions, block.steps, block.frequencies, block.rows


def _text(schema: Any) -> str:
    return json.dumps(to_json(schema), sort_keys=True)


# ---- directories


def settle(directory: Path) -> State | None:
    """Finish what a restore has begun in a data directory, before anything in it is opened.

    Returns its state then: COMMITTED says that what was restored is in place and has to be loaded,
    FAILED that it is lost.
    Raises Corrupt if STATE is damaged, or gone from between two steps.
    """
    state = _read_state(directory)
    if state is None:
        _require_unmoved(directory / "restore")
        _clear(directory)
    elif state.phase == COMMITTED:
        _exchange(directory)
        if not (directory / "base" / DATA).exists():  # it would be taken for a new one
            state = failed(directory, state, f"{directory / 'base' / DATA} is gone")
    elif state.phase == ABORTING:
        _take_back(directory)
        state = dataclasses.replace(state, phase=ABORTED)
        _write_state(directory, state)
    if state is not None and state.phase in OVER:
        _clean(directory)
    return state


def loaded(directory: Path, state: State) -> State:
    """Note that what was restored could be loaded."""
    state = dataclasses.replace(state, phase=LOADED)
    _write_state(directory, state)
    return state


def failed(directory: Path, state: State, why: str) -> State:
    """Bring back what was there before, because what was restored could not be loaded."""
    _write_state(directory, dataclasses.replace(state, phase=ABORTING, why=why))
    _take_back(directory)
    state = dataclasses.replace(state, phase=FAILED, why=why)
    _write_state(directory, state)
    return state


def _exchange(directory: Path) -> None:
    """Move base and log to old/, then what was restored to its place: as far as not done yet."""
    restore = directory / "restore"
    if not (restore / "base").exists():
        return
    for name in ("base", "log"):
        if (directory / name).exists() and not (restore / "old" / name).exists():
            _move(directory / name, restore / "old" / name)
    _move(restore / "base", directory / "base")


def _take_back(directory: Path) -> None:
    """Move what was restored to dead/, and old/ back: as far as it was ever moved there."""
    restore = directory / "restore"
    _exchange(directory)
    for name in ("log", "base"):
        if (restore / "old" / name).exists():
            if (directory / name).exists():
                _move(directory / name, restore / "dead" / name)
            _move(restore / "old" / name, directory / name)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    os.rename(source, target)
    for parent in {source.parent, target.parent, target.parent.parent}:
        sync(parent)


def _require_unmoved(restore: Path) -> None:
    """Corrupt if base or log were moved, and nothing says how far that went."""
    for path in (restore / of / name for of in ("old", "dead") for name in ("base", "log")):
        if path.exists():
            raise Corrupt(str(restore / "STATE"), f"is gone, but {path} was moved by a restore")


def _clear(directory: Path) -> None:
    """Forget the restore: STATE behind what has a meaning with it only."""
    restore = directory / "restore"
    if restore.exists():
        for name in ("old", "dead"):
            if (restore / name).exists():
                shutil.rmtree(restore / name)
        sync(restore)
        (restore / "STATE").unlink(missing_ok=True)
        sync(restore)
        shutil.rmtree(restore)


def _clean(directory: Path) -> None:
    """Keep STATE alone."""
    for name in ("base", "old", "dead"):
        shutil.rmtree(directory / "restore" / name, ignore_errors=True)


def _read_state(directory: Path) -> State | None:
    path = directory / "restore" / "STATE"
    if not path.exists():
        return None
    return State(**files.from_json(path.read_bytes(), str(path)))


def _write_state(directory: Path, state: State) -> None:
    path = directory / "restore" / "STATE"
    path.parent.mkdir(exist_ok=True)
    replace(path, files.to_json(files.facts(state)))
    sync(directory)
