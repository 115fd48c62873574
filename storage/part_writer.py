"""Write one shard's part of a checkpoint. checkpoint.py describes the format of the files."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from storage.checkpoint import Report
from storage.manifest import KINDS, File, Part
from storage.sealed import seal
from storage.segment import Frame
from storage.store import Output, Store

FILE_BYTES = 64 << 20  # a file is closed once it has at least this size
CLOSING = 4  # maximum number of files that wait to be synced

ENTRY = struct.Struct("<Q")
RECORD = struct.Struct("<QII")
_ZEROS = bytes(8)


class _Closing(NamedTuple):
    """A file that is completely written but not yet synced."""

    kind: str  # one of KINDS in manifest.py
    path: str  # within the checkpoint
    output: Output
    checksum: Future[str]  # xxh3_128 in hexadecimal, available once the file is synced


class PartWriter:
    """Writes one shard's part of a checkpoint: its files in the order of the calls, then its
    manifest.

    A background thread syncs each file while the next one is written. This shortens the checkpoint,
    and so the part of the log that must be stored with the rows.
    """

    def __init__(self, store: Store, name: str, attempt: str, shard: int, report: Report) -> None:
        """Create a writer. Writes no file yet.

        store    where all checkpoints are stored
        name     the checkpoint's name
        attempt  random id of this attempt to take the checkpoint, 16 hexadecimal digits
        shard    number of the shard, from 0 on
        report   called after each block and record with the bytes written since the last call
        """
        self._store = store
        self._name = name
        self._prefix = f"{attempt}/{shard:05}"
        self._report = report
        self._files: dict[str, list[File]] = {kind: [] for kind in KINDS}
        self._output: Output | None = None
        self._path = self._kind = ""
        self._count = 0
        self._closing: deque[_Closing] = deque()
        self._closer = ThreadPoolExecutor(1, "checkpoint files")

    def block(self, data: Any, kind: str = "blocks") -> None:
        """Append a sealed block.

        data  the bytes of the block; see block.py
        kind  files to append to: "blocks" for rows and tombstones, "counters" for counters
        """
        view = memoryview(data).cast("B")
        self._append(kind, [ENTRY.pack(len(view)), view, _ZEROS[: -len(view) % 8]])

    def frames(self, frames: Iterable[Frame]) -> None:
        """Append ``frames``, records of the log, to the files of records."""
        for frame in frames:
            size = len(frame.payload)
            head = RECORD.pack(frame.version, size, frame.kind)
            self._append("records", [head, frame.payload, _ZEROS[: -size % 8]])

    def sessions(self, data: bytes) -> None:
        """Write the file of sessions, unless ``data`` is empty.

        data  the record of the pushes already applied, by client, as the shard encodes it
        """
        if data:
            self._append("sessions", [data])

    def finish(self, **rest: Any) -> tuple[Part, File]:
        """Finish and sync all files, then write the shard's manifest.

        rest  the fields of Part except ``name`` and the lists of files

        Returns (the manifest; File with path, size and checksum of the manifest).
        """
        self._close(0)
        self._closer.shutdown()
        part = Part(
            name=self._name,
            **{kind: tuple(files) for kind, files in self._files.items()} | rest,
        )
        data, path = seal(part), f"{self._prefix}.json"
        self._store.publish(f"{self._name}/{path}", data)
        return part, File(path=path, bytes=len(data), checksum=xxh3_128_hexdigest(data))

    def discard(self) -> None:
        """Stop writing. The files written so far stay until a later attempt to take the checkpoint
        is completed, or the checkpoint is deleted.
        """
        self._closer.shutdown(cancel_futures=True)
        for each in self._closing:
            each.output.discard()
        if self._output is not None:
            self._output.discard()

    def _append(self, kind: str, parts: Sequence[Any]) -> None:
        """Append buffers to the open file, or to a new one if ``kind`` changes or the file is full.

        parts  the buffers of one entry, which are not split over two files
        """
        if self._output is None or kind != self._kind or self._output.bytes >= FILE_BYTES:
            self._close(CLOSING)
            self._kind, self._path = kind, f"{self._prefix}.{self._count:06}.{kind}"
            self._count += 1
            self._output = self._store.create(f"{self._name}/{self._path}")
        before = self._output.bytes
        self._output.write(parts)
        self._report(self._output.bytes - before)

    def _close(self, most: int) -> None:
        """Let the background thread sync and close the open file, if there is one.

        most  wait until at most this many files are not yet synced
        """
        if self._output is not None:
            output, self._output = self._output, None
            checksum = self._closer.submit(output.close)
            self._closing.append(_Closing(self._kind, self._path, output, checksum))
        while len(self._closing) > most:
            kind, path, output, done = self._closing.popleft()
            file = File(path=path, bytes=output.bytes, checksum=done.result())
            self._files[kind].append(file)
