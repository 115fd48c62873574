"""Create the LMDB file of a new base (the on-disk copy of all rows), and begin to read one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lmdb

from storage.disk import NO_SPACE, sync
from storage.errors import DiskFull

DATA = "data.mdb"  # name that LMDB gives to its file


def create(directory: Path, needed: int) -> None:
    """Atomically create an empty LMDB file: make it in the directory "new", then move it.

    directory  directory of the base, which is created if it is missing
    needed     bytes that DiskFull says are missing

    Raises DiskFull, lmdb.Error and OSError.
    """
    fresh = directory / "new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        lmdb.open(str(fresh), mode=0o644).close()
        sync(fresh / DATA)
        os.replace(fresh / DATA, directory / DATA)
        sync(directory)
        sync(directory.parent)
        shutil.rmtree(fresh)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DiskFull(str(directory), needed) from error
        raise


def begin_read(env: Any) -> Any:
    """Begin and return a read transaction, lmdb.Transaction.

    env  lmdb.Environment. Its memory map is enlarged if the file has grown since the map was made
    """
    while True:
        try:
            return env.begin(buffers=True)
        except lmdb.MapResizedError:
            env.set_mapsize(0)
