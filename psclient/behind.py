"""Compare a saved trainer with its servers, and decide how the trainer can come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psclient import restores
from psclient.client import Client
from psclient.errors import TrainerBehind
from psclient.status import OVER, PREPARED
from psclient.trainerstate import RankState, SessionState, ShardState, TrainerState
from psproto import ps_pb2 as pb

POLICIES = ("rewind", "once", "ahead")
REFUSED = "cannot resume with policy"


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the servers stand.

    shards  lineage and version of each shard
    step    largest training step pushed to any of the trainer's tables; 0: none
    """

    shards: list[ShardState]
    step: int


def look(client: Client, tables: Sequence[str] | None) -> Servers:
    """Ask all shards where they stand.

    tables  names of the trainer's tables, of which some may not exist; None: all tables
    """
    shards = shards_of(client)
    step = 0
    for table in client.list_tables():
        if tables is not None and table.name not in tables:
            continue
        request = pb.InspectRequest(table=table.name)
        for answer in client._on_all("AnalysisService/Inspect", request, pb.InspectResponse):
            step = max(step, answer.step)
    return Servers(shards, step)


def shards_of(client: Client) -> list[ShardState]:
    """Return lineage and version of each shard."""
    request = pb.GetServerInfoRequest()
    infos = client._on_all("InfoService/GetServerInfo", request, pb.GetServerInfoResponse)
    return [ShardState(info.lineage.hex(), info.version) for info in infos]


def differences(state: TrainerState, servers: Servers) -> list[str]:
    """Return in which respects the servers are not where they were at the cut; []: in none."""
    if len(state.shards) != len(servers.shards):
        return [f"the cut has {len(state.shards)} shards, the cluster {len(servers.shards)}"]
    found = []
    for shard, (then, now) in enumerate(zip(state.shards, servers.shards, strict=True)):
        if then.lineage != now.lineage:
            found.append(f"shard {shard} has a new log: it was restored, or its data was replaced")
        elif then.version != now.version:
            found.append(
                f"shard {shard} was at version {then.version:,}, and is at {now.version:,}"
            )
    return found


def gap_of(state: TrainerState, servers: Servers) -> int:
    """Return the number of training steps that the servers have seen since the cut."""
    return max(0, servers.step - state.seen)


def require_policy(
    policy: str | None, state: TrainerState, servers: Servers, ranks: int
) -> str | None:
    """Return the policy to apply; None if the trainer can go on from the cut without one.

    policy  the caller's
    ranks   number of processes of the trainer now

    Raises TrainerBehind if a policy is needed and missing, or is not possible.
    """
    problems = {each: _problem(each, state, servers, ranks) for each in POLICIES}
    found = differences(state, servers)
    if not found and len(state.ranks) == ranks:
        return None
    if policy is None:
        raise TrainerBehind(_choice(state, servers, found, problems))
    if problem := problems[policy]:
        possible = [each for each in POLICIES if problems[each] is None]
        others = " or ".join(map(repr, possible)) or "none of the others either: begin anew"
        raise TrainerBehind(
            f"{REFUSED} {policy!r}: {problem}; {_where(state, servers)}; possible: {others}"
        )
    return policy


def _problem(policy: str, state: TrainerState, servers: Servers, ranks: int) -> str | None:
    """Return why a policy is not possible; None: it is."""
    if policy == "rewind":
        return None
    same = [one.lineage for one in state.shards] == [one.lineage for one in servers.shards]
    if policy == "ahead":
        if same and servers.step < state.seen:
            return (
                "the pushes carry no training step, so that the gap is unknown: pass step= to push"
            )
        return None
    if not same:
        return "the servers were restored, or are others, and do not know the pushes since the cut"
    if any(
        now.version < then.version for then, now in zip(state.shards, servers.shards, strict=True)
    ):
        return "a shard has lost changes from before the cut"
    if len(state.ranks) != ranks:
        return f"the cut has {len(state.ranks)} ranks, and the trainer now has {ranks}"
    return None


def _where(state: TrainerState, servers: Servers) -> str:
    return f"dense is at step {state.seen:,}, servers saw {servers.step:,}"


def _choice(
    state: TrainerState,
    servers: Servers,
    found: Sequence[str],
    problems: dict[str, str | None],
) -> str:
    """Return the text of the error that asks for a policy."""
    gap = gap_of(state, servers)
    does = {
        "rewind": f"restore checkpoint {state.checkpoint!r}, which undoes all pushes since",
        "once": f"compute the {gap:,} steps again, each push taking effect once",
        "ahead": f"keep the rows, and leave the {gap:,} steps out of the dense state",
    }
    parts = [
        f"{policy!r} ({does[policy]})" if problem is None else f"not {policy!r} ({problem})"
        for policy, problem in problems.items()
    ]
    why = "; ".join(found[:3]) or "the number of ranks is another"
    return f"{_where(state, servers)}; {why}; call resume with a policy: {', '.join(parts)}"


def interrupted(client: Client) -> set[str]:
    """Return the names of the checkpoints of restores that have begun and not ended. While there is
    one, the shards refuse other calls.
    """
    over = (*OVER, PREPARED)
    return {each.name for each in restores.statuses_of(client) if each.phase not in over}


def renumbered(state: TrainerState, everybody: list[list[SessionState]]) -> list[RankState]:
    """Return the ranks of a trainer whose pushes are numbered from 1 again.

    state      has the ranks' sessions before
    everybody  the new sessions of all ranks

    If the ranks and shards are the same, they keep their client ids, with a larger incarnation: so
    the shards refuse pushes that a process from before has left on the way.
    """
    ranks = []
    for rank, sessions in enumerate(everybody):
        before = state.ranks[rank] if rank < len(state.ranks) else RankState(None, [])
        if len(before.sessions) == len(sessions):
            sessions = [
                SessionState(old.client_id, max(old.incarnation + 1, new.incarnation), 0)
                for old, new in zip(before.sessions, sessions, strict=True)
            ]
        ranks.append(RankState(before.position, sessions))
    return ranks
