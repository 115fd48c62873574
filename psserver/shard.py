"""One shard's part of every table, without a network.

Not thread-safe: the engine thread is the only caller. Pushes are applied in the order of the
calls; each gets the next version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto.codec import WIRE, Exchanged, Pulled, to_wire
from psproto.ps_pb2 import PullResponseHeader, PushResponse
from psproto.routing import ShardMap
from psserver.errors import BadRequest, TooLarge, VersionInFuture
from psserver.sessions import Sessions
from storage.arena import Budget
from storage.errors import UnknownTable
from storage.schema import TableSchema
from storage.table import Mode, Table, TableStats

_NO_VERSIONS, _NO_STEPS = np.empty(0, np.uint64), np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Push:
    """A push whose keys are distinct and of this shard, and whose gradients are finite."""

    table: str
    keys: NDArray[np.uint64]  # [n]
    counts: NDArray[np.uint32]  # [n]
    gradients: NDArray[np.float32]  # [n, dim]
    step: int
    lr: float | None
    client: int  # 0: not protected against repetition
    incarnation: int
    sequence: int
    acknowledged: int


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull whose keys are of this shard."""

    table: str
    keys: NDArray[np.uint64]  # [n]
    dtype: int
    mode: Mode
    with_metadata: bool
    min_version: int


class Shard:
    """The tables of one shard, their common version and the sessions of the clients.

    reply_bytes  largest reply, in bytes of arrays
    clock        monotonic seconds
    """

    def __init__(
        self,
        *,
        number: int,
        shard_map: ShardMap,
        memory_bytes: int,
        reply_bytes: int,
        max_tables: int,
        max_sessions: int,
        session_ttl: float,
        clock: Callable[[], float],
    ) -> None:
        self.number = number
        self.shard_map = shard_map
        self.budget = Budget(memory_bytes)
        self.version = 0
        self.sessions = Sessions(max_sessions, session_ttl, clock)
        self._reply_bytes = reply_bytes
        self._max_tables = max_tables
        self._tables: dict[str, Table] = {}

    def create_table(self, schema: TableSchema) -> TableSchema:
        """Create a table, or find it with an equal schema; SchemaMismatch if another."""
        table = self._tables.get(schema.name)
        if table is not None:
            table.schema.require_equal(schema)
            return table.schema
        if len(self._tables) >= self._max_tables:
            raise TooLarge("TOO_MANY_TABLES", f"{self._max_tables} tables exist, the limit")
        self._tables[schema.name] = Table(schema, self.budget)
        return schema

    def describe(self, name: str) -> tuple[TableSchema, TableStats]:
        """Schema and size of a table."""
        table = self._table(name)
        return table.schema, table.stats()

    def tables(self) -> list[str]:
        """Names of the tables, sorted."""
        return sorted(self._tables)

    def drop_table(self, name: str) -> None:
        """Drop a table and return its memory."""
        self._table(name).close()
        del self._tables[name]

    def exchange(self, pushes: Sequence[Push], pulls: Sequence[Pull]) -> Exchanged:
        """Apply the pushes, then read the pulls.

        Every part is checked before the first push is applied. OutOfMemory may come between two
        pushes; the earlier one is applied then, and repeating the call with the same sequence
        numbers completes it.
        """
        for push in pushes:
            self._check_push(push)
        self._check_pulls(pulls)
        pushed = [self._push(push) for push in pushes]
        return Exchanged(pushed, [self._pull(pull) for pull in pulls])

    def dump(self) -> dict[str, Any]:
        """Copies of everything the shard holds, for tests: as large as the shard."""
        return {name: self._tables[name].dump() for name in self.tables()}

    def _table(self, name: str) -> Table:
        table = self._tables.get(name)
        if table is None:
            raise UnknownTable(name)
        return table

    def _check_push(self, push: Push) -> None:
        """Refuse a push that cannot be applied."""
        schema = self._table(push.table).schema
        dim = schema.dim
        if push.lr is not None:
            try:
                schema.optimizer.require_lr(push.lr)
            except ValueError as error:
                raise BadRequest("INVALID_ARGUMENT", f"table {push.table!r}: {error}") from error
        if len(push.keys) and push.gradients.shape[1] != dim:
            raise BadRequest(
                "DIM_MISMATCH",
                f"table {push.table!r} has dim {dim}, the gradients have {push.gradients.shape[1]}",
            )
        self._applied(push)

    def _applied(self, push: Push) -> int | None:
        """The version under which the push was applied already, or None."""
        if not push.client:
            return None
        return self.sessions.applied(
            push.client, push.incarnation, push.sequence, push.acknowledged
        )

    def _check_pulls(self, pulls: Sequence[Pull]) -> None:
        size = 0
        for pull in pulls:
            row = self._table(pull.table).schema.dim * WIRE[pull.dtype].itemsize
            size += len(pull.keys) * (row + 24 * pull.with_metadata)
            if pull.min_version > self.version:
                raise VersionInFuture(
                    f"min_version {pull.min_version} asked for, shard {self.number} is at"
                    f" {self.version}"
                )
        if size > self._reply_bytes:
            raise TooLarge(
                "TOO_MANY_KEYS",
                f"the reply would take {size} bytes, the limit is {self._reply_bytes}",
            )

    def _push(self, push: Push) -> PushResponse:
        """Apply a push, unless it was already: perhaps just now, by the same exchange."""
        known = self._applied(push)
        if known is not None:
            return PushResponse(version=known, duplicate=True)
        version = self.version + 1
        self._table(push.table).push(
            push.keys, push.gradients, push.counts, version=version, step=push.step, lr=push.lr
        )
        self.version = version
        if push.client:
            self.sessions.record(
                push.client, push.incarnation, push.sequence, push.acknowledged, version
            )
        return PushResponse(version=version)

    def _pull(self, pull: Pull) -> Pulled:
        table = self._table(pull.table)
        rows = np.empty((len(pull.keys), table.schema.dim), np.float32)
        locations = table.pull(pull.keys, pull.mode, rows)
        header = PullResponseHeader(
            version=self.version,
            dim=table.schema.dim,
            dtype=pull.dtype,  # type: ignore[arg-type]
        )
        embeddings = to_wire(rows, pull.dtype)
        if not pull.with_metadata:
            return Pulled(header, embeddings, _NO_VERSIONS, _NO_STEPS, _NO_VERSIONS)
        return Pulled(header, embeddings, *map(np.ascontiguousarray, table.metadata(locations)))
