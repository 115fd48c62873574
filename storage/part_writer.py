"""The files of one shard's part of a checkpoint, written; checkpoint.py has their grammar."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from storage.checkpoint import Tell
from storage.manifest import File, Part, facts
from storage.sealed import seal
from storage.segment import Frame
from storage.store import Output, Store

FILE_BYTES = 64 << 20  # of a file, about
CLOSING = 4  # files that are written and not finished, at most

ENTRY = struct.Struct("<Q")
RECORD = struct.Struct("<QII")
_ZEROS = bytes(8)


class _Closing(NamedTuple):
    """A file that is written, on its way to the disk."""

    kind: str
    path: str
    output: Output
    checksum: Future[str]


class PartWriter:
    """Writes what one shard adds to a checkpoint: blocks, then records, then the rest.

    Files are finished on a thread of its own, which waits for the disk, while the next are written:
    the sooner all rows are copied, the fewer records come meanwhile.
    """

    def __init__(self, store: Store, name: str, attempt: str, shard: int, tell: Tell) -> None:
        """``tell`` is called after each block and each run of records."""
        self._store = store
        self._name = name
        self._prefix = f"{attempt}/{shard:05}"
        self._tell = tell
        self._files: dict[str, list[File]] = {
            kind: [] for kind in ("blocks", "records", "counters", "sessions")
        }
        self._output: Output | None = None
        self._path = self._kind = ""
        self._count = 0
        self._closing: deque[_Closing] = deque()
        self._closer = ThreadPoolExecutor(1, "checkpoint files")

    def block(self, data: Any, kind: str = "blocks") -> None:
        """Append a sealed block; of counters, with that as its kind."""
        view = memoryview(data).cast("B")
        self._append(kind, [ENTRY.pack(len(view)), view, _ZEROS[: -len(view) % 8]])

    def frames(self, frames: Iterable[Frame]) -> None:
        """Append records of the log."""
        for frame in frames:
            size = len(frame.payload)
            head = RECORD.pack(frame.version, size, frame.kind)
            self._append("records", [head, frame.payload, _ZEROS[: -size % 8]])

    def sessions(self, data: bytes) -> None:
        """Write the sessions."""
        if data:
            self._append("sessions", [data])

    def finish(self, **rest: Any) -> tuple[Part, File]:
        """Write the shard's manifest; ``rest`` are the fields of Part that are not known here."""
        self._close(0)
        self._closer.shutdown()
        part = Part(
            name=self._name,
            blocks=tuple(self._files["blocks"]),
            records=tuple(self._files["records"]),
            counters=tuple(self._files["counters"]),
            sessions=tuple(self._files["sessions"]),
            **rest,
        )
        data, path = seal(facts(part)), f"{self._prefix}.json"
        self._store.publish(f"{self._name}/{path}", data)
        return part, File(path=path, bytes=len(data), checksum=xxh3_128_hexdigest(data))

    def discard(self) -> None:
        """Give up; the files are left to whoever completes or removes the checkpoint."""
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
        self._tell(self._output.bytes - before)

    def _close(self, most: int) -> None:
        """Have the file finished; return once at most so many are not."""
        if self._output is not None:
            output, self._output = self._output, None
            checksum = self._closer.submit(output.close)
            self._closing.append(_Closing(self._kind, self._path, output, checksum))
        while len(self._closing) > most:
            kind, path, output, done = self._closing.popleft()
            file = File(path=path, bytes=output.bytes, checksum=done.result())
            self._files[kind].append(file)
