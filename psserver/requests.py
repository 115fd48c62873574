"""Requests to a shard as Python objects.

Code that creates them has already checked all that can be checked without the shard's tables.
Nothing changes them; they are not frozen dataclasses because those take long to create.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psproto.lanes import GpuRoom
from psserver.errors import BadRequest
from storage.kernels import Keys, Rows
from storage.schema import Durability
from storage.table import Mode


@dataclass(slots=True, kw_only=True)
class Change:
    """A request to push or delete rows of one table.

    ``client``, ``incarnation`` and ``sequence`` together identify the request, so that the shard
    recognizes a retry and does not apply it twice.
    """

    table: str
    keys: Keys  # uint64[n], distinct, owned by this shard
    client: int  # id of the client; 0: anonymous, a retry may be applied twice
    incarnation: int  # number of the client's session; a larger one replaces a smaller one
    sequence: int  # number of the change in the session; each change has a larger one
    acknowledged: int  # the client has the replies up to this sequence, and will not retry them
    durability: Durability | None = None  # required before the reply; None: the table's default


@dataclass(slots=True, kw_only=True)
class Push(Change):
    """A request to apply gradients to rows. All gradients are finite."""

    counts: NDArray[np.uint32]  # [n]: occurrences of each key in the training batch
    gradients: Rows  # float32[n, dim]
    step: int  # training step
    lr: float | None  # learning rate; None: that of the table's optimizer
    largest: float | None = None  # largest absolute value in ``gradients``; None: unknown


@dataclass(slots=True, kw_only=True)
class Delete(Change):
    """A request to delete rows."""


@dataclass(slots=True)
class Pull:
    """A request to read rows of one table."""

    table: str
    keys: Keys  # uint64[n], owned by this shard; a key may occur several times
    dtype: int  # pb.DType of the embeddings in the reply
    mode: Mode  # for keys without a row: "train" returns initial values, "serve" a constant
    with_metadata: bool  # also return version, step and frequency of each row
    min_version: int  # refuse if the shard's version is smaller
    prefetch: bool = False  # return no rows, only begin to read them from disk
    min_epoch: int = 0  # epoch (id of a server start) that assigned min_version; 0: unknown
    room: NDArray[np.uint8] | None = None  # shared memory for the reply's arrays; None: not a lane
    gpu_room: GpuRoom | None = None  # GPU memory for the rows; None: they are in the reply


def check_order(pushes: Sequence[Push]) -> None:
    """Check the pushes of one exchange request, separately for each client.

    Raises BadRequest unless the pushes of a client have equal incarnations and ascending sequences,
    and none of them acknowledges another one. A retry of the exchange could otherwise apply a push
    twice, because the shard keeps no record of acknowledged pushes.
    """
    if len(pushes) < 2:
        return
    firsts: dict[int, Push] = {}
    lasts: dict[int, Push] = {}
    for push in pushes:
        if not push.client:
            continue
        first, last = firsts.setdefault(push.client, push), lasts.get(push.client)
        if last is not None and not (
            push.incarnation == last.incarnation
            and push.sequence > last.sequence
            and push.acknowledged < first.sequence
        ):
            raise BadRequest(
                "INVALID_ARGUMENT",
                "pushes of one client in an exchange must have one incarnation and ascending"
                f" sequences, and must not acknowledge each other: client {push.client:#x} sent"
                f" incarnation {push.incarnation}, sequence {push.sequence}, acknowledged"
                f" {push.acknowledged} after incarnation {last.incarnation}, sequence"
                f" {last.sequence}",
            )
        lasts[push.client] = push
