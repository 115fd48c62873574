"""Check a whole cluster: names, shards, releases, clocks, and each shard's own machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import grpc

from psclient.access import Access, host_of
from psclient.channel import Channel
from psclient.errors import ServerFailure, answer_of
from psclient.lookup import look_up
from psclient.retry import rpc_error
from psclient.routes import Route
from psclient.status import ShardStatus, status
from psclient.tools import resources
from psproto import RELEASE
from psproto import ps_pb2 as pb

SLOW_NAME = 0.5  # seconds of a look-up of a name that are a warning
CLOCK_SECONDS, CLOCK_ERROR = 1.0, 60.0  # differences of clocks that are a warning, and an error
UPGRADE = "complete or undo the upgrade: run the same release everywhere"
AGAIN = "repeat this with a longer --timeout, or run psserver doctor where the shard runs"
ADVICE = {  # by the state of a shard that is not ready
    "starting": "wait; if it takes long, read its log: it replays its version log",
    "draining": "wait until it has stopped and started again",
    "restoring": "wait, or see psctl restore --abort",
    "misplaced": "start only as many servers as there are shards; list them in the order of their"
    " numbers, or give the one name of all",
    "forbidden": "use a token or certificate with the right: docs/security.md",
    "unreachable": "check that its server runs, then the name, the port and the network policy",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    shard   number of the shard; None: the check is about the cluster
    check   what was checked, for example "memory"
    state   "ok"; "warning": it works, but not well; "error": it does not work, or not for long
    found   the facts
    advice  what to do; "" if there is nothing to do
    """

    shard: int | None
    check: str
    state: str
    found: str
    advice: str = ""


def examine(
    where: str | Sequence[str], *, timeout: float = 10.0, access: Access | None = None
) -> list[Finding]:
    """Return the results of all checks. Raises InvalidArgument for invalid variables.

    where    "host:port" of every shard, in order; or one "name:port" that leads to all shards
    timeout  seconds to wait for each shard
    access   how to connect; None: as the environment variables say
    """
    access = access or Access()
    name = host_of(where) if isinstance(where, str) else ""
    servers = [where] if isinstance(where, str) else where
    found = [_name(each) for each in dict.fromkeys(servers) if not each.startswith("unix:")]
    shards = status(where, timeout=timeout, access=access)
    found += [_state(each) for each in shards]
    for each in shards:
        if each.live is not None and each.ready:
            found += [Finding(each.shard, *facts) for facts in resources.examine(each.live)]
    found.append(_releases(shards))
    ready = [each for each in shards if each.release is not None]
    with ThreadPoolExecutor(max(1, min(len(ready), 64)), "psclient-doctor") as pool:
        for several in pool.map(lambda each: list(_ask(each, timeout, access, name)), ready):
            found += several
    return found


def _name(address: str) -> Finding:
    """Look up the name of a server."""
    start = time.monotonic()
    try:
        found = look_up(address)
    except (OSError, ValueError) as error:
        advice = "check the name, and the name server of this machine"
        return Finding(None, "name", "error", f"{address} cannot be looked up: {error}", advice)
    seconds = time.monotonic() - start
    count = "1 address" if len(found) == 1 else f"{len(found)} addresses"
    text = f"{address} leads to {count}, looked up in {seconds * 1e3:.0f} ms"
    if seconds < SLOW_NAME:
        return Finding(None, "name", "ok", text)
    return Finding(None, "name", "warning", text, "check the name server: clients wait for it")


def _state(shard: ShardStatus) -> Finding:
    """Report whether a shard is ready, and has all its rows."""
    if not shard.ready:
        found = f"{shard.state}: {shard.problem}"
        return Finding(shard.shard, "shard", "error", found, ADVICE.get(shard.state, ""))
    if shard.damaged_blocks:
        found = f"{shard.damaged_blocks} damaged blocks of rows on disk"
        advice = "see psctl verify, then psctl repair"
        return Finding(shard.shard, "shard", "error", found, advice)
    return Finding(shard.shard, "shard", "ok", f"ready at {shard.address}")


def _releases(shards: Sequence[ShardStatus]) -> Finding:
    """Check that all servers and this command have the same release."""
    servers = sorted({each.release for each in shards if each.release})
    text = f"psctl {RELEASE}, servers {', '.join(servers) or 'unknown'}"
    if len({RELEASE, *servers}) > 1:
        return Finding(None, "release", "warning", text, UPGRADE)
    return Finding(None, "release", "ok", text)


def _ask(shard: ShardStatus, timeout: float, access: Access, name: str) -> Iterator[Finding]:
    """Yield what a shard finds about its machine, and how its clock differs from this machine's."""
    channel = Channel(Route(shard.address, name=name), access)
    try:
        with closing(channel):
            sent = time.time()
            data = channel.call("/ps.v1.InfoService/Diagnose", b"", timeout)
            received = time.time()
    except grpc.RpcError as error:
        advice = UPGRADE if error.code() is grpc.StatusCode.UNIMPLEMENTED else AGAIN
        found = f"cannot be checked: {rpc_error(error, channel, shard.address)}"
        yield Finding(shard.shard, "machine", "warning", found, advice)
        return
    try:
        answer = answer_of(pb.DiagnoseResponse, data, shard.address)
    except ServerFailure as failure:
        yield Finding(shard.shard, "machine", "warning", f"cannot be checked: {failure}", AGAIN)
        return
    for each in answer.findings:
        state = pb.Finding.State.Name(each.state).removeprefix("STATE_").lower()
        yield Finding(shard.shard, each.check, state, each.found, each.advice)
    yield _clock(shard.shard, sent, answer.time, received)


def _clock(shard: int, sent: float, told: float, received: float) -> Finding:
    """Compare a shard's clock with this machine's.

    sent, received  when the question was sent and the answer received, by this machine's clock
    told            time in the answer

    All are in seconds since 1970. The difference is at least what the duration cannot explain.
    """
    difference = max(sent - told, told - received, 0.0)
    text = f"the clock differs from this machine's by {difference:.1f} s"
    if difference < CLOCK_SECONDS:
        return Finding(shard, "time", "ok", text)
    state = "error" if difference >= CLOCK_ERROR else "warning"
    advice = "synchronize the clocks: time_ttl and the times of checkpoints depend on them"
    return Finding(shard, "time", state, text, advice)
