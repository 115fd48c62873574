"""The state of a restore on disk, and the directories that it swaps.

    data directory  = LOCK  SHARD  log/  base/  restore/
    restore/        = STATE                     the phase that is reached (sealed.py)
                    | base/                     the staged base; complete once STATE exists
                    | old/base/  old/log/       the live data from before the restore
                    | dead/base/  dead/log/     the restored data of a restore that was undone

    PREPARED -- HOLD --> HELD -- COMMIT --> COMMITTED -- start --> LOADED -- RELEASE --> RELEASED
                                                     `-- start --> FAILED
    PREPARED, HELD, FAILED -- ABORT --> ABORTED
    COMMITTED, LOADED -- ABORT --> ABORTING -- start --> ABORTED

COMMIT and ABORT write STATE and restart the process. ``settle`` then moves the directories, before
anything in them is opened. It repeats the moves that a crash has interrupted. A start that cannot
load the restored data, for example because memory does not suffice, moves the old data back.

From HELD to the end the shard refuses work. So no client sees some shards restored and others not.
STATE stays after the end: a client that finds other shards in the middle of the restore reads from
it whether the restore was released or undone.

The restored shard begins a new lineage, at the largest version of the checkpoint, with an empty
log. This version may be below the shard's version before the restore. Tokens of subscribers from
before are refused. Sessions of clients are restored if the cluster has the shards that the
checkpoint was taken of. Otherwise a push that a client repeats may be refused with SESSION_EXPIRED.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from storage.base import DATA
from storage.disk import read_file, replace, sync
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
    """How far a restore is: the contents of STATE."""

    __pydantic_config__ = STRICT
    format: Format = FORMAT
    id: Attempt
    name: Name  # of the checkpoint
    replace: bool  # existing tables may be deleted
    phase: Phase
    why: str = ""  # the error, if it failed


def settle(directory: Path) -> State | None:
    """Finish the moves that a restore has begun, before anything in the directory is opened.

    Returns the state afterwards, None if there was no restore. COMMITTED means that the restored
    data is in place and must be loaded. FAILED means that it is lost and the old data is back.

    Raises Corrupt if STATE is damaged, or missing while the old data is still moved away.
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
    """Record that the restored data was loaded."""
    state = dataclasses.replace(state, phase=LOADED)
    write_state(directory, state)
    return state


def failed(directory: Path, state: State, why: str) -> State:
    """Bring the old data back because the restored data could not be loaded."""
    write_state(directory, dataclasses.replace(state, phase=ABORTING, why=why))
    _take_back(directory)
    state = dataclasses.replace(state, phase=FAILED, why=why)
    write_state(directory, state)
    return state


def _exchange(directory: Path) -> None:
    """Move base and log to old/, then the staged base to its place. Repeats no move."""
    restore = directory / "restore"
    if not (restore / "base").exists():
        return
    for name in ("base", "log"):
        if (directory / name).exists() and not (restore / "old" / name).exists():
            _move(directory / name, restore / "old" / name)
    _move(restore / "base", directory / "base")


def _take_back(directory: Path) -> None:
    """Move the restored data to dead/, and the old data back. Repeats no move."""
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
    """Raise Corrupt if base or log were moved although STATE, which says how far, is missing."""
    for path in (restore / of / name for of in ("old", "dead") for name in ("base", "log")):
        if path.exists():
            raise Corrupt(str(restore / "STATE"), f"is missing, but {path} was moved by a restore")


def clear(directory: Path) -> None:
    """Remove everything of the restore. STATE goes after the directories that need it."""
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
    """Remove everything of the restore but STATE."""
    for name in ("base", "old", "dead"):
        shutil.rmtree(directory / "restore" / name, ignore_errors=True)


def read_state(directory: Path) -> State | None:
    """Read STATE; None if there is none."""
    path = directory / "restore" / "STATE"
    if not path.exists():
        return None
    return unseal(State, read_file(path), str(path))


def write_state(directory: Path, state: State) -> None:
    """Replace STATE atomically, and sync it."""
    path = directory / "restore" / "STATE"
    path.parent.mkdir(exist_ok=True)
    replace(path, seal(state))
    sync(directory)
