"""Count keys that occur several times, in memory that does not grow with the number of keys."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import Self

import numpy as np
from numpy.typing import NDArray

GROUPS = 64  # groups of keys, each of which is sorted in memory at the end
SPOOL_BYTES = 1 << 20  # maximum size of a group that is kept in memory; larger ones are files
_PAIR = np.dtype([("key", "<u8"), ("row", "<i8")])
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Duplicates:
    """Counts keys that occur several times. Use in ``with``.

    Keys are divided into groups by their bits. Groups that become large are temporary files, 16
    bytes per key, in the directory for such files (TMPDIR).
    """

    def __init__(self) -> None:
        """Start without keys."""
        self._stack = ExitStack()
        self._rows = 0  # number of keys added

    def __enter__(self) -> Self:
        self._files = [
            self._stack.enter_context(tempfile.SpooledTemporaryFile(SPOOL_BYTES))  # noqa: SIM115
            for _ in range(GROUPS)
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, keys: NDArray[np.uint64]) -> None:
        """Add keys, uint64[n]. They may be equal."""
        pairs = np.empty(len(keys), _PAIR)
        pairs["key"], pairs["row"] = keys, np.arange(self._rows, self._rows + len(keys))
        self._rows += len(keys)
        groups = (keys * _MIX) >> np.uint64(58)
        order = np.argsort(groups, kind="stable")
        ends = np.searchsorted(groups[order], np.arange(GROUPS), "right")
        for group, part in enumerate(np.split(pairs[order], ends[:-1])):
            if len(part):
                self._files[group].write(part.tobytes())

    def count(self) -> tuple[int, tuple[int, int] | None]:
        """Return (number of keys that occurred before, the first of them or None).

        The first is (key, number of the row at which the key occurs again).
        """
        total, first = 0, None
        for file in self._files:
            file.seek(0)
            pairs = np.frombuffer(file.read(), _PAIR)
            order = np.argsort(pairs["key"], kind="stable")
            keys = pairs["key"][order]
            again = order[1:][keys[1:] == keys[:-1]]
            total += len(again)
            if len(again):
                one = pairs[again.min()]
                if first is None or one["row"] < first[1]:
                    first = int(one["key"]), int(one["row"])
        return total, first
