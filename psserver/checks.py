"""Check pulls, pushes and deletes without their table: shapes, dtypes, finite numbers, keys.

The shard later checks everything that depends on its tables, sessions and versions.
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
    """Checks decoded messages, and converts them to requests for one shard."""

    def __init__(self, shard: Shard, max_keys: int) -> None:
        """Create the checks of ``shard``.

        max_keys  maximum number of keys in one pull, push or delete
        """
        self._shard = shard
        self._max_keys = max_keys

    def pull(self, pull: codec.PullMessage) -> Pull:
        """Check and convert a pull. Raises TooLarge, BadRequest, WrongShard or Malformed."""
        header, keys = pull.header, pull.keys
        if len(keys) > self._max_keys:
            raise self._too_many(header.table, keys)
        mode = MODES.get(header.mode)
        if mode is None:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"field 'mode' must be one of {list(MODES)}, got {header.mode}",
            )
        foreign = routing.first_foreign(keys, self._shard.shard_map, self._shard.number)
        if foreign >= 0:
            raise self._wrong_shard(header.table, keys[foreign])
        return Pull(
            table=header.table,
            keys=keys,
            dtype=codec.wire_dtype(header.dtype),
            mode=mode,
            with_metadata=header.with_metadata,
            min_version=header.min_version,
            min_epoch=header.min_epoch,
            prefetch=header.prefetch,
            room=pull.room,
            gpu_room=pull.gpu_room,
        )

    def push(self, push: codec.PushMessage) -> Push:
        """Check and convert a push. Counts and gradients of repeated keys are summed.

        Raises TooLarge, BadRequest, WrongShard or Malformed.
        """
        header, keys, counts, step = push.header, push.keys, push.counts, push.header.step
        if len(keys) > self._max_keys:
            raise self._too_many(header.table, keys)
        if not -codec.STEPS <= step < codec.STEPS:
            raise _wrong_step(header)
        gradients = _gradients(push)
        if counts is None:
            counts = np.ones(len(keys), np.uint32)
        if self._repeated(header.table, keys):
            keys, counts, gradients = _sum_repeated(keys, counts, gradients, self._shard.shard_map)
        largest = largest_magnitude(gradients)
        if not math.isfinite(largest):
            raise _not_finite(header.table, keys, gradients)
        return Push(
            table=header.table,
            keys=keys,
            counts=counts,
            gradients=gradients,
            step=step,
            lr=header.lr if header.HasField("lr") else None,
            largest=largest,
            client=header.client_id,
            incarnation=header.incarnation,
            sequence=header.sequence,
            acknowledged=header.acknowledged,
            durability=_level(header) if header.durability else None,
        )

    def delete(self, push: codec.PushMessage) -> Delete:
        """Check and convert a delete. Each repeated key is kept once.

        push  decoded delete, which has the form of a push without gradients

        Raises TooLarge, BadRequest or WrongShard.
        """
        header, keys = push.header, push.keys
        if len(keys) > self._max_keys:
            raise self._too_many(header.table, keys)
        if self._repeated(header.table, keys):
            keys = routing.split(keys, self._shard.shard_map).keys
        return Delete(
            table=header.table,
            keys=keys,
            client=header.client_id,
            incarnation=header.incarnation,
            sequence=header.sequence,
            acknowledged=header.acknowledged,
            durability=_level(header) if header.durability else None,
        )

    def _too_many(self, table: str, keys: NDArray[np.uint64]) -> TooLarge:
        return TooLarge(
            "TOO_MANY_KEYS",
            f"table {table[:200]!r}: {len(keys)} keys > max_keys={self._max_keys}; divide them"
            " among several requests",
        )

    def _repeated(self, table: str, keys: NDArray[np.uint64]) -> bool:
        """Return whether a key occurs twice. Raises WrongShard if a key belongs to another shard.

        table  name of the table, for the error
        """
        repeated, foreign = routing.check(keys, self._shard.shard_map, self._shard.number)
        if foreign >= 0:
            raise self._wrong_shard(table, keys[foreign])
        return repeated > 0

    def _wrong_shard(self, table: str, key: np.uint64) -> WrongShard:
        """Return the error about a key that another shard owns."""
        shard_map = self._shard.shard_map
        owner = int(shard_map.shard_of_bucket[int(routing.mix64(key)) >> 52])
        return WrongShard(table, int(key), owner, self._shard.number, shard_map.epoch)


def _wrong_step(header: pb.PushHeader) -> BadRequest:
    return BadRequest(
        "INVALID_ARGUMENT",
        f"table {header.table!r}: field 'step' must be in -2^47..2^47-1, got {header.step}",
    )


def _gradients(push: codec.PushMessage) -> NDArray[np.float32]:
    """Return the gradients of a push as float32[n, dim], for its n keys.

    Raises BadRequest if the size of the gradients is not a multiple of n, or if there are not n
    counts.
    """
    header, n = push.header, len(push.keys)
    if push.counts is not None and len(push.counts) != n:
        raise BadRequest(
            "INVALID_ARGUMENT",
            f"table {header.table!r}: field 'counts': expected {n} counts, one per key, got"
            f" {len(push.counts)}",
        )
    if push.gradients.size % n if n else push.gradients.size:
        raise BadRequest(
            "DIM_MISMATCH",
            f"table {header.table!r}: field 'gradients': expected dim numbers for each of {n} keys,"
            f" got {push.gradients.size} numbers",
        )
    numbers = codec.from_wire(push.gradients, codec.wire_dtype(header.dtype))
    return numbers.reshape(n, -1 if n else 0)


def _not_finite(table: str, keys: NDArray[np.uint64], gradients: NDArray[np.float32]) -> BadRequest:
    """Return an error that names the first infinite or NaN number in ``gradients``.

    gradients  float32[n, dim], one row per key, with at least one such number
    """
    row, column = np.argwhere(~np.isfinite(gradients))[0]
    return BadRequest(
        "NON_FINITE",
        f"table {table!r}: the gradient of key {keys[row]} is {gradients[row, column]} at position"
        f" {column}; all must be finite",
    )


def _level(header: pb.PushHeader) -> Durability | None:
    """Return the durability level that a push or delete requires; None: the default of its table.

    Raises BadRequest for an unknown level.
    """
    if not header.durability:
        return None
    if header.durability not in LEVELS:
        raise BadRequest(
            "INVALID_ARGUMENT",
            f"table {header.table!r}: field 'durability' must be one of {sorted(LEVELS)},"
            f" got {header.durability}",
        )
    return LEVELS[header.durability]


def _sum_repeated(
    keys: NDArray[np.uint64],
    counts: NDArray[np.uint32],
    gradients: NDArray[np.float32],
    shard_map: routing.ShardMap,
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.float32]]:
    """Return (distinct keys, sums of their counts, sums of their gradients).

    keys       uint64[n]        may repeat
    counts     uint32[n]        sums larger than ``2^32 - 1`` become ``2^32 - 1``
    gradients  float32[n, dim]

    The results have one entry per distinct key, grouped by the key's shard.
    """
    split = routing.split(keys, shard_map)
    sums = np.zeros((len(split.keys), gradients.shape[1]), np.float32)
    routing.sum_rows(gradients, split.inverse, sums)
    total = np.bincount(split.inverse, weights=counts, minlength=len(split.keys))
    return split.keys, np.minimum(total, 2**32 - 1).astype(np.uint32), sums
