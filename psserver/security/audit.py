"""The audit log: one line of JSON for each change of tables or checkpoints, and refused attempts.

A record has who called, from where, which method, which tables, when it began (UTC) and how it
ended. It never has tokens, keys or rows. Pulls and pushes are not recorded.

A thread writes the lines, so that a slow disk does not block the event loop. A call that changes
something is answered after its line was written. Refused attempts are recorded without delaying
their answers, at most REFUSED_PER_SECOND per principal; the next line counts those left out.

    {"time": "2026-01-31T12:00:00.000000Z", "shard": 0, "method": "/ps.v1.TableService/DropTable",
     "principal": "ops", "credential": "cn:ops", "peer": "ipv4:10.0.0.7:4711", "tables": ["user"],
     "outcome": "OK", "seconds": 0.002}
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import structlog

from psserver.pool import Pool
from psserver.status import reason_of, status_of
from psserver.unusable import ConfigError

REFUSED_PER_SECOND = 10.0
BURST = 50.0  # refused attempts of one principal that are recorded without pause
LONGEST = 256  # characters of a text in a record; table names may be invalid and long
MOST = 64  # items of a list in a record
CLOSE_SECONDS = 5.0

log = structlog.get_logger()


class Who(Protocol):
    """The caller of a method, as records name it."""

    @property
    def name(self) -> str: ...
    @property
    def credential(self) -> str: ...
    @property
    def peer(self) -> str: ...
    @property
    def method(self) -> str: ...


class _Quota:
    """Lets BURST events pass at once, then REFUSED_PER_SECOND; counts the others."""

    def __init__(self, now: float) -> None:
        self._left, self._since, self.suppressed = BURST, now, 0

    def passes(self, now: float) -> bool:
        """Return whether the next event passes."""
        self._left = min(BURST, self._left + (now - self._since) * REFUSED_PER_SECOND)
        self._since = now
        if self._left < 1:
            self.suppressed += 1
            return False
        self._left -= 1
        return True


class Audit:
    """Writes the audit log of one server. Thread-safe, except ``recorded``, for the event loop.

    path   file to append to; None: write log lines to stderr
    shard  number of the shard, for the records
    clock  returns monotonic seconds

    lines   lines written
    failed  lines that could not be written
    """

    def __init__(
        self, path: Path | None, shard: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lines = 0
        self.failed = 0
        self._path = path
        self._shard = shard
        self._clock = clock
        self._fd = -1
        self._file = (0, 0)  # device and inode of the open file
        self._torn = False  # whether the file ends in the middle of a line
        self._quotas: dict[str, _Quota] = {}
        self._thread = Pool("audit", 1)
        if path is not None:
            try:
                self._open()
            except OSError as error:
                raise ConfigError(f"audit_file: cannot append to {path}: {error}") from error

    def close(self) -> None:
        """Write what is left, within CLOSE_SECONDS, and close the file."""
        self._thread.close(CLOSE_SECONDS)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @asynccontextmanager
    async def recorded(
        self, who: Who, tables: Sequence[str], details: Mapping[str, Any]
    ) -> AsyncIterator[None]:
        """Record how the block ends: OK, CANCELLED, or the reason of its error.

        The record is written before the context ends. If the block is cancelled, the record is
        written later, because what the block began may still complete.

        tables   names of the tables that it changes
        details  other facts about the request
        """
        began, start = datetime.now(UTC), self._clock()

        def record(outcome: str) -> Future[None]:
            seconds = round(self._clock() - start, 4)
            return self._submit(who, began, tables, {**details, "outcome": outcome}, seconds)

        try:
            yield
        except asyncio.CancelledError:
            record("CANCELLED")
            raise
        except Exception as error:
            await asyncio.wrap_future(record(reason_of(status_of(error))))
            raise
        await asyncio.wrap_future(record("OK"))

    def refused(self, who: Who, reason: str, verb: str, table: str) -> None:
        """Record a refused attempt, unless there were too many.

        reason  for example "PERMISSION_DENIED"
        verb    verb that the caller lacks; "" if it is not known who calls
        table   table for which it lacks it
        """
        now = self._clock()
        quota = self._quotas.setdefault(who.name, _Quota(now))
        if not quota.passes(now):
            return
        details: dict[str, Any] = {"verb": verb, "outcome": reason}
        if quota.suppressed:
            details["suppressed"], quota.suppressed = quota.suppressed, 0
        self._submit(who, datetime.now(UTC), [table] if table else [], details, 0.0)

    def _submit(
        self,
        who: Who,
        began: datetime,
        tables: Sequence[str],
        details: Mapping[str, Any],
        seconds: float,
    ) -> Future[None]:
        """Let the thread write a record; return a future that ends when it is written."""
        record = {
            "time": began.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "shard": self._shard,
            "method": who.method,
            "principal": who.name or None,
            "credential": who.credential or None,
            "peer": who.peer,
            "tables": list(tables),
            **details,
            "seconds": seconds,
        }
        return self._thread.submit(self._write, {key: _short(each) for key, each in record.items()})

    def _write(self, record: dict[str, Any]) -> None:
        """Write one record. A failure is logged and counted: the change has been made already."""
        try:
            if self._path is None:
                log.info("audit", **record)
            else:
                self._append((json.dumps(record) + "\n").encode())
            self.lines += 1
        except OSError as error:
            self.failed += 1
            log.error("audit record lost", path=str(self._path), error=str(error), **record)

    def _append(self, line: bytes) -> None:
        """Append one line to the file, which another program may have moved or removed."""
        assert self._path is not None
        try:
            found = os.stat(self._path)
            moved = (found.st_dev, found.st_ino) != self._file
        except FileNotFoundError:
            moved = True
        if moved:
            self._open()
        if self._torn:
            line = b"\n" + line
        written = os.write(self._fd, line)
        if written > 0:
            self._torn = written != len(line)
        if written != len(line):
            raise OSError(f"{self._path}: only a part of a line was written")

    def _open(self) -> None:
        """Open the file, or the new file of the same name after a rotation."""
        assert self._path is not None
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        found = os.fstat(fd)
        self._fd, self._file = fd, (found.st_dev, found.st_ino)
        self._torn = stat.S_ISREG(found.st_mode) and found.st_size > 0 and _is_torn(self._path)


def _is_torn(path: Path) -> bool:
    """Return whether a file ends in the middle of a line: the disk was full, or a server died."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # this account may only append
        return False


def _short(value: Any) -> Any:
    """Return a value of a record with its texts and lists shortened."""
    if isinstance(value, str):
        return value if len(value) <= LONGEST else value[:LONGEST] + "..."
    if isinstance(value, list):
        rest = [f"... and {len(value) - MOST} more"] if len(value) > MOST else []
        return [_short(each) for each in value[:MOST]] + rest
    return value
