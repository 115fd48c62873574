"""Check the arguments of pulls and pushes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psclient import checked
from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.choices import DURABILITIES, LARGEST
from psclient.errors import InvalidArgument
from psclient.request import Header
from psclient.versions import Versions
from psproto import codec


def by_table(field: str, value: Any) -> Mapping[str, Any]:
    """Return ``value``, which must be a mapping {name of a table: keys or gradients}.

    Raises InvalidArgument, naming ``field``, if it is not a mapping.
    """
    if type(value) is not dict and not isinstance(value, Mapping):
        raise InvalidArgument(
            f"{field} must be a mapping {{table: ...}}, got {type(value).__name__}"
        )
    return value


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return ``value``, the push to table ``name``, as (keys, gradients).

    Raises InvalidArgument unless it is a sequence of two objects.
    """
    known = type(value) is tuple or isinstance(value, Sequence)
    if not known or len(value) != 2:
        raise InvalidArgument(
            f"table {name!r}: a push must be a pair (keys, gradients), got {type(value).__name__}"
        )
    return value[0], value[1]


def push_header(step: int, lr: float | None, durability: str | None) -> Header:
    """Return the options of a push, which Client.push explains, as a Header.

    Raises InvalidArgument if one is invalid.
    """
    level = 0 if durability is None else checked.one_of("durability", durability, DURABILITIES)
    return Header(
        step=checked.integer("step", step, -codec.STEPS, codec.STEPS),
        lr=None if lr is None else checked.number("lr", lr),
        durability=level,
    )


def versions_of(min_version: Sequence[int], shards: int) -> Versions:
    """Return the argument ``min_version`` of a pull as Versions.

    min_version  Versions, or plain integers, which get the epoch 0 (unknown)
    shards       number of shards

    Raises InvalidArgument unless ``min_version`` is empty or has one version per shard.
    """
    if min_version and len(min_version) != shards:
        raise InvalidArgument(
            f"min_version must have one version for each of {shards} shards, got {len(min_version)}"
        )
    return Versions(
        (checked.integer("min_version", each, 0, 1 << 64) for each in min_version),
        min_version.epochs if isinstance(min_version, Versions) else (0,) * len(min_version),
    )


def check_range(name: str, batch: Batch, gradients: Rows, dtype: int) -> None:
    """Raise InvalidArgument if a gradient is too large for the dtype in which it is sent.

    name       name of the table, for errors
    batch      keys of the push
    gradients  float32[distinct, dim], finite, in the order of ``batch.keys``
    dtype      dtype on the wire, a number in ps.proto
    """
    largest = LARGEST[dtype]
    if largest is None or not gradients.size:
        return
    if max(gradients.max(), -gradients.min()) > largest:
        row, column = np.argwhere(np.abs(gradients) > largest)[0]
        raise InvalidArgument(
            f"table {name!r}: the gradient of key {batch.keys[row]} is {gradients[row, column]} at"
            f" position {column}; the dtype on the wire allows at most {largest:g}"
        )
