"""What is known of a key: where its row is, or why it has none.

inspect(ps, "user", [42])[0].reason
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient import calls
from psclient.client import Client
from psclient.errors import InvalidArgument
from psproto import ps_pb2 as pb
from psproto import routing

SERVICE = "AnalysisService"
MOST_KEYS = 1000  # inspected in one message
STATES = {
    pb.KeyFacts.STATE_ROW: "row",
    pb.KeyFacts.STATE_WAITING: "waiting",
    pb.KeyFacts.STATE_GONE: "gone",
    pb.KeyFacts.STATE_NEW: "new",
    pb.KeyFacts.STATE_UNKNOWN: "unknown",
}


@dataclass(frozen=True, slots=True)
class Gone:
    """A delete that is remembered."""

    version: int  # of the shard, with which the row went
    cause: str  # request, step_ttl, time_ttl, norm, capacity
    time: float | None  # seconds since 1970; None: it is not in the log any more
    step: int | None  # the largest that had been pushed to the table; None alike

    def __str__(self) -> str:
        what = "deleted on request" if self.cause == "request" else f"evicted by {self.cause}"
        at = f"version {self.version}"
        if self.step is not None:
            at += f", step {self.step}"
        if self.time is not None:
            at += time.strftime(", %Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return f"{what} at {at}"


@dataclass(frozen=True, slots=True, eq=False)
class KeyInfo:
    """What the servers know of a key."""

    key: int  # as it was asked for
    shard: int
    state: str  # row, waiting, gone, new, unknown
    tier: str | None  # of its row, as all up to the embedding
    version: int | None
    step: int | None
    frequency: int | None
    norm: float | None
    embedding: NDArray[np.float32] | None
    waiting: int  # occurrences that are counted towards admission
    threshold: int | None  # at which it is admitted
    gone: tuple[Gone, ...]  # deletes of it that are remembered, by version
    why: str

    @property
    def reason(self) -> str:
        """Where its row is, or why it has none, as a sentence."""
        match self.state:
            case "row":
                return f"has a row in tier {self.tier}"
            case "waiting":
                return f"waits for admission with {self.waiting} of {self.threshold} occurrences"
            case "gone":
                return str(self.gone[-1])
            case "new":
                return "was never pushed"
        return f"was never pushed, or that is forgotten: {self.why}"


def inspect(
    client: Client, table: str, keys: Sequence[int] | NDArray[Any], *, embeddings: bool = False
) -> list[KeyInfo]:
    """What the servers know of keys, in their order; any 64-bit keys, duplicates too.

    Raises TableNotFound.
    """
    asked = [int(key) for key in keys]
    if strange := [key for key in asked if not -(1 << 63) <= key < 1 << 64]:
        raise InvalidArgument(f"key {strange[0]} has more than 64 bits")
    every = np.array([key % (1 << 64) for key in asked], np.uint64)
    distinct, inverse = np.unique(every, return_inverse=True)
    cluster = client._connect()
    owners = routing.owners(distinct, cluster.shard_map)
    found: list[Any] = [None] * len(distinct)
    for shard, link in enumerate(cluster.links):
        mine = np.flatnonzero(owners == shard)
        for at in range(0, len(mine), MOST_KEYS):
            some = mine[at : at + MOST_KEYS]
            request = pb.InspectRequest(
                table=table, keys=distinct[some].tobytes(), embeddings=embeddings
            )
            answer = calls.call(
                client, link, "Inspect", request, pb.InspectResponse, service=SERVICE
            )
            for i, facts in zip(some.tolist(), answer.keys, strict=True):
                found[i] = (shard, facts, answer.admission)
    if not asked:
        client.describe_table(table)  # TableNotFound
    return [_key(key, *found[i]) for key, i in zip(asked, inverse.tolist(), strict=True)]


def _key(key: int, shard: int, facts: pb.KeyFacts, admission: pb.Rule) -> KeyInfo:
    there = facts.state == pb.KeyFacts.STATE_ROW
    threshold = admission.parameters.get("threshold") if admission.name else None
    return KeyInfo(
        key,
        shard,
        STATES.get(facts.state, "unknown"),
        facts.tier if there else None,
        facts.version if there else None,
        facts.step if there else None,
        facts.frequency if there else None,
        facts.norm if there else None,
        np.array(facts.embedding, np.float32) if facts.embedding else None,
        facts.waiting,
        None if threshold is None else int(threshold),
        tuple(
            Gone(
                gone.version,
                gone.cause,
                gone.time_us / 1e6 if gone.HasField("time_us") else None,
                gone.step if gone.HasField("step") else None,
            )
            for gone in facts.gone
        ),
        facts.why,
    )
