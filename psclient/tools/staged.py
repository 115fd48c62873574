"""Files that appear under their name when they are complete, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from psclient.errors import InvalidArgument


def beside(path: Path) -> Path:
    """A file to be written in the place of ``path`` until it is whole: empty, and there.

    InvalidArgument if it cannot be: now, and not when the work is done.
    """
    if path.is_dir():
        raise InvalidArgument(f"{path} is a directory, not a file to be written")
    found = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        found.touch()
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written: {error.strerror}") from error
    return found
