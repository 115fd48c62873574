"""Whole rows, read from shards and checkpoints, and written by clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from homes import Homes, Node, fill
from stores import DIM, change, schema

from psproto import ps_pb2 as pb
from psproto import routing
from psserver.errors import (
    BadRequest,
)
from storage.errors import (
    UnknownTable,
)
from storage.optimizers import make_optimizer

ADAM = make_optimizer("adam", None, {})
ID = "0123456789abcdef"
Make = Callable[..., Homes]


def written(node: Node, request: pb.ReadRowsRequest) -> dict[int, Any]:
    """By key: row, version, step, frequency."""
    found: dict[int, Any] = {}
    messages = node.checkpoints.rows.read_rows(request)
    assert next(messages).header.HasField("schema")
    for each in messages:
        rows = np.frombuffer(each.rows, "<f4").reshape(-1, each.header.width).tolist()
        columns = (
            np.frombuffer(data, kind).tolist()
            for data, kind in (
                (each.keys, "<u8"),
                (each.versions, "<u8"),
                (each.steps, "<i8"),
                (each.frequencies, "<u8"),
            )
        )
        for row, key, version, step, frequency in zip(rows, *columns, strict=True):
            assert key not in found
            found[key] = (row, [key, version, np.uint64(step % 2**64), frequency])
    return found


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_rows_are_read_from_shards_and_from_checkpoints(make: Make, shards: int) -> None:
    source, other = make(3), make(shards)
    fill(source)
    source.checkpoint("full")
    live = {}
    for node in source.nodes:
        live |= written(node, pb.ReadRowsRequest(table="adam"))
    stored = {}
    for node in other.nodes:
        stored |= written(node, pb.ReadRowsRequest(table="adam", checkpoint="full"))
    assert live == stored == source.rows()["adam"]
    for request in (
        pb.ReadRowsRequest(table="no"),
        pb.ReadRowsRequest(table="no", checkpoint="full"),
    ):
        with pytest.raises(UnknownTable):
            next(other.nodes[0].checkpoints.rows.read_rows(request))


def rows_message(numbers: list[int], **changes: Any) -> pb.WriteRowsRequest:
    fields: dict[str, Any] = {
        "table": "t",
        "width": DIM,
        "keys": np.array(numbers, np.uint64).tobytes(),
        "rows": np.arange(len(numbers) * DIM, dtype=np.float32).tobytes(),
    }
    return pb.WriteRowsRequest(**{**fields, **changes})


def test_rows_are_written_as_they_are_given(make: Make) -> None:
    cluster = make(1)
    cluster.create(schema(optimizer=ADAM))
    node = cluster.nodes[0]
    cluster.push([3])
    steps = np.array([7, -7, 7], np.int64)
    counts = np.array([1, 2**32 - 1, 3], np.uint64)
    request = rows_message([1, 2, 3], steps=steps.tobytes(), frequencies=counts.tobytes())
    assert node.checkpoints.rows.write_rows(request).version == node.shard.version == 4
    state = ADAM.initial_state(DIM).tolist()
    found = cluster.rows()["t"]
    assert {key: row for key, (row, _) in found.items()} == {
        1: [0.0, 1.0, *state],
        2: [2.0, 3.0, *state],
        3: [4.0, 5.0, *state],
    }
    assert [found[key][1] for key in (1, 2, 3)] == [
        [1, 4, 7, 1],
        [2, 3, 2**64 - 7, 2**32 - 1],
        [3, 4, 7, 3],
    ]
    node.reopen()
    assert cluster.rows()["t"] == found


def test_rows_that_come_without_a_step_are_as_fresh_as_the_table(make: Make) -> None:
    cluster = make(1)
    cluster.create(schema())
    write = cluster.nodes[0].checkpoints.rows.write_rows
    write(rows_message([1]))
    cluster.push([2], step=700)
    write(rows_message([3]))
    steps = {key: meta[2] for key, (_, meta) in cluster.rows()["t"].items()}
    assert steps == {1: 0, 2: 700, 3: 700}


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 3},
        {"keys": b"1234567"},
        {"keys": np.array([1, 1], np.uint64).tobytes()},
        {"rows": b""},
        {"rows": np.full(2 * DIM, np.nan, np.float32).tobytes()},
        {"steps": b"12345678"},
        {"steps": np.full(2, 1 << 47, np.int64).tobytes()},
        {"frequencies": b"12345678"},
    ],
)
def test_rows_that_break_a_rule_are_not_written(make: Make, changes: dict[str, Any]) -> None:
    cluster = make(1)
    cluster.create(schema(optimizer=ADAM))
    with pytest.raises(BadRequest):
        cluster.nodes[0].checkpoints.rows.write_rows(rows_message([1, 2], **changes))
    assert cluster.rows() == {"t": {}}


def test_rows_of_another_shard_are_not_written(make: Make) -> None:
    cluster = make(2)
    cluster.create(schema())
    keys = np.arange(50, dtype=np.uint64)
    other = keys[routing.owners(keys, cluster.map) == 1]
    with pytest.raises(BadRequest):
        cluster.nodes[0].checkpoints.rows.write_rows(rows_message(other[:2].tolist()))
    cluster.nodes[1].checkpoints.rows.write_rows(rows_message(other[:2].tolist()))
    assert set(cluster.rows()["t"]) == set(other[:2].tolist())


def test_a_delete_after_written_rows_is_a_delete(make: Make) -> None:
    cluster = make(1)
    cluster.create(schema())
    cluster.nodes[0].checkpoints.rows.write_rows(rows_message([1, 2]))
    cluster.nodes[0].shard.delete(change([1]))
    cluster.nodes[0].reopen()
    assert set(cluster.rows()["t"]) == {2}
