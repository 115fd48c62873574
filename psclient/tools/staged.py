"""Create files and directories that get their final name only once they are complete.

Until then their name is ``.NAME.PID``, in the same directory. If the process is killed, the file or
directory of this name remains, and may be deleted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psclient.errors import InvalidArgument


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file, which replaces ``path`` if the block succeeds.

    Raises InvalidArgument before the block runs if ``path`` cannot be written.
    """
    if path.is_dir():
        raise InvalidArgument(f"{path} is a directory; choose the name of a file")
    temporary = _temporary(path)
    try:
        temporary.touch()
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory, which becomes ``path`` if the block succeeds.

    Raises InvalidArgument before the block runs if ``path`` exists and is not an empty directory,
    or cannot be created.
    """
    if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
        raise InvalidArgument(f"{path} exists: choose a new or an empty directory")
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be created: {error.strerror}") from error
    try:
        yield temporary
        for each in temporary.iterdir():
            _sync(each)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Return the path under which a file or directory is written until it is complete."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}.{os.getpid()}")


def _sync(path: Path) -> None:
    """Wait until the contents of a file are on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
