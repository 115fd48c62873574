"""Ask every shard for its state and its live figures. Works even while some shards are down.

A shard answers GetStatus at any time. If it is not ready, it is also asked what it refuses requests
for. Servers of older releases, which do not have GetStatus, are only asked for the latter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import grpc

from psclient import addresses
from psclient.access import Access, host_of
from psclient.channel import Channel
from psclient.discovery import Discovery
from psclient.errors import InvalidArgument, PermissionDenied, PsError, Unauthenticated, answer_of
from psclient.retry import rpc_error
from psclient.routes import Route
from psproto import ps_pb2 as pb

OVER = (  # phases in which no restore runs
    pb.RestoreStatus.PHASE_UNSPECIFIED,
    pb.RestoreStatus.PHASE_RELEASED,
    pb.RestoreStatus.PHASE_ABORTED,
)
PREPARED = pb.RestoreStatus.PHASE_PREPARED
STATES = {  # by reason of the error
    "STARTING": "starting",
    "DRAINING": "draining",
    "RESTORING": "restoring",
    "NOT_A_SHARD": "misplaced",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """State and live figures of one shard. All numbers are None if it did not answer.

    state    "ready"; "starting", "draining" or "restoring": it refuses requests for a while;
             "misplaced": its address is at the wrong position of the list, or its server belongs
             to no shard; "forbidden": the client has no right to ask it; "unreachable"
    problem  reason why it is not ready; None: it is ready
    live     message GetStatusResponse, whose fields ps.proto explains: requests, latencies, tables,
             budgets, subscribers and more; None: it did not answer, or has an older release

    Counts in ``live`` grow from the start of the server on. So a rate is the difference between two
    answers, divided by the difference of their ``live.uptime_seconds``.
    """

    shard: int  # position of its address in the list
    address: str
    state: str
    problem: str | None = None
    release: str | None = None
    uptime_seconds: float | None = None
    version: int | None = None
    durable_version: int | None = None  # this and the next three: None without a data directory
    log_first_version: int | None = None  # oldest version that the version log still has
    log_bytes: int | None = None
    flush_age_seconds: float | None = None  # age of the oldest change that a restart would replay
    tables: int | None = None
    rows: int | None = None
    memory_bytes: int | None = None
    memory_budget_bytes: int | None = None
    gpu_bytes: int | None = None  # this and the next two: None if the server uses no GPU
    gpu_budget_bytes: int | None = None
    gpu_paused: bool | None = None  # no rows are moved to the GPU, because it has no memory
    damaged_blocks: int | None = None  # blocks of rows on disk that are known to be damaged
    live: pb.GetStatusResponse | None = None

    @property
    def ready(self) -> bool:
        """Return whether the shard accepts requests."""
        return self.state == "ready"


def status(
    where: str | Sequence[str], *, timeout: float = 5.0, access: Access | None = None
) -> list[ShardStatus]:
    """Return the state of every shard, in order. Raises InvalidArgument for invalid variables.

    where    "host:port" of every shard, in order; or one "name:port" that leads to all shards
    timeout  seconds to wait for each shard, and for the search behind a name
    access   how to connect; None: as the environment variables say
    """
    access = access or Access()
    if isinstance(where, str):
        return _behind(where, max(timeout, 0.01), access)
    shards = range(len(where))
    with ThreadPoolExecutor(max(1, min(len(where), 64)), "psclient-status") as pool:
        return list(
            pool.map(lambda i: _ask(i, len(where), where[i], max(timeout, 0.01), access), shards)
        )


def _behind(name: str, timeout: float, access: Access) -> list[ShardStatus]:
    """Return the state of every shard behind a DNS name; see ``status``.

    Shards that were not found are "unreachable". Servers that belong to no shard follow after the
    shards, and are "misplaced". If there is none, or more than one cluster, the
    list has one item, with the reason.
    """
    if wrong := addresses.problem(name):
        text = f"{name!r}: {wrong}"
        return [ShardStatus(shard=0, address=name, state="unreachable", problem=text)]
    discovery = Discovery(name, access)
    deadline = time.monotonic() + timeout
    with closing(discovery):
        while not (discovery.complete() or discovery.heard) and time.monotonic() < deadline:
            discovery.step(deadline)
        known, problem = {each.shard: each for each in discovery.best()}, discovery.problem()
    if not known or isinstance(problem, InvalidArgument):
        return [ShardStatus(shard=0, address=name, state="unreachable", problem=str(problem))]
    shards = next(iter(known.values())).shards
    with ThreadPoolExecutor(min(shards, 64), "psclient-status") as pool:
        asked = {
            i: pool.submit(_ask, i, shards, each.address, timeout, access, host_of(name))
            for i, each in known.items()
        }
    gone = [i for i in range(shards) if i not in asked]
    missing = [
        ShardStatus(shard=i, address=name, state="unreachable", problem=str(problem)) for i in gone
    ]
    answered = [each.result() for each in asked.values()]
    surplus = [
        ShardStatus(shard=i, address=each, state="misplaced", problem=discovery.errors[each])
        for i, each in enumerate(sorted(discovery.surplus), shards)
    ]
    return sorted((*answered, *missing, *surplus), key=lambda each: each.shard)


def _ask(
    shard: int, shards: int, address: str, timeout: float, access: Access, name: str = ""
) -> ShardStatus:
    """Ask one shard for its state. An error becomes part of the result.

    shard    position of its address in the list
    shards   number of addresses in the list
    timeout  seconds
    access   how to connect
    name     DNS name through which the shard was found; "": none
    """
    if wrong := addresses.problem(address):
        return ShardStatus(
            shard=shard, address=address, state="unreachable", problem=f"{address!r}: {wrong}"
        )
    live = None
    try:
        with closing(Channel(Route(address, name=name), access)) as channel:
            live = _live(channel, timeout, address)
            if live is not None and live.phase == pb.PHASE_READY:
                return _ready(live, shard, shards, address)
            info = call_shard(
                channel, "InfoService/GetServerInfo", pb.GetServerInfoRequest(), timeout, address
            )
            answer = answer_of(pb.GetServerInfoResponse, info, address)
            state, problem = _state(channel, answer, shard, shards, address, timeout)
    except PsError as error:
        state = STATES.get(error.reason, "unreachable")
        if isinstance(error, (Unauthenticated, PermissionDenied)):
            state = "forbidden"
        return ShardStatus(shard=shard, address=address, state=state, problem=str(error), live=live)
    return replace(_answered(answer, shard, address, state, problem), live=live)


def _live(channel: Channel, timeout: float, address: str) -> pb.GetStatusResponse | None:
    """Ask a shard for its live figures; return None if its release is too old for that."""
    try:
        data = call_shard(channel, "InfoService/GetStatus", pb.GetStatusRequest(), timeout, address)
    except Unimplemented:
        return None
    return answer_of(pb.GetStatusResponse, data, address)


def _ready(live: pb.GetStatusResponse, shard: int, shards: int, address: str) -> ShardStatus:
    """Return the ShardStatus of a shard that serves requests; the arguments are fields of it.

    shards  number of addresses in the list
    """
    problem = _misplaced(live.shard, live.shards, shard, shards, address)
    budgets = {each.name: each for each in live.budgets}
    memory, gpu = budgets.get("host_bytes"), budgets.get("hbm_bytes")
    log = live.log if live.HasField("log") else None
    return ShardStatus(
        shard=shard,
        address=address,
        state="misplaced" if problem else "ready",
        problem=problem,
        release=live.release,
        uptime_seconds=live.uptime_seconds,
        version=live.version,
        durable_version=log.durable_version if log else None,
        log_first_version=log.first_version if log else None,
        log_bytes=log.bytes if log else None,
        flush_age_seconds=live.storage.flush_age_seconds if live.HasField("storage") else None,
        tables=live.table_count,
        rows=live.rows,
        memory_bytes=memory.used if memory else None,
        memory_budget_bytes=memory.limit if memory else None,
        gpu_bytes=gpu.used if gpu else None,
        gpu_budget_bytes=gpu.limit if gpu else None,
        gpu_paused=live.gpu_paused if gpu else None,
        damaged_blocks=live.damaged_blocks,
        live=live,
    )


def _misplaced(number: int, count: int, shard: int, shards: int, address: str) -> str | None:
    """Return why a server is not the expected shard; None: it is.

    number, count  its own number, and its number of shards
    shard, shards  expected: position of its address in the list, and length of the list
    """
    if (number, count) == (shard, shards):
        return None
    return f"{address} is shard {number} of {count}, but is listed as shard {shard} of {shards}"


def _answered(
    answer: pb.GetServerInfoResponse, shard: int, address: str, state: str, problem: str | None
) -> ShardStatus:
    """Return the ShardStatus of a shard that answered; the other arguments are fields of it."""
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
        gpu_bytes=answer.gpu_bytes if answer.gpu_budget_bytes else None,
        gpu_budget_bytes=answer.gpu_budget_bytes or None,
        gpu_paused=answer.gpu_paused if answer.gpu_budget_bytes else None,
        damaged_blocks=answer.damaged_blocks,
    )


def _state(
    channel: Channel,
    info: pb.GetServerInfoResponse,
    shard: int,
    shards: int,
    address: str,
    timeout: float,
) -> tuple[str, str | None]:
    """Return (state, problem), as in ShardStatus, of a shard that answered ``info``.

    The other arguments are those of ``_ask``.
    """
    problem = _misplaced(info.shard, info.shard_map.shards, shard, shards, address)
    if problem is not None:
        return "misplaced", problem
    data = call_shard(channel, "CheckpointService/Restore", pb.RestoreRequest(), timeout, address)
    restore = answer_of(pb.RestoreStatus, data, address)
    if restore.phase in (*OVER, PREPARED):
        return "ready", None
    phase = pb.RestoreStatus.Phase.Name(restore.phase).removeprefix("PHASE_").lower()
    return "restoring", f"restore of checkpoint {restore.name!r}, phase {phase}"


class Unimplemented(PsError):
    """A server does not have a method, because its release is older."""


def call_shard(channel: Channel, method: str, request: Any, timeout: float, address: str) -> bytes:
    """Call a method of a shard; return the encoded answer. Raises a PsError.

    method   "Service/Method", in the package ps.v1
    request  protobuf message
    timeout  seconds
    """
    try:
        return channel.call(f"/ps.v1.{method}", request.SerializeToString(), timeout)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise Unimplemented(f"{address}: the server does not have {method}") from None
        raise rpc_error(error, channel, address) from None
    except ValueError as error:  # gRPC cannot parse the address
        raise InvalidArgument(f"{address}: {error}") from None
