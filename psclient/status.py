"""Ask every shard for its state and its live figures. Works even while some shards are down.

A shard answers GetStatus at any time. If it is not ready, it is also asked what it refuses requests
for. Servers of older releases, which do not have GetStatus, are only asked for the latter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
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
KEPT_SECONDS = 10.0  # time for which a Watch looks for no other servers behind a name
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
    with closing(Watch(where, access)) as watch:
        return watch.status(timeout)


class Watch:
    """Asks all shards for their state as often as ``status`` is called. Its connections stay open,
    except those to addresses that shards have left.

    where   "host:port" of every shard, in order; or one "name:port" that leads to all shards
    access  how to connect; None: as the environment variables say

    Must be used by one thread, and closed. Raises InvalidArgument for invalid variables.
    """

    def __init__(self, where: str | Sequence[str], access: Access | None = None) -> None:
        self._where = where
        self._access = access or Access()
        self._channels: dict[tuple[str, str], Channel] = {}  # by address and name
        self._opening = threading.Lock()
        most = 64 if isinstance(where, str) else max(1, min(len(where), 64))
        self._pool = ThreadPoolExecutor(most, "psclient-status")
        self._behind_name: dict[int, str] = {}  # shard -> address; empty: look for them
        self._searched = 0.0  # monotonic time at which they were found

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        for channel in self._channels.values():
            channel.close()

    def status(self, timeout: float = 5.0) -> list[ShardStatus]:
        """Return the state of every shard, in order.

        timeout  seconds to wait for each shard, and for the search behind a name
        """
        timeout = max(timeout, 0.01)
        if isinstance(self._where, str):
            return self._behind(self._where, timeout)
        return self._ask_all(dict(enumerate(self._where)), len(self._where), timeout)

    def _ask_all(
        self, servers: Mapping[int, str], shards: int, timeout: float, name: str = ""
    ) -> list[ShardStatus]:
        """Ask some shards; return their states in the order of ``servers``.

        servers  shard -> its address
        shards   number of shards in the cluster
        timeout  seconds
        name     DNS name through which the shards were found; "": none
        """

        self._forget_all_but(servers.values())

        def ask(server: tuple[int, str]) -> ShardStatus:
            shard, address = server
            if wrong := addresses.problem(address):
                problem = f"{address!r}: {wrong}"
                return ShardStatus(
                    shard=shard, address=address, state="unreachable", problem=problem
                )
            return _ask(self._channel(address, name), shard, shards, address, timeout)

        return list(self._pool.map(ask, servers.items()))

    def _forget_all_but(self, asked: Collection[str]) -> None:
        """Close the connections to addresses that are not to be asked any more."""
        for key in [key for key in self._channels if key[0] not in asked]:
            self._channels.pop(key).close()

    def _channel(self, address: str, name: str) -> Channel:
        """Return the connection to an address that was found through the DNS name ``name``."""
        with self._opening:
            found = self._channels.get((address, name))
            if found is None:
                found = Channel(Route(address, name=name), self._access)
                self._channels[address, name] = found
            return found

    def _behind(self, name: str, timeout: float) -> list[ShardStatus]:
        """Return the state of every shard behind a DNS name; ``timeout`` in seconds.

        Shards that were not found are "unreachable". Servers that belong to no shard follow after
        the shards, and are "misplaced". If there is none, or more than one cluster, the list has
        one item, with the reason. Shards that were all found and ready are asked again for
        KEPT_SECONDS without a new search.
        """
        if wrong := addresses.problem(name):
            text = f"{name!r}: {wrong}"
            return [ShardStatus(shard=0, address=name, state="unreachable", problem=text)]
        host, known = host_of(name), self._behind_name
        if known and time.monotonic() - self._searched < KEPT_SECONDS:
            answered = self._ask_all(known, len(known), timeout, host)
            if all(each.ready for each in answered):
                return answered
        return self._search(name, timeout)

    def _search(self, name: str, timeout: float) -> list[ShardStatus]:
        """Look for the shards behind a DNS name and ask them; see ``_behind``."""
        discovery = Discovery(name, self._access)
        deadline = time.monotonic() + timeout
        with closing(discovery):
            while not (discovery.complete() or discovery.heard) and time.monotonic() < deadline:
                discovery.step(deadline)
            found, problem = {each.shard: each for each in discovery.best()}, discovery.problem()
        self._behind_name = {}
        if not found or isinstance(problem, InvalidArgument):
            self._forget_all_but(())
            return [ShardStatus(shard=0, address=name, state="unreachable", problem=str(problem))]
        shards = next(iter(found.values())).shards
        servers = {shard: found[shard].address for shard in sorted(found)}
        answered = self._ask_all(servers, shards, timeout, host_of(name))
        gone = [i for i in range(shards) if i not in found]
        missing = [
            ShardStatus(shard=i, address=name, state="unreachable", problem=str(problem))
            for i in gone
        ]
        surplus = [
            ShardStatus(shard=i, address=each, state="misplaced", problem=discovery.errors[each])
            for i, each in enumerate(sorted(discovery.surplus), shards)
        ]
        if not missing and not surplus and all(each.ready for each in answered):
            self._behind_name, self._searched = servers, time.monotonic()
        return sorted((*answered, *missing, *surplus), key=lambda each: each.shard)


def _ask(channel: Channel, shard: int, shards: int, address: str, timeout: float) -> ShardStatus:
    """Ask one shard for its state. An error becomes part of the result.

    channel  connection to it
    shard    position of its address in the list
    shards   number of addresses in the list
    timeout  seconds
    """
    live = None
    try:
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
