"""Cursors: each reads the version log in order and keeps its position between calls."""

from __future__ import annotations

import bisect
from typing import Protocol

from storage.disk import CHUNK
from storage.errors import Corrupt
from storage.logfiles import LogFiles, SegmentFile
from storage.segment import Frame, Reader


class Followed(Protocol):
    """The part of VersionLog that a cursor uses."""

    files: LogFiles

    @property
    def written(self) -> int:
        """Newest version handed to the OS."""
        ...

    @property
    def durable(self) -> int:
        """Newest version synced to disk."""
        ...


class Cursor:
    """Reads the log in order from a position that it remembers. ``VersionLog.cursor`` creates one.

    after  version of the last frame that was read

    One thread at a time may use it. It keeps one file open, and some MiB of read-ahead in memory.
    """

    def __init__(self, log: Followed, after: int) -> None:
        """Create a cursor that begins at version ``after + 1``. Opens no file yet."""
        self.after = after
        self._log = log
        self._segment: SegmentFile | None = None
        self._reader: Reader | None = None

    def read(self, *, upto: int | None = None, max_bytes: int = CHUNK) -> list[Frame]:
        """Return the next frames in order, without a gap, each one verified.

        upto       last version to return; None: the newest version that is synced to disk. Never
                   beyond the newest version that is written
        max_bytes  stop after this many bytes of frames; the last frame may exceed it. Also stops at
                   the end of a log file

        Returns an empty list only if there is no next frame. Raises Compacted if the next frame was
        deleted; a log file that is deleted while the cursor reads it can still be read to its end.
        Raises Corrupt, with file and offset, on damage.
        """
        log = self._log
        limit = log.durable if upto is None else min(upto, log.written)
        if self.after >= limit:
            return []
        segment, reader = self._here()
        last = limit if segment.last is None else min(limit, segment.last)
        frames = reader.read(last, segment.end, max_bytes)
        self.after = reader.version - 1
        return frames

    def close(self) -> None:
        """Close the file. Frames that were returned before stay valid."""
        if self._reader is not None:
            self._reader.close()
        self._reader = self._segment = None

    def _here(self) -> tuple[SegmentFile, Reader]:
        """Return (segment of the next frame, reader positioned at that frame)."""
        segment, reader, version = self._segment, self._reader, self.after + 1
        if segment is not None and reader is not None:
            if segment.last is None or version <= segment.last:
                return segment, reader
            self.close()
        self._segment, self._reader = segment, reader = self._enter(version)
        hint = bisect.bisect_right(segment.hints, (version, segment.end)) - 1
        if hint >= 0:
            reader.seek(*segment.hints[hint])
        try:
            reader.skip(version, segment.end)
        except BaseException:
            self.close()
            raise
        return segment, reader

    def _enter(self, version: int) -> tuple[SegmentFile, Reader]:
        """Open the segment that contains ``version``. Returns the segment and its reader."""
        segment = self._log.files.holding(version)
        try:
            return segment, Reader(segment.path)
        except FileNotFoundError:  # deleted a moment ago, or lost
            if segment is self._log.files.holding(version):
                raise Corrupt(str(segment.path), "the log file is missing") from None
            return self._enter(version)
