"""A shard's data directory: locked by one server, owned by one shard, recovered at each start.

    LOCK    locked while a server uses the directory
    SHARD   which shard owns the directory
    log/    version log: a record of every change (storage/versionlog.py)
    base/   the base: a copy of all rows at one version of the log (storage/base.py)

Recovery loads the base, then applies the log records that are newer than the base.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import structlog

from psproto import routing
from psserver.config import ServerConfig
from psserver.engine import Engine
from psserver.flusher import Flusher
from psserver.loading import settle_load
from psserver.replay import Recovered, recover, restore_excess
from psserver.shard import Shard
from psserver.swap import COMMITTED, State, failed, loaded, settle
from psserver.unusable import ConfigError, unusable
from storage.base import Base
from storage.disk import read_file, replace, require_file
from storage.errors import Corrupt, StorageError
from storage.sealed import FORMAT, STRICT, seal, unseal
from storage.versionlog import VersionLog

OWNER = "SHARD"  # name of the file in a data directory that records which shard owns it

log = structlog.get_logger()


def lock(directory: Path) -> IO[str]:
    """Create a data directory if it is missing, and lock it. Returns the lock file.

    The lock is held until the file is closed. Raises ConfigError if a server holds the lock, or if
    this process cannot write in the directory.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        require_file(directory / "LOCK")
        file = (directory / "LOCK").open("a")
    except Corrupt as error:
        raise _unfit(error) from error
    except OSError as error:
        raise unusable(directory, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"data_dir: {directory} is in use by another server; stop it, or choose another"
            " data_dir"
        ) from error
    except OSError as error:  # some network file systems
        file.close()
        raise unusable(directory, error) from error
    return file


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The contents of the file SHARD: which shard's data a directory contains."""

    __pydantic_config__ = STRICT
    format: int = FORMAT
    shard: int
    shards: int  # number of shards in the cluster
    epoch: int  # version number of the shard map


def claim(directory: Path, shard: int, shard_map: routing.ShardMap) -> None:
    """Record in the file SHARD that ``shard`` owns a data directory, if nothing is recorded yet.

    Raises ConfigError if the directory is owned by a different shard, or by this shard under a
    different shard map, because it would then lack keys of this shard. Raises Corrupt if SHARD is
    damaged.
    """
    path = directory / OWNER
    asked = Owner(shard=shard, shards=shard_map.shards, epoch=shard_map.epoch)
    if not path.exists():
        replace(path, seal(asked))
        return
    stored = unseal(Owner, read_file(path), str(path))
    if stored != asked:
        owner, other = (
            f"shard {each.shard} of {each.shards} (shard map of epoch {each.epoch})"
            for each in (stored, asked)
        )
        raise ConfigError(
            f"data_dir: {directory} belongs to {owner}, but this server is {other}; to change the"
            " number of shards: take a checkpoint (psctl checkpoint), start all servers on new"
            " directories, then restore it (psctl restore)"
        )


class DataDirectory:
    """Opens and closes the version log and the base (copy of all rows on disk) of one shard.

    make_shard          returns an empty shard
    wake                called on a thread of the log when more records are on disk; must not block
    restore             state of a restore that was begun before this start; None: there was none
    log, base, flusher  exist after ``open``
    """

    def __init__(
        self,
        directory: Path,
        config: ServerConfig,
        engine: Engine,
        make_shard: Callable[[], Shard],
        wake: Callable[[], None],
    ) -> None:
        self.directory = directory
        self.restore: State | None = None
        self._config = config
        self._engine = engine
        self._make_shard = make_shard
        self._wake = wake

    def open(self) -> Shard:
        """Return the shard, recovered from base and log. Raises ConfigError if that is impossible.

        If a restore was committed before this start, the shard gets the restored rows. If they
        cannot be loaded, the restore counts as failed, and the shard gets the rows that it had
        before the restore.
        """
        try:
            return self._open()
        except OSError as error:
            raise unusable(self.directory, error) from error

    def _open(self) -> Shard:
        self.shard = self._make_shard()
        try:
            claim(self.directory, self._config.shard, self.shard.shard_map)
            restore = settle(self.directory)
        except StorageError as error:
            raise _unfit(error) from error
        self.restore = restore
        if restore is None or restore.phase != COMMITTED:
            self._recover()
            return self.shard
        try:
            self._recover(restore_excess(self._config.host_bytes))
        except ConfigError as error:
            log.error("restore failed", name=restore.name, error=str(error))
            self.restore = failed(self.directory, restore, str(error))
            self.shard.close()
            self.shard = self._make_shard()
            self._recover()
            return self.shard
        self.restore = loaded(self.directory, restore)
        return self.shard

    def close(self) -> None:
        """Close log and base. The flusher must be closed first."""
        self.log.close()
        self.base.close()
        self.shard.close_file()

    def _recover(self, excess: int | None = None) -> None:
        """Open log and base, and bring ``self.shard`` to the newest version in them.

        excess  bytes that tables may use beyond host_bytes during recovery; None: no limit

        Raises ConfigError if the files are damaged or do not belong together.
        """
        start = time.monotonic()
        found = self._replay(excess)
        self.shard.attach(self.log)
        try:
            settle_load(self.directory, self.shard, self.log)
        except StorageError as error:
            self.close()
            raise _unfit(error) from error
        config = self._config
        self.flusher = Flusher(
            self.shard,
            self._engine,
            found.writer,
            self.log,
            fail=partial(_fail, "the base"),
            seconds=config.flush_seconds,
            keep=(config.log_keep_bytes, config.log_keep_seconds),
        )
        self._report(found, time.monotonic() - start)

    def _replay(self, excess: int | None) -> Recovered:
        """Open base and log, load the base into ``self.shard``, and replay the newer log records.

        excess  bytes that tables may use beyond host_bytes during recovery; None: no limit

        After an error, base and log are closed.
        """
        self.base = Base(self.directory / "base")
        versions: VersionLog | None = None
        try:
            self.base.open()
            versions = self._open_log()
            found = recover(self.shard, self.base, versions, excess)
        except (StorageError, OSError) as error:
            self.base.close()
            if versions is not None:
                versions.close()
            if isinstance(error, OSError):
                raise
            raise _unfit(error) from error
        self.log = versions
        return found

    def _open_log(self) -> VersionLog:
        """Open the version log, which must have all changes since the base. Raises Corrupt."""
        state = self.base.state
        return VersionLog.open(
            self.directory / "log",
            fail=partial(_fail, "the version log"),
            wake=self._wake,
            segment_bytes=self._config.segment_bytes,
            sync_seconds=self._config.fsync_seconds,
            lineage=state.lineage if state else None,
            after=state.version if state else None,
            made=state is not None and state.logged,
        )

    def _report(self, found: Recovered, seconds: float) -> None:
        """Log how much was recovered, and a warning if tables exceed host_bytes.

        seconds  duration of the recovery
        """
        log.info(
            "recovered",
            shard=self._config.shard,
            version=self.shard.version,
            rows=found.rows,
            records=found.records,
            record_bytes=found.record_bytes,
            torn_bytes=self.log.torn_bytes,
            seconds=round(seconds, 2),
        )
        budget = self.shard.budget
        if budget.free < 0:
            log.warning(
                "memory over budget: pushes that need more memory are refused until rows are"
                " deleted, tables are dropped or host_bytes is raised",
                shard=self._config.shard,
                memory_bytes=budget.held,
                memory_budget_bytes=budget.limit,
            )


def _unfit(error: StorageError) -> ConfigError:
    """Convert an error about the contents of a data directory to a ConfigError."""
    damaged = "DATA_LOSS: " if isinstance(error, Corrupt) else ""
    return ConfigError(f"data_dir: {damaged}{error}")


def _fail(what: str, error: Exception) -> None:
    """Log a failed write and end the process at once with status 74.

    what   "the version log" or "the base"
    error  why the write failed

    It is unknown what is on disk after the error, so the server must not answer further requests.
    """
    log.critical(f"{what} failed", error=str(error))
    os._exit(74)  # EX_IOERR
