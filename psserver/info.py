"""Answer GetServerInfo (number, shard map, limits and statistics of a shard), Diagnose (findings
about the machine and the settings) and GetStatus (live figures).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from psproto import RELEASE
from psproto import ps_pb2 as pb
from psserver.config import ServerConfig
from psserver.doctor import examine
from psserver.livestatus import LiveStatus
from psserver.security.guard import Proof
from psserver.shard import Shard
from storage.versionlog import VersionLog

COUNTED = 128  # tables that are counted without a pause; takes less than a millisecond


class ServerInfo:
    """Reads versions, sizes and limits of a shard. Never waits for the engine.

    Must be used on the event loop, except ``diagnose``, which blocks, and ``status``.

    live     live figures of the server
    log      version log; None: the shard has no data directory
    flushed  returns the monotonic time of the last flush, in seconds; None: no data directory
    lane     returns how a client with a credential reaches the same-host lane; None: the server
             offers none
    """

    def __init__(
        self,
        shard: Shard,
        config: ServerConfig,
        live: LiveStatus,
        log: VersionLog | None = None,
        flushed: Callable[[], float] | None = None,
        lane: Callable[[Proof], pb.Lane] | None = None,
    ) -> None:
        self._shard = shard
        self._config = config
        self._live = live
        self._log = log
        self._flushed = flushed
        self._lane = lane

    async def read(self, proof: Proof) -> pb.GetServerInfoResponse:
        """Return the response. While many tables are counted, the event loop runs other calls.

        proof  credential of the caller
        """
        shard, config, log, now = self._shard, self._config, self._log, time.monotonic()
        tables, rows, damaged = shard.tables(), 0, 0
        for at in range(0, len(tables), COUNTED):
            some = tables[at : at + COUNTED]
            rows += sum(map(shard.rows, some))
            damaged += sum(shard.checks.counts(name)[0] for name in some)
            await asyncio.sleep(0)
        return pb.GetServerInfoResponse(
            release=RELEASE,
            shard=shard.number,
            shard_map=pb.ShardMap(
                epoch=shard.shard_map.epoch,
                shards=shard.shard_map.shards,
                shard_of_bucket=shard.shard_map.shard_of_bucket.astype("<u2").tobytes(),
            ),
            limits=pb.Limits(message_bytes=config.max_message_bytes, keys=config.max_keys),
            version=shard.version,
            memory_bytes=shard.budget.held,
            memory_budget_bytes=shard.budget.limit,
            lineage=b"" if log is None else log.lineage,
            durable_version=0 if log is None else log.durable,
            uptime_seconds=self._live.uptime,
            tables=len(tables),
            rows=rows,
            log_bytes=0 if log is None else sum(each.size for each in log.files.segments),
            log_first_version=0 if log is None else log.first,
            damaged_blocks=damaged,
            cluster=config.cluster,
            advertise=config.advertise,
            start=self._live.start,
            gpu_bytes=0 if shard.gpu is None else shard.gpu.budget.held,
            gpu_budget_bytes=0 if shard.gpu is None else shard.gpu.budget.limit,
            gpu_paused=shard.gpu is not None and shard.gpu.paused,
            lane=None if self._lane is None else self._lane(proof),
            flush_age_seconds=0.0 if self._flushed is None else now - self._flushed(),
        )

    def diagnose(self, _: pb.DiagnoseRequest) -> pb.DiagnoseResponse:
        """Return the findings about this machine and the settings. Blocks for about a second."""
        found = [
            pb.Finding(
                check=each.check,
                state=pb.Finding.State.Value(f"STATE_{each.state.upper()}"),
                found=each.found,
                advice=each.advice,
            )
            for each in examine(self._config, running=True, gpu=self._shard.gpu)
        ]
        return pb.DiagnoseResponse(findings=found, time=time.time())

    def status(self, _: pb.GetStatusRequest) -> pb.GetStatusResponse:
        """Return live figures of the shard. Any thread may call this."""
        return self._live.read()
