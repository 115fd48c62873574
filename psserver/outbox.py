"""Collect the rows of an analysis into messages, and create progress messages."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from psproto import ps_pb2 as pb
from storage.analysis import RowColumns
from storage.kernels import Rows

Columns = pb.AnalyzeRequest.Columns

PROGRESS_SECONDS = 5.0  # minimum time between two progress messages
MESSAGE_BYTES = 1 << 20  # approximate size of the columns in a message
_COLUMNS = ("keys", "versions", "steps", "frequencies", "norms")  # fields of AnalyzeResponse


class Outbox:
    """Collects the rows of an analysis into messages, and creates progress messages.

    request  its field ``columns`` selects which columns of the rows to send; 0: no rows, only
             progress messages
    total    rows to read, or bytes to read from a checkpoint
    done     rows read so far, or bytes read from a checkpoint so far
    """

    def __init__(self, request: pb.AnalyzeRequest, total: int) -> None:
        self.done = 0
        self._total = total
        self._columns = request.columns
        self._collected: list[tuple[RowColumns, Rows | None]] = []
        self._bytes = 0
        self._reported = time.monotonic()

    def put(self, rows: RowColumns, matrix: Rows | None, done: int) -> Iterator[pb.AnalyzeResponse]:
        """Collect n rows of one tier. Yield a message when about 1 MiB is collected, and before the
        first rows of a different tier.

        If the request selects no columns, drops the rows and only yields progress messages.

        rows    key, version, step, frequency and norm of each row
        matrix  float32[n, dim], the embeddings; None if they are not requested
        done    rows or bytes read so far, including these rows
        """
        self.done = done
        if not self._columns:
            yield from self.progress(done)
            return
        if self._collected and self._collected[0][0].tier != rows.tier:
            yield from self.flush()
        self._collected.append((rows, matrix))
        self._bytes += sum(column.nbytes for column in rows[:-1])
        self._bytes += 0 if matrix is None else matrix.nbytes
        if self._bytes >= MESSAGE_BYTES:
            yield from self.flush()

    def progress(self, done: int) -> Iterator[pb.AnalyzeResponse]:
        """Set ``done``; yield a progress message if at least 5 s have passed since the last one."""
        self.done = done
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self._reported = time.monotonic()
            yield pb.AnalyzeResponse(done=done, total=max(done, self._total))

    def flush(self) -> Iterator[pb.AnalyzeResponse]:
        """Yield the rows that are collected so far as one message, or nothing if there are none."""
        if not self._collected:
            return
        rows, matrices = zip(*self._collected, strict=True)
        message = pb.AnalyzeResponse(
            done=self.done, total=max(self.done, self._total), tier=rows[0].tier
        )
        for field in _COLUMNS:
            column = np.concatenate([getattr(each, field) for each in rows])
            setattr(message, field, column.tobytes())
        if self._columns == Columns.COLUMNS_EMBEDDING:
            message.embeddings = np.concatenate(matrices).tobytes()
        self._collected, self._bytes = [], 0
        yield message
