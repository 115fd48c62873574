"""A reader of the version log that moves on as it reads."""

from __future__ import annotations

import bisect
from typing import Protocol

from storage.disk import CHUNK
from storage.errors import Corrupt
from storage.logfiles import LogFiles, SegmentFile
from storage.segment import Frame, Reader


class Followed(Protocol):
    """The log that a cursor reads."""

    files: LogFiles
    written: int
    durable: int


class Cursor:
    """A position in the log. ``VersionLog.cursor`` creates one.

    One thread at a time may use it. It keeps one descriptor open, and some MiB that were read
    ahead. ``after`` is the version of the last frame that it returned.
    """

    def __init__(self, log: Followed, after: int) -> None:
        """Start after version ``after``. Opens no file yet."""
        self.after = after
        self._log = log
        self._segment: SegmentFile | None = None
        self._reader: Reader | None = None

    def read(self, *, upto: int | None = None, max_bytes: int = CHUNK) -> list[Frame]:
        """Return the next frames in order, without a gap, each one verified.

        upto       last version to return, at most ``written``; None: ``durable``
        max_bytes  bytes of frames to stop at. The last frame may exceed it. The end of a segment
                   stops earlier

        Returns an empty list only if there is no next frame. Raises Compacted if the next frame
        was deleted; but a segment that is deleted while the cursor reads it can still be read to
        its end. Raises Corrupt, with file and offset, on damage.
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
        """Close the file. Frames that were returned stay valid."""
        if self._reader is not None:
            self._reader.close()
        self._reader = self._segment = None

    def _here(self) -> tuple[SegmentFile, Reader]:
        """Return the segment of the next frame, and a reader at that frame."""
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
        """Open the segment that contains ``version``."""
        segment = self._log.files.holding(version)
        try:
            return segment, Reader(segment.path)
        except FileNotFoundError:  # deleted a moment ago, or lost
            if segment is self._log.files.holding(version):
                raise Corrupt(str(segment.path), "is gone") from None
            return self._enter(version)
