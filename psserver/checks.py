"""Check what a pull, push or delete can get wrong by itself: shapes, dtypes, numbers, keys.

What depends on the state of the shard (tables, sessions, versions) the shard checks.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from psproto import codec, routing
from psproto import ps_pb2 as pb
from psserver.errors import BadRequest, TooLarge, WrongShard
from psserver.requests import Delete, Pull, Push
from psserver.schemas import LEVELS
from psserver.shard import Shard
from storage.kernels import largest_magnitude
from storage.schema import Durability
from storage.table import Mode

MODES: dict[int, Mode] = {
    pb.MODE_UNSPECIFIED: "train",
    pb.MODE_TRAIN: "train",
    pb.MODE_SERVE: "serve",
}


class Checks:
    """Turn messages into requests for one shard, or refuse them."""

    def __init__(self, shard: Shard, max_keys: int) -> None:
        self._shard = shard
        self._max_keys = max_keys

    def _keys(self, table: str, keys: NDArray[np.uint64]) -> None:
        if len(keys) > self._max_keys:
            raise TooLarge(
                "TOO_MANY_KEYS",
                f"table {table[:200]!r}: {len(keys)} keys, the limit is {self._max_keys}",
            )

    def _stray(self, table: str, key: np.uint64) -> WrongShard:
        """The error for a key of another shard."""
        shard_map = self._shard.shard_map
        bucket = int(routing.mix64(key)) >> 52
        belongs = int(shard_map.shard_of_bucket[bucket])
        return WrongShard(table, int(key), belongs, self._shard.number, shard_map.epoch)

    def pull(self, pull: codec.PullMessage) -> Pull:
        header = pull.header
        self._keys(header.table, pull.keys)
        if header.mode not in MODES:
            raise BadRequest("INVALID_ARGUMENT", f"mode {header.mode} is not one of {list(MODES)}")
        stray = routing.stray(pull.keys, self._shard.shard_map, self._shard.number)
        if stray >= 0:
            raise self._stray(header.table, pull.keys[stray])
        return Pull(
            table=header.table,
            keys=pull.keys,
            dtype=codec.wire_dtype(header.dtype),
            mode=MODES[header.mode],
            with_metadata=header.with_metadata,
            min_version=header.min_version,
            min_epoch=header.min_epoch,
        )

    def push(self, push: codec.PushMessage) -> Push:
        header, keys, counts, n = push.header, push.keys, push.counts, len(push.keys)
        self._keys(header.table, keys)
        lr = header.lr if header.HasField("lr") else None
        if not -codec.STEPS <= header.step < codec.STEPS:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"table {header.table!r}: step must be in -2^47..2^47-1, got {header.step}",
            )
        if counts is not None and len(counts) != n:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"table {header.table!r}: {len(counts)} counts for {n} keys",
            )
        if push.gradients.size % n if n else push.gradients.size:
            raise BadRequest(
                "DIM_MISMATCH",
                f"table {header.table!r}: {push.gradients.size} gradient numbers for {n} keys",
            )
        dtype = codec.wire_dtype(header.dtype)
        gradients = codec.from_wire(push.gradients, dtype).reshape(n, -1 if n else 0)
        repeated, stray = routing.check(keys, self._shard.shard_map, self._shard.number)
        if stray >= 0:
            raise self._stray(header.table, keys[stray])
        counts = np.ones(n, np.uint32) if counts is None else counts
        if repeated:
            keys, counts, gradients = _sum_repeated(keys, counts, gradients, self._shard.shard_map)
        largest = largest_magnitude(gradients)
        if not math.isfinite(largest):
            row, column = np.argwhere(~np.isfinite(gradients))[0]
            raise BadRequest(
                "NON_FINITE",
                f"table {header.table!r}: the gradient of key {keys[row]} is"
                f" {gradients[row, column]} at position {column}; all must be finite",
            )
        return Push(
            table=header.table,
            keys=keys,
            counts=counts,
            gradients=gradients,
            step=header.step,
            lr=lr,
            largest=largest,
            client=header.client_id,
            incarnation=header.incarnation,
            sequence=header.sequence,
            acknowledged=header.acknowledged,
            durability=_level(header),
        )

    def _distinct(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return routing.split(keys, self._shard.shard_map).keys

    def delete(self, push: codec.PushMessage) -> Delete:
        header = push.header
        self._keys(header.table, push.keys)
        repeated, stray = routing.check(push.keys, self._shard.shard_map, self._shard.number)
        if stray >= 0:
            raise self._stray(header.table, push.keys[stray])
        return Delete(
            table=header.table,
            keys=self._distinct(push.keys) if repeated else push.keys,
            client=header.client_id,
            incarnation=header.incarnation,
            sequence=header.sequence,
            acknowledged=header.acknowledged,
            durability=_level(header),
        )


def _level(header: pb.PushHeader) -> Durability | None:
    """What a push asks for; None: nothing, so the table's."""
    if not header.durability:
        return None
    if header.durability not in LEVELS:
        raise BadRequest(
            "INVALID_ARGUMENT", f"table {header.table!r}: durability {header.durability} is unknown"
        )
    return LEVELS[header.durability]


def _sum_repeated(
    keys: NDArray[np.uint64],
    counts: NDArray[np.uint32],
    gradients: NDArray[np.float32],
    shard_map: routing.ShardMap,
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.float32]]:
    """Sum gradients and counts of repeated keys, for clients that did not."""
    split = routing.split(keys, shard_map)
    sums = np.zeros((len(split.keys), gradients.shape[1]), np.float32)
    routing.sum_rows(gradients, split.inverse, sums)
    total = np.bincount(split.inverse, weights=counts, minlength=len(split.keys))
    return split.keys, np.minimum(total, 2**32 - 1).astype(np.uint32), sums
