"""Pulls into arrays of the caller, of NumPy and of PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from psclient import Client, Table
from psclient.errors import InvalidArgument

DIM = 5
KEYS = np.array([[3, 1, 3], [7, 1, 9]])


@pytest.fixture
def table(any_client: Client, name: str) -> Table:
    table = any_client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="normal")
    table.push(np.arange(6), np.full((6, DIM), 0.5))
    return table


class Foreign:
    """An array that only DLPack can read."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


MAKE = {
    "numpy": lambda shape: np.full(shape, np.nan, np.float32),
    "torch": lambda shape: torch.full(shape, torch.nan),
    "a leaf of torch": lambda shape: torch.full(shape, torch.nan, requires_grad=True),
    "a part": lambda shape: np.full((shape[0] + 2, *shape[1:]), np.nan, np.float32)[1:-1],
    "dlpack": lambda shape: Foreign(np.full(shape, np.nan, np.float32)),
}


def numbers(array: Any) -> Any:
    if isinstance(array, Foreign):
        return array.array
    return array.detach().numpy() if isinstance(array, torch.Tensor) else array


@pytest.mark.parametrize("kind", MAKE)
def test_rows_are_written_to_the_array_that_is_returned(table: Table, kind: str) -> None:
    client, make = table.client, MAKE[kind]
    batch = client.batch(KEYS)
    wanted, distinct = table.pull(KEYS), table.pull_distinct(batch)[1]
    full = (*KEYS.shape, DIM)
    out = make(full)
    assert table.pull(KEYS, out=out) is out
    assert_array_equal(numbers(out), wanted)
    out = make(full)
    pending = table.start_pull(KEYS, out=out)
    assert pending.result() is out
    assert pending.result() is out
    assert_array_equal(numbers(out), wanted)
    out = make(distinct.shape)
    assert table.pull_distinct(batch, out=out)[1] is out
    assert_array_equal(numbers(out), distinct)
    out = make(full)
    zeros = np.zeros(full, np.float32)
    assert table.exchange(KEYS, (KEYS, zeros), out=out) is out
    assert_array_equal(numbers(out), table.pull(KEYS))
    out, push = make(full), {table.name: (KEYS, zeros)}
    started = client.start_exchange(push, {table.name: KEYS}, out={table.name: out})
    assert started.result()[table.name] is out
    assert_array_equal(numbers(out), table.pull(KEYS))


def test_some_tables(any_client: Client, name: str) -> None:
    """Other tables, and None, get new arrays; an empty batch and one key have their shapes."""
    tables = [any_client.create_table(f"{name}.{part}", DIM) for part in "abc"]
    keys = {tables[0].name: 4, tables[1].name: np.empty((0, 2), int), tables[2].name: [1, 2]}
    out: Any = {tables[0].name: np.ones(DIM, np.float32), tables[1].name: torch.ones(0, 2, DIM)}
    got = any_client.pull(keys, out={**out, tables[2].name: None})
    assert all(got[table] is out[table] for table in out)
    wanted = any_client.pull(keys)
    for table in keys:
        assert_array_equal(numbers(got[table]), wanted[table])


def test_many_rows_in_several_messages(small: Any, connect: Any, name: str) -> None:
    client = connect(small)
    table = client.create_table(name, 8, initializer="normal")
    keys = np.arange(5000) % 3700
    out = np.empty((5000, 8), np.float32)
    assert_array_equal(table.pull(keys, out=out), table.pull(keys))


def readonly(shape: Any) -> Any:
    array = np.zeros(shape, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda shape: np.zeros(shape), "must have dtype float32, got float64"),
        (lambda shape: torch.zeros(shape, dtype=torch.bfloat16), "must .* float32"),
        (lambda shape: np.zeros((1, *shape), np.float32), r"must have shape \[2, 3, 5\], got \[1,"),
        (lambda shape: np.zeros((*shape, 2), np.float32)[..., 0], "must be contiguous"),
        (lambda shape: torch.zeros(shape[::-1]).permute(2, 1, 0), "must be contiguous"),
        (readonly, "must be writable, but it is read-only"),
        (lambda shape: Foreign(readonly(shape)), "must be writable"),
        (lambda shape: np.zeros(shape).tolist(), "must be an array .* got list"),
        (lambda shape: torch.zeros(shape, device="meta"), "must be"),
    ],
)
def test_other_arrays_are_refused_before_anything_is_sent(
    client: Client, name: str, messages: list[Any], make: Any, message: str
) -> None:
    table = client.create_table(name, DIM)
    with pytest.raises(InvalidArgument, match=f"out of table '{name}' {message}"):
        table.exchange(KEYS, (KEYS, np.ones((*KEYS.shape, DIM))), out=make((*KEYS.shape, DIM)))
    assert not messages


def test_arrays_of_two_tables_must_not_share_memory(client: Client, name: str) -> None:
    tables = [client.create_table(f"{name}.{part}", DIM).name for part in "ab"]
    out = np.zeros((3, DIM), np.float32)
    parts = {tables[0]: out[:2], tables[1]: out[1:]}
    with pytest.raises(InvalidArgument, match=r"tables '.*' and '.*' must not share"):
        client.pull({each: [1, 2] for each in tables}, out=parts)
    parts = {tables[0]: out[:1], tables[1]: out[1:]}
    client.pull({tables[0]: [1], tables[1]: [1, 2]}, out=parts)


def test_out_must_name_tables_that_are_pulled(client: Client, name: str) -> None:
    table = client.create_table(name, DIM)
    out = np.zeros((*KEYS.shape, DIM), np.float32)
    with pytest.raises(InvalidArgument, match="out: table 'other' is not among the tables"):
        client.pull({table.name: KEYS}, out={"other": out})
    with pytest.raises(InvalidArgument, match=r"out must be a mapping \{table: array\}, got ndarr"):
        client.pull({table.name: KEYS}, out=out)  # type: ignore[arg-type]
