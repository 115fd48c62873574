"""The files of a Checkpointer: what a trainer needs to come back, one directory per cut.

    directory    = step-N/*  .partial-*/*
    step-N/      = STATE  CHECKPOINT  the files that the caller's ``save`` wrote
    .partial-*/  = the same, incomplete: while it is written, or deleted
    CHECKPOINT   = the name of the servers' checkpoint of this moment

A cut is the moment between two training steps at which the dense state was saved and a barrier was
placed on the servers. ``step-N`` gets its name once the servers have completed the checkpoint that
ends at this barrier, and everything in the directory is on disk. So it exists completely or not
at all. ``step-000000000000`` is the moment before the first training step, without files of
``save``. STATE is JSON with a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from psclient.errors import DataLoss, InvalidArgument

FORMAT = 1
STATE, CHECKPOINT = "STATE", "CHECKPOINT"
_NOTHING = object()  # no value that JSON can store
NAME = re.compile(r"step-(\d{12})")


@dataclass(frozen=True, slots=True)
class SessionState:
    """The numbers of one client's pushes to one shard; see PushHeader in ps.proto."""

    client_id: int
    incarnation: int
    sequence: int  # number of the last push; 0: there was none


@dataclass(frozen=True, slots=True)
class RankState:
    """What one rank (one process of the trainer) has at a cut."""

    position: Any  # where the rank stands in its data: the caller's value, as JSON
    sessions: list[SessionState]  # one per shard


@dataclass(frozen=True, slots=True)
class ShardState:
    """Where a shard stands at a cut."""

    lineage: str  # random id of its version log, in hexadecimal digits
    version: int


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Everything that is known about a trainer and its servers at one cut."""

    step: int  # last training step before the cut; 0: none was done
    shards: list[ShardState]
    ranks: list[RankState]
    checkpoint: str  # name of the servers' checkpoint
    seen: int = 0  # last step whose pushes are in the rows but not to be replayed; see "ahead"
    seconds: float = 0.0  # how long the servers took to copy their rows, for the next cut
    files: dict[str, int] = field(default_factory=dict)  # size of each file that ``save`` wrote


class Directory:
    """The directory of a Checkpointer. Only one process may use it at a time.

    path  where it is; created if it does not exist
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(
                f"directory: {str(self.path)!r} cannot be created: {error.strerror}"
            ) from error

    def of(self, step: int) -> Path:
        """Return the directory of the cut after training step ``step``."""
        return self.path / f"step-{step:012}"

    def steps(self) -> list[int]:
        """Return the steps of all complete cuts, ascending."""
        found = (NAME.fullmatch(each.name) for each in self.path.iterdir())
        return sorted(int(each.group(1)) for each in found if each)

    def newest(self) -> TrainerState | None:
        """Return the state at the newest complete cut; None: there is none.

        Raises DataLoss if a file is missing or damaged.
        """
        steps = self.steps()
        return self.read(steps[-1]) if steps else None

    def read(self, step: int) -> TrainerState:
        """Return the state at the complete cut after ``step``, after checking that all its files
        exist and have the size that they had. Raises DataLoss.
        """
        at = self.of(step)
        path = at / STATE
        if not path.exists():
            raise DataLoss(f"{path} is missing: remove {at} to use an older cut")
        state = _decode(path, path.read_bytes())
        for name, size in state.files.items():
            found = at / name
            if not found.is_file() or found.stat().st_size != size:
                raise DataLoss(
                    f"{found} is missing, or has not the {size} bytes that it was saved with:"
                    f" remove {at} to use an older cut"
                )
        return state

    def change(self, state: TrainerState) -> None:
        """Replace the stored state of a complete cut, durably."""
        at = self.of(state.step)
        _write(at / STATE, _encode(state))
        _sync(at)

    def partial(self, step: int, attempt: str, checkpoint: str) -> Path:
        """Create the directory of a cut that begins, and return its path.

        attempt     hexadecimal digits that no other attempt has
        checkpoint  name of the checkpoint that the servers will take
        """
        path = self.path / f".partial-{step:012}-{attempt}"
        path.mkdir()
        _write(path / CHECKPOINT, checkpoint.encode())
        _sync(path)
        _sync(self.path)
        return path

    def partials(self) -> list[tuple[Path, str]]:
        """Return (path, name of the checkpoint) of each cut that was interrupted."""
        found = []
        for path in sorted(self.path.glob(".partial-*")):
            name = path / CHECKPOINT
            found.append((path, name.read_text() if name.exists() else ""))
        return found

    def complete(self, partial: Path, state: TrainerState) -> None:
        """Write STATE into the directory of a cut, sync all its files, and give it its final name.

        partial  path that the method ``partial`` returned
        state    the state at this cut; its ``files`` are set here
        """
        files = {
            str(each.relative_to(partial)): each.stat().st_size
            for each in sorted(partial.rglob("*"))
            if each.is_file() and each != partial / CHECKPOINT
        }
        for name in files:
            _sync(partial / name)
        _write(partial / STATE, _encode(replace(state, files=files)))
        for each in sorted(partial.rglob("*"), reverse=True):
            if each.is_dir():
                _sync(each)
        _sync(partial)
        os.rename(partial, self.of(state.step))
        _sync(self.path)

    def remove(self, path: Path) -> None:
        """Delete the directory of a cut. A crash leaves all of it, or what ``partials`` finds."""
        if NAME.fullmatch(path.name):
            hidden = path.with_name(f".partial-{path.name}")
            os.rename(path, hidden)
            path = hidden
        shutil.rmtree(path)


def require_json(field: str, value: Any) -> None:
    """Raise InvalidArgument, naming ``field``, unless JSON can store ``value`` as it is."""
    try:
        stored = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        stored = _NOTHING
    if stored is _NOTHING or stored != value:
        raise InvalidArgument(
            f"{field} must be made of numbers, texts, lists, and dicts whose keys are texts, got"
            f" {value!r}"
        )


def _encode(state: TrainerState) -> bytes:
    """Return the contents of a file STATE."""
    content = {"format": FORMAT, **asdict(state)}
    text = json.dumps(content, sort_keys=True, indent=1) + "\n"
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode()


def _decode(path: Path, data: bytes) -> TrainerState:
    """Return the state that a file STATE contains. Raises DataLoss if the file is damaged.

    path  where the file is, for errors
    data  its contents
    """
    checksum, _, text = data.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise DataLoss(f"{path} is damaged: its checksum is wrong")
    content = json.loads(text)
    if content.pop("format") != FORMAT:
        raise DataLoss(f"{path} was written by another release, which uses another format")
    content["shards"] = [ShardState(**each) for each in content["shards"]]
    content["ranks"] = [
        RankState(each["position"], [SessionState(**one) for one in each["sessions"]])
        for each in content["ranks"]
    ]
    return TrainerState(**content)


def _write(path: Path, data: bytes) -> None:
    """Atomically replace a file: after a crash it has either the old or the new contents."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
