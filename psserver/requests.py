"""What a shard is asked to do, checked as far as that is possible without the shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psserver.errors import BadRequest
from storage.kernels import Keys, Rows
from storage.schema import Durability
from storage.table import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of rows: which ones, who asks for it, and how durable it must be when answered."""

    table: str
    keys: Keys  # uint64[n], distinct and of this shard
    client: int  # 0: without protection against a retry that is applied twice
    incarnation: int
    sequence: int
    acknowledged: int
    durability: Durability | None = None  # None: the default of the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Push(Change):
    """Gradients for rows; all gradients are finite."""

    counts: NDArray[np.uint32]  # [n]
    gradients: Rows  # float32[n, dim]
    step: int
    lr: float | None
    largest: float | None = None  # largest magnitude of the gradients, if it is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete(Change):
    """Rows to delete."""


@dataclass(frozen=True, slots=True)
class Pull:
    """Rows to read."""

    table: str
    keys: Keys  # uint64[n], of this shard
    dtype: int
    mode: Mode
    with_metadata: bool
    min_version: int
    min_epoch: int = 0  # of min_version; 0: unknown


def check_order(pushes: Sequence[Push]) -> None:
    """Raise BadRequest if one push of an exchange could expire the session entry of the next.

    A push makes the shard drop what it acknowledges, and what lies before the client's window. The
    pushes of one client must therefore share one incarnation, ascend in sequence, and acknowledge
    no push of the same exchange.
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
                "pushes of one client in an exchange must be of one incarnation, ascend, and"
                f" acknowledge none of each other: client {push.client:#x} has incarnation"
                f" {push.incarnation} sequence {push.sequence} acknowledged {push.acknowledged}"
                f" after incarnation {last.incarnation} sequence {last.sequence}",
            )
        lasts[push.client] = push
