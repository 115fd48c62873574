"""Store the phase of a restore on disk, and swap the directories of live and restored data.

    data directory  = LOCK  SHARD  log/  base/  restore/
    restore/        = STATE                     the restore's phase, with a checksum (sealed.py)
                    | base/                     the staged base; complete once STATE exists
                    | old/base/  old/log/       the live data from before the restore
                    | dead/base/  dead/log/     restored data that an abort removed again

    PREPARED -- HOLD --> HELD -- COMMIT --> COMMITTED -- start --> LOADED -- RELEASE --> RELEASED
                                                     `-- start --> FAILED
    PREPARED, HELD, FAILED -- ABORT --> ABORTED
    COMMITTED, LOADED -- ABORT --> ABORTING -- start --> ABORTED

The words on the arrows are requests that the client which drives the restore sends to every shard,
except "start", which is a start of the server. COMMIT, and ABORT after COMMIT, write STATE and
restart the process. At the start, ``settle`` moves the directories before any of them is opened,
and completes moves that a crash has interrupted. If the restored data cannot be loaded, for example
for lack of memory, the old data is moved back (FAILED).

From HELD until RELEASED or ABORTED, the shard refuses all other requests. So no client sees some
shards restored and others not. STATE is kept after the end: a client that finds other shards in the
middle of the restore learns from it whether the restore was released or aborted.

The restored shard has an empty log with a new lineage (random id), which begins at the largest
version of the checkpoint. This version may be older than the shard's version before the restore.
Subscribers' tokens from before the restore are refused. Client sessions (records of applied pushes)
are restored if the checkpointed cluster had the same shards. Otherwise the retry of an earlier push
may be refused with SESSION_EXPIRED.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from storage.disk import read_file, replace, sync
from storage.emptybase import DATA
from storage.errors import Corrupt
from storage.manifest import Attempt, Format, Name
from storage.sealed import FORMAT, STRICT, seal, unseal

PREPARED: Final = "prepared"
HELD: Final = "held"
COMMITTED: Final = "committed"
LOADED: Final = "loaded"
FAILED: Final = "failed"
ABORTING: Final = "aborting"
RELEASED: Final = "released"
ABORTED: Final = "aborted"
OVER = (RELEASED, ABORTED)
Phase = Literal[
    "prepared", "held", "committed", "loaded", "failed", "aborting", "released", "aborted"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Contents of the file STATE: the restore's checkpoint and phase."""

    __pydantic_config__ = STRICT
    format: Format = FORMAT
    id: Attempt  # id of the restore: 16 hexadecimal digits
    name: Name  # name of the checkpoint
    replace: bool  # whether the restore may delete existing tables
    phase: Phase  # the module docstring explains the phases
    why: str = ""  # the error, if loading the restored data failed


def settle(directory: Path) -> State | None:
    """Complete the moves of a restore. Call it when the server starts, before it opens log/ and
    base/.

    directory  data directory

    Returns the state of the restore afterwards, or None if there is no restore. If its phase is
    COMMITTED, the restored data is in place, and the caller must load it. If it is FAILED, the
    restored data was lost, and the old data is back in place. Raises Corrupt if STATE is damaged,
    or missing although data was moved.
    """
    state = read_state(directory)
    if state is None:
        _require_unmoved(directory / "restore")
        clear(directory)
    elif state.phase == COMMITTED:
        _exchange(directory)
        if not (directory / "base" / DATA).exists():  # without it an empty base would be created
            state = failed(directory, state, f"{directory / 'base' / DATA} is gone")
    elif state.phase == ABORTING:
        _take_back(directory)
        state = dataclasses.replace(state, phase=ABORTED)
        write_state(directory, state)
    if state is not None and state.phase in OVER:
        clean(directory)
    return state


def loaded(directory: Path, state: State) -> State:
    """Set the phase to LOADED in the file STATE, and return the new state.

    Call it after the restored data was loaded.

    directory  data directory
    state      the state so far
    """
    state = dataclasses.replace(state, phase=LOADED)
    write_state(directory, state)
    return state


def failed(directory: Path, state: State, why: str) -> State:
    """Move the old data back because the restored data could not be loaded. Return the new state,
    with phase FAILED.

    directory  data directory
    state      the state so far
    why        the error, shown to the client
    """
    write_state(directory, dataclasses.replace(state, phase=ABORTING, why=why))
    _take_back(directory)
    state = dataclasses.replace(state, phase=FAILED, why=why)
    write_state(directory, state)
    return state


def _exchange(directory: Path) -> None:
    """Move base/ and log/ to restore/old/, then the staged base to base/. Skips moves that were
    done before a crash.

    directory  data directory
    """
    restore = directory / "restore"
    if not (restore / "base").exists():
        return
    for name in ("base", "log"):
        if (directory / name).exists() and not (restore / "old" / name).exists():
            _move(directory / name, restore / "old" / name)
    _move(restore / "base", directory / "base")


def _take_back(directory: Path) -> None:
    """Move the restored data to restore/dead/, and the old data back to base/ and log/. Skips moves
    that were done before a crash.

    directory  data directory
    """
    restore = directory / "restore"
    _exchange(directory)
    for name in ("log", "base"):
        if (restore / "old" / name).exists():
            if (directory / name).exists():
                _move(directory / name, restore / "dead" / name)
            _move(restore / "old" / name, directory / name)


def _move(source: Path, target: Path) -> None:
    """Rename a directory. Syncs the directories around it, so that a crash cannot undo the move."""
    target.parent.mkdir(exist_ok=True)
    os.rename(source, target)
    for parent in {source.parent, target.parent, target.parent.parent}:
        sync(parent)


def _require_unmoved(restore: Path) -> None:
    """Raise Corrupt if data that a restore has moved is in ``restore``. Called if the file STATE is
    missing, without which the data cannot be moved to its place.

    restore  the directory restore/ of the data directory
    """
    for path in (restore / of / name for of in ("old", "dead") for name in ("base", "log")):
        if path.exists():
            raise Corrupt(
                str(restore / "STATE"),
                f"the file is missing, but a restore has moved data to {path}",
            )


def clear(directory: Path) -> None:
    """Delete directory/restore/: first the data that a restore has moved, then STATE.

    In the other order, a crash in between would leave moved data without STATE, which the next
    start refuses as damaged.

    directory  data directory
    """
    restore = directory / "restore"
    if restore.exists():
        for name in ("old", "dead"):
            if (restore / name).exists():
                shutil.rmtree(restore / name)
        sync(restore)
        (restore / "STATE").unlink(missing_ok=True)
        sync(restore)
        shutil.rmtree(restore)


def clean(directory: Path) -> None:
    """Delete all of directory/restore/ except the file STATE.

    directory  data directory
    """
    for name in ("base", "old", "dead"):
        shutil.rmtree(directory / "restore" / name, ignore_errors=True)


def read_state(directory: Path) -> State | None:
    """Return the contents of the file STATE, or None if it does not exist.

    directory  data directory

    Raises Corrupt if the file is damaged.
    """
    path = directory / "restore" / "STATE"
    if not path.exists():
        return None
    return unseal(State, read_file(path), str(path))


def write_state(directory: Path, state: State) -> None:
    """Write the file STATE atomically: after a crash it has either the old or the new contents.

    directory  data directory
    """
    path = directory / "restore" / "STATE"
    path.parent.mkdir(exist_ok=True)
    replace(path, seal(state))
    sync(directory)
