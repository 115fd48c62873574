"""A table with rows of many kinds, for tests that read or copy it."""

from __future__ import annotations

from typing import Any

import numpy as np

from psclient import Client, Table, admin
from psproto import ps_pb2 as pb

KEYS = np.concatenate([np.arange(30_000), np.array([-1, -(2**63), 2**63 - 1])])


def fill(client: Client) -> Table:
    rng = np.random.default_rng(0)
    table = client.create_table("t", 6, optimizer="adam")
    for step in range(4):
        some = KEYS[rng.random(len(KEYS)) < 0.7]
        table.push(some, rng.standard_normal((len(some), 6)), step=step)
    table.delete(KEYS[:100])
    return table


def whole(client: Client, table: str, **more: Any) -> dict[int, tuple[Any, ...]]:
    """By key: the row with its state, version, step, frequency."""
    found: dict[int, tuple[Any, ...]] = {}
    for batch in admin.read_rows(client, table, **more):
        if isinstance(batch, pb.TableSchema):
            continue
        rows = map(bytes, batch.rows)
        columns = (batch.versions.tolist(), batch.steps.tolist(), batch.frequencies.tolist())
        for key, *rest in zip(batch.keys.tolist(), rows, *columns, strict=True):
            assert key not in found
            found[key] = tuple(rest)
    return found
