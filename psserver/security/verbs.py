"""Verbs: what a policy can allow. One table has the rights that each gRPC method needs.

A right is a pair (verb, table), for example ("push", "ads.user"). Verbs in SHARD_VERBS concern the
whole shard; their rights have the table "". A method with the verb ANY needs any right at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from psproto import ps_pb2 as pb

TABLE_VERBS = (
    "pull",  # read embeddings
    "push",  # apply gradients
    "delete",  # delete rows
    "create",
    "alter",
    "drop",
    "evict",
    "analyze",  # Analyze, Inspect and VerifyRows
    "subscribe",
    "export",  # read whole rows
    "import",  # write whole rows
    "load",  # fill a table from a checkpoint, and be the table in the checkpoint
)
SHARD_VERBS = (
    "checkpoint",  # write, list and verify checkpoints, and place barriers
    "delete_checkpoints",
    "restore",
    "status",  # live data of all tables
    "admin",  # Diagnose and reflection
)
VERBS = (*TABLE_VERBS, *SHARD_VERBS)
ANY = "any"

Right: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the caller of one gRPC method needs.

    verbs    the caller needs at least one of these verbs, on any table; checked before the request
             is decoded. An empty list allows the method to everybody, without credentials
    needs    function of the decoded request that returns the rights that it needs; None: the code
             that decodes the request checks them, or any right is enough
    audited  each call is recorded in the audit log
    details  fields of the request that the record contains
    """

    verbs: Sequence[str] = (ANY,)
    needs: Callable[[Any], list[Right]] | None = None
    audited: bool = False
    details: Sequence[str] = ()


def _on(verb: str, field: str, *details: str, audited: bool = False) -> Rule:
    """Return the rule of a method that needs ``verb`` on the table named in a field.

    field    name of the field, for example "name" or "schema.name"
    details  other fields of the request that the audit log contains
    """
    path = field.split(".")

    def needs(request: Any) -> list[Right]:
        value = request
        for name in path:
            value = getattr(value, name)
        return [(verb, value)]

    return Rule(verbs=(verb,), needs=needs, audited=audited, details=details)


def _shard(*verbs: str, audited: bool = False, details: Sequence[str] = ()) -> Rule:
    """Return the rule of a method that needs one of some verbs about the whole shard."""
    return Rule(verbs=verbs, audited=audited, details=details)


def _describe(request: pb.DescribeTableRequest) -> list[Right]:
    return [(ANY, request.name)]


def _load(request: pb.LoadTableRequest) -> list[Right]:
    """Return the rights for LoadTable. With ``replace`` it drops the rows of the target."""
    drop = [("drop", request.into)] if request.replace else []
    return [("load", request.table), ("load", request.into), *drop]


def _subscribe(request: pb.SubscribeRequest) -> list[Right]:
    """Return the rights for Subscribe. Without table names it is about all tables: "*"."""
    return [("subscribe", table) for table in request.tables or ("*",)]


OPEN = Rule(verbs=())
ADMIN = _shard("admin")
PART = ("name", "attempt")

METHODS: dict[str, Rule] = {
    "/ps.v1.TableService/CreateTable": _on("create", "schema.name", audited=True),
    "/ps.v1.TableService/DescribeTable": Rule(needs=_describe),
    "/ps.v1.TableService/ListTables": Rule(),  # the answer has only tables with a right
    "/ps.v1.TableService/AlterTable": _on("alter", "schema.name", "fields", audited=True),
    "/ps.v1.TableService/DropTable": _on("drop", "name", audited=True),
    "/ps.v1.TableService/Evict": _on("evict", "table", "dry_run", audited=True),
    "/ps.v1.RowService/Pull": Rule(verbs=("pull",)),
    "/ps.v1.RowService/Push": Rule(verbs=("push",)),
    "/ps.v1.RowService/Exchange": Rule(verbs=("pull", "push")),
    "/ps.v1.RowService/Delete": Rule(verbs=("delete",), audited=True),
    "/ps.v1.RowService/Stream": Rule(verbs=("pull", "push")),
    "/ps.v1.LogService/WaitDurable": Rule(),
    "/ps.v1.LogService/Barrier": _shard("checkpoint", audited=True, details=("name",)),
    "/ps.v1.LogService/Subscribe": Rule(verbs=("subscribe",), needs=_subscribe),
    "/ps.v1.CheckpointService/WriteCheckpoint": _shard("checkpoint", audited=True, details=PART),
    "/ps.v1.CheckpointService/CompleteCheckpoint": _shard("checkpoint", audited=True, details=PART),
    "/ps.v1.CheckpointService/ListCheckpoints": _shard("checkpoint", "restore"),
    "/ps.v1.CheckpointService/VerifyCheckpoint": _shard("checkpoint", "restore"),
    "/ps.v1.CheckpointService/PrepareRestore": _shard(
        "restore", audited=True, details=("name", "id", "replace")
    ),
    "/ps.v1.CheckpointService/Restore": _shard("restore", audited=True, details=("id", "step")),
    "/ps.v1.CheckpointService/LoadTable": Rule(
        verbs=("load",), needs=_load, audited=True, details=("name", "id", "replace")
    ),
    "/ps.v1.CheckpointService/DeleteCheckpoints": _shard(
        "delete_checkpoints", audited=True, details=("names", "keep", "dry_run", "id")
    ),
    # only the principal whose call waits can continue it
    "/ps.v1.CheckpointService/Continue": _shard("load", "delete_checkpoints"),
    "/ps.v1.CheckpointService/ReadRows": _on("export", "table"),
    "/ps.v1.CheckpointService/WriteRows": Rule(verbs=("import",), audited=True),
    "/ps.v1.AnalysisService/Analyze": _on("analyze", "table"),
    "/ps.v1.AnalysisService/Inspect": _on("analyze", "table"),
    "/ps.v1.AnalysisService/VerifyRows": _on("analyze", "table"),
    "/ps.v1.InfoService/GetServerInfo": Rule(),
    "/ps.v1.InfoService/GetStatus": _shard("status"),
    "/ps.v1.InfoService/Diagnose": ADMIN,
    "/grpc.health.v1.Health/Check": OPEN,
    "/grpc.health.v1.Health/List": OPEN,
    "/grpc.health.v1.Health/Watch": OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ADMIN,
}
PATHS = {  # short name of a method of ps.v1 -> its full name
    path.rpartition("/")[2]: path for path in METHODS if path.startswith("/ps.v1.")
}
LANE = "lane"  # stands for the name of a method: exchanges over the same-host lane
METHODS[LANE] = Rule(verbs=("pull", "push"))
