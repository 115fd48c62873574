"""What it takes to be sure that a name or a file is on disk."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on disk; OSError if that failed."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def replace(path: Path, data: bytes) -> None:
    """Have a file of these bytes, or the one before it, on disk whatever happens meanwhile."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync(path.parent)
