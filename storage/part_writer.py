"""Write one shard's part of a checkpoint. checkpoint.py has the grammar of its files."""

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

FILE_BYTES = 64 << 20  # a file that has this size is closed
CLOSING = 4  # largest number of files that wait to be synced

ENTRY = struct.Struct("<Q")
RECORD = struct.Struct("<QII")
_ZEROS = bytes(8)


class _Closing(NamedTuple):
    """A file that is written in full and not synced yet."""

    kind: str
    path: str
    output: Output
    checksum: Future[str]


class PartWriter:
    """Writes the files of one shard in the order of the calls, then its manifest.

    A thread of its own syncs a file while the next one is written. The less time the copy takes,
    the fewer records it needs.
    """

    def __init__(self, store: Store, name: str, attempt: str, shard: int, report: Report) -> None:
        """``report`` is called after each block and each record with the bytes written."""
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
        """Append a sealed block of rows or tombstones; or of counters, if that is its kind."""
        view = memoryview(data).cast("B")
        self._append(kind, [ENTRY.pack(len(view)), view, _ZEROS[: -len(view) % 8]])

    def frames(self, frames: Iterable[Frame]) -> None:
        """Append records of the log."""
        for frame in frames:
            size = len(frame.payload)
            head = RECORD.pack(frame.version, size, frame.kind)
            self._append("records", [head, frame.payload, _ZEROS[: -size % 8]])

    def sessions(self, data: bytes) -> None:
        """Write the clients' sessions, unless there are none."""
        if data:
            self._append("sessions", [data])

    def finish(self, **rest: Any) -> tuple[Part, File]:
        """Finish the files and write the shard's manifest.

        rest  the fields of Part other than the name and the files

        Returns the manifest and the file that contains it.
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
        """Give up. The files stay until another attempt is completed, or the name is deleted."""
        self._closer.shutdown(cancel_futures=True)
        for each in self._closing:
            each.output.discard()
        if self._output is not None:
            self._output.discard()

    def _append(self, kind: str, parts: Sequence[Any]) -> None:
        if self._output is None or kind != self._kind or self._output.bytes >= FILE_BYTES:
            self._close(CLOSING)
            self._kind, self._path = kind, f"{self._prefix}.{self._count:06}.{kind}"
            self._count += 1
            self._output = self._store.create(f"{self._name}/{self._path}")
        before = self._output.bytes
        self._output.write(parts)
        self._report(self._output.bytes - before)

    def _close(self, most: int) -> None:
        """Hand over the open file to be synced; return when at most ``most`` files wait for it."""
        if self._output is not None:
            output, self._output = self._output, None
            checksum = self._closer.submit(output.close)
            self._closing.append(_Closing(self._kind, self._path, output, checksum))
        while len(self._closing) > most:
            kind, path, output, done = self._closing.popleft()
            file = File(path=path, bytes=output.bytes, checksum=done.result())
            self._files[kind].append(file)
