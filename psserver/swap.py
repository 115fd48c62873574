"""How far a restore is in a data directory, and the directories that it moves.

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
    """Finish what a restore has begun in a data directory, before anything in it is opened.

    Returns its state then: COMMITTED says that what was restored is in place and has to be loaded,
    FAILED that it is lost.
    Raises Corrupt if STATE is damaged, or gone from between two steps.
    """
    state = read_state(directory)
    if state is None:
        _require_unmoved(directory / "restore")
        clear(directory)
    elif state.phase == COMMITTED:
        _exchange(directory)
        if not (directory / "base" / DATA).exists():  # it would be taken for a new one
            state = failed(directory, state, f"{directory / 'base' / DATA} is gone")
    elif state.phase == ABORTING:
        _take_back(directory)
        state = dataclasses.replace(state, phase=ABORTED)
        write_state(directory, state)
    if state is not None and state.phase in OVER:
        clean(directory)
    return state


def loaded(directory: Path, state: State) -> State:
    """Note that what was restored could be loaded."""
    state = dataclasses.replace(state, phase=LOADED)
    write_state(directory, state)
    return state


def failed(directory: Path, state: State, why: str) -> State:
    """Bring back what was there before, because what was restored could not be loaded."""
    write_state(directory, dataclasses.replace(state, phase=ABORTING, why=why))
    _take_back(directory)
    state = dataclasses.replace(state, phase=FAILED, why=why)
    write_state(directory, state)
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


def clear(directory: Path) -> None:
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


def clean(directory: Path) -> None:
    """Keep STATE alone."""
    for name in ("base", "old", "dead"):
        shutil.rmtree(directory / "restore" / name, ignore_errors=True)


def read_state(directory: Path) -> State | None:
    path = directory / "restore" / "STATE"
    if not path.exists():
        return None
    return unseal(State, read_file(path), str(path))


def write_state(directory: Path, state: State) -> None:
    path = directory / "restore" / "STATE"
    path.parent.mkdir(exist_ok=True)
    replace(path, seal(state))
    sync(directory)
