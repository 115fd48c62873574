"""The state of each shard, asked one by one, so that it also works while some are down."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import grpc

from psclient import addresses
from psclient.channel import OPTIONS, Channel
from psclient.errors import InvalidArgument, PsError
from psclient.restores import OVER, PREPARED
from psclient.retry import rpc_error
from psproto import ps_pb2 as pb

STATES = {"STARTING": "starting", "DRAINING": "draining", "RESTORING": "restoring"}  # by reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """One shard as it answered. Figures are None if it did not.

    state    ready; starting, draining or restoring, which refuse work for a while; misplaced: it
             serves another shard than the one at its place in the addresses; unreachable
    problem  why it is not ready
    """

    shard: int  # its place in the addresses
    address: str
    state: str
    problem: str | None = None
    release: str | None = None
    uptime_seconds: float | None = None
    version: int | None = None
    durable_version: int | None = None  # None without a data directory, and the following three
    log_first_version: int | None = None  # the oldest that the version log still has
    log_bytes: int | None = None
    flush_age_seconds: float | None = None  # age of the oldest change that a restart replays
    tables: int | None = None
    rows: int | None = None
    memory_bytes: int | None = None
    memory_budget_bytes: int | None = None

    @property
    def ready(self) -> bool:
        """Whether the shard takes work."""
        return self.state == "ready"


def status(where: Sequence[str], *, timeout: float = 5.0) -> list[ShardStatus]:
    """Return the state of every shard, in the order of ``where``; raises nothing.

    where    "host:port" of every shard, in order
    timeout  seconds to wait for a shard
    """
    shards = range(len(where))
    with ThreadPoolExecutor(max(1, min(len(where), 64)), "psclient-status") as pool:
        return list(pool.map(lambda i: _ask(i, len(where), where[i], max(timeout, 0.01)), shards))


def _ask(shard: int, shards: int, address: str, timeout: float) -> ShardStatus:
    if wrong := addresses.problem(address):
        return ShardStatus(
            shard=shard, address=address, state="unreachable", problem=f"{address!r}: {wrong}"
        )
    try:
        with closing(Channel(address, OPTIONS)) as channel:
            info = _call(
                channel, "InfoService/GetServerInfo", pb.GetServerInfoRequest(), timeout, address
            )
            answer = pb.GetServerInfoResponse.FromString(info)
            state, problem = _state(channel, answer, shard, shards, address, timeout)
    except PsError as error:
        state = STATES.get(error.reason, "unreachable")
        return ShardStatus(shard=shard, address=address, state=state, problem=str(error))
    logged = bool(answer.lineage)
    return ShardStatus(
        shard=shard,
        address=address,
        state=state,
        problem=problem,
        release=answer.release,
        uptime_seconds=answer.uptime_seconds,
        version=answer.version,
        durable_version=answer.durable_version if logged else None,
        log_first_version=answer.log_first_version if logged else None,
        log_bytes=answer.log_bytes if logged else None,
        flush_age_seconds=answer.flush_age_seconds if logged else None,
        tables=answer.tables,
        rows=answer.rows,
        memory_bytes=answer.memory_bytes,
        memory_budget_bytes=answer.memory_budget_bytes,
    )


def _state(
    channel: Channel,
    info: pb.GetServerInfoResponse,
    shard: int,
    shards: int,
    address: str,
    timeout: float,
) -> tuple[str, str | None]:
    """Return the state of a shard that answers, and why it is not ready."""
    if (info.shard, info.shard_map.shards) != (shard, shards):
        return "misplaced", (
            f"{address} serves shard {info.shard} of {info.shard_map.shards},"
            f" but is listed as shard {shard} of {shards}"
        )
    data = _call(channel, "CheckpointService/Restore", pb.RestoreRequest(), timeout, address)
    restore = pb.RestoreStatus.FromString(data)
    if restore.phase in (*OVER, PREPARED):
        return "ready", None
    phase = pb.RestoreStatus.Phase.Name(restore.phase).removeprefix("PHASE_").lower()
    return "restoring", f"restore of checkpoint {restore.name!r}, phase {phase}"


def _call(channel: Channel, method: str, request: Any, timeout: float, address: str) -> bytes:
    try:
        return channel.call(f"/ps.v1.{method}", request.SerializeToString(), timeout)
    except grpc.RpcError as error:
        raise rpc_error(error, address) from None
    except ValueError as error:  # of an address that gRPC cannot parse
        raise InvalidArgument(f"{address}: {error}") from None
