"""Columns of an exported table in temporary files, for formats that need the number of rows first,
or rows in another order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from psclient.tools.columns import OnProgress, Part

SORT_ROWS = 1 << 16  # rows that are copied at a time when rows change their order


class Spool:
    """The columns of a table in temporary files, in the directory of the file to write.

        with Spool(part) as spool:
            spool.fill(progress)

    rows    number of rows
    dtypes  {column: NumPy dtype as text}
    shapes  {column: shape of its value for one row}
    """

    def __init__(self, part: Part) -> None:
        """Prepare for the rows of ``part``."""
        self._part = part
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self.rows = 0
        self.dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def fill(self, progress: OnProgress) -> None:
        """Write all rows to the temporary files. Raises OSError if the disk is full."""
        for columns in self._part.columns():
            for name, values in columns.items():
                if name not in self._files:
                    self._files[name] = self.temporary()
                    self.dtypes[name], self.shapes[name] = values.dtype.str, values.shape[1:]
                self._files[name].write(np.ascontiguousarray(values).data)
            self.rows += len(columns["key"])
            progress(len(columns["key"]))

    def temporary(self) -> IO[bytes]:
        """Return a new temporary file, which is deleted when the block ends."""
        directory = self._part.path if self._part.path.is_dir() else self._part.path.parent
        file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        return self._stack.enter_context(file)

    def copy(self, name: str, out: IO[bytes]) -> None:
        """Append the numbers of a column to a file."""
        file = self._files[name]
        file.seek(0)
        shutil.copyfileobj(file, out, 1 << 20)

    def array(self, name: str) -> NDArray[Any]:
        """Return a column [rows, *shape], mapped from its file: memory that the system can free."""
        shape = (self.rows, *self.shapes[name])
        if 0 in shape:
            return np.empty(shape, self.dtypes[name])
        self._files[name].flush()
        return np.memmap(self._files[name], self.dtypes[name], "r", shape=shape)

    def ordered(self) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
        """Return (keys as int64, sorted; row of each key). Takes 24 bytes of memory per row."""
        keys = np.asarray(self.array("key")).view(np.int64)
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def sorted_rows(self, order: NDArray[np.intp]) -> Iterator[NDArray[np.float32]]:
        """Yield the embeddings in the given order, some rows at a time."""
        embeddings = self.array("embedding")
        for start in range(0, len(order), SORT_ROWS):
            yield embeddings[order[start : start + SORT_ROWS]]
