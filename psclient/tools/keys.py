"""Find the row of a key, or the reason why the key has no row.

>>> inspect(ps, "user", [42])[0].reason  # doctest: +SKIP
'has a row in tier host'
"""

from __future__ import annotations

import operator
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
MOST_KEYS = 1000  # maximum number of keys per message
STATES = {
    pb.KeyFacts.STATE_ROW: "row",
    pb.KeyFacts.STATE_WAITING: "waiting",
    pb.KeyFacts.STATE_GONE: "gone",
    pb.KeyFacts.STATE_NEW: "new",
    pb.KeyFacts.STATE_UNKNOWN: "unknown",
}


@dataclass(frozen=True, slots=True)
class Deletion:
    """One past deletion of a key's row, which the shard still has a record of."""

    version: int  # version of the shard after the deletion
    cause: str  # request, step_ttl, time_ttl, norm, capacity
    time: float | None  # seconds since 1970; None: no longer in the version log
    step: int | None  # largest step pushed to the table before; None: no longer in the version log

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
    """State of one key on its shard. Fields that do not apply are None."""

    key: int  # as passed by the caller
    shard: int  # number of the shard that owns the key
    state: str  # row, waiting (for admission), gone (deleted), new (never pushed), unknown
    # Properties of the key's row; None unless the state is "row":
    tier: str | None
    version: int | None
    step: int | None
    frequency: int | None
    norm: float | None
    embedding: NDArray[np.float32] | None  # [dim], if asked for
    waiting: int  # occurrences counted so far by the admission rule
    threshold: int | None  # occurrences after which the admission rule admits a key
    deletions: tuple[Deletion, ...]  # past deletions that the shard still records, oldest first
    why: str  # if the state is "unknown": the records that the shard no longer has

    @property
    def reason(self) -> str:
        """Return where the row is, or why there is none, as text: "has a row in tier host"."""
        match self.state:
            case "row":
                return f"has a row in tier {self.tier}"
            case "waiting":
                return f"waits for admission: {self.waiting} of {self.threshold} occurrences"
            case "gone":
                return str(self.deletions[-1])
            case "new":
                return "was never pushed"
        return f"has no record: it was never pushed, or its record is lost ({self.why})"


def inspect(
    client: Client, table: str, keys: Sequence[int] | NDArray[Any], *, embeddings: bool = False
) -> list[KeyInfo]:
    """Return the state of each key, in the order of ``keys``. Changes nothing.

    keys        integers in -2^63..2^64-1; duplicates are allowed
    embeddings  return the embeddings of the rows too

    Raises TableNotFound, and InvalidArgument for a key that is not such an integer.
    """
    try:
        asked = [operator.index(key) for key in keys]
    except TypeError as error:
        raise InvalidArgument(f"keys must be integers: {error}") from error
    if outside := [key for key in asked if not -(1 << 63) <= key < 1 << 64]:
        raise InvalidArgument(f"each key must be in -2^63..2^64-1, got {outside[0]}")
    if not asked:
        client.describe_table(table)  # raises TableNotFound
    every = np.array([key % (1 << 64) for key in asked], np.uint64)
    distinct, inverse = np.unique(every, return_inverse=True)
    answers = _answers(client, table, distinct, embeddings)
    return [_key(key, *answers[i]) for key, i in zip(asked, inverse.tolist(), strict=True)]


Answer = tuple[int, pb.KeyFacts, pb.Rule]  # (shard, its facts about a key, table's admission rule)


def _answers(
    client: Client, table: str, keys: NDArray[np.uint64], embeddings: bool
) -> dict[int, Answer]:
    """Ask the shard that owns each key for the key's state; return {index in ``keys``: answer}.

    keys  uint64[n], distinct
    """
    cluster = client._connect()
    owners = routing.owners(keys, cluster.shard_map)
    answers: dict[int, Answer] = {}
    for shard, link in enumerate(cluster.links):
        mine = np.flatnonzero(owners == shard)
        for at in range(0, len(mine), MOST_KEYS):
            some = mine[at : at + MOST_KEYS]
            request = pb.InspectRequest(
                table=table, keys=keys[some].tobytes(), embeddings=embeddings
            )
            answer = calls.call(
                client, link, "Inspect", request, pb.InspectResponse, service=SERVICE
            )
            for i, facts in zip(some.tolist(), answer.keys, strict=True):
                answers[i] = (shard, facts, answer.admission)
    return answers


def _key(key: int, shard: int, facts: pb.KeyFacts, admission: pb.Rule) -> KeyInfo:
    """Convert a shard's answer about one key to a KeyInfo.

    key        the key, as the caller passed it
    facts      the answer
    admission  the table's admission rule
    """
    exists = facts.state == pb.KeyFacts.STATE_ROW
    threshold = admission.parameters.get("threshold") if admission.name else None
    return KeyInfo(
        key,
        shard,
        STATES.get(facts.state, "unknown"),
        facts.tier if exists else None,
        facts.version if exists else None,
        facts.step if exists else None,
        facts.frequency if exists else None,
        facts.norm if exists else None,
        np.array(facts.embedding, np.float32) if facts.embedding else None,
        facts.waiting,
        None if threshold is None else int(threshold),
        tuple(map(_deletion, facts.gone)),
        facts.why,
    )


def _deletion(gone: Any) -> Deletion:
    """Convert a deletion in a shard's answer to a Deletion."""
    return Deletion(
        gone.version,
        gone.cause,
        gone.time_us / 1e6 if gone.HasField("time_us") else None,
        gone.step if gone.HasField("step") else None,
    )
