"""Ranks of torchrun that sum their gradients by owner: equal to one process, and never stuck."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worker
from numpy.testing import assert_allclose, assert_array_equal
from servers import Cluster
from worker import DIM, KEY, ROWS, STEPS

from psclient import Client

OPTIMIZERS = (
    *("sgd", "momentum", "adagrad", "rowwise_adagrad", "adagrad_decay", "adam", "adamw"),
    *("adam_async", "ftrl", "group_ftrl"),
)
SECONDS = 300
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow

Notes = list[dict[str, Any]]


def create(client: Client, prefix: str, optimizers: tuple[str, ...] = OPTIMIZERS) -> list[str]:
    """Create a table per optimizer, whose rows are zeros; return their names."""
    names = [f"{prefix}.{each}" for each in optimizers]
    for table, optimizer in zip(names, optimizers, strict=True):
        client.create_table(
            table, DIM, optimizer=optimizer, lr=0.05, initializer="zeros", durability="applied"
        )
    return names


def run(addresses: list[str], ranks: int, cases: dict[str, list[str]], directory: Path) -> Notes:
    """Run cases on some ranks of torchrun; return the notes of each."""
    directory.mkdir()
    plan = directory / "plan.json"
    plan.write_text(
        json.dumps({"addresses": addresses, "cases": cases, "directory": str(directory)})
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), worker.__file__, str(plan)]
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def client(cluster2: Cluster) -> Iterator[Client]:
    with Client(cluster2.addresses, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def one(client: Client) -> tuple[list[str], list[float]]:
    """Tables that one process has trained with the whole batches, and the dense layer."""
    tables = create(client, "ranks.one")
    model = worker.Model(client, tables)
    dense = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.train(model, model.group.optimizer(), dense, lambda part: part)
    return tables, model.head.weight.flatten().tolist()


@pytest.fixture(scope="module")
def small(client: Client) -> Callable[[str], list[str]]:
    """small(case): names of some tables of plain SGD with zeros."""

    def make(case: str) -> list[str]:
        count = {"uneven": 4, "uneven_piped": 2}.get(case, 3)
        names = [f"ranks.{case}.{each}" for each in range(count)]
        for each in names:
            client.create_table(each, DIM, optimizer="sgd", lr=1.0, initializer="zeros")
        return names

    return make


@pytest.fixture(scope="module")
def two(
    client: Client,
    small: Callable[[str], list[str]],
    cluster2: Cluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Notes:
    """The notes of two ranks, of all cases but those of four ranks."""
    others = {"equal", "piped", "halves"}
    cases = {case: small(case) for case in worker.CASES if case not in others}
    both = {case: create(client, f"ranks.{case}") for case in ("equal", "piped")}
    cases = {**both, **cases}
    return run(cluster2.addresses, 2, cases, tmp_path_factory.mktemp("two") / "notes")


def assert_equal(client: Client, tables: list[str], expected: list[str]) -> None:
    """Compare the rows of tables, their steps and frequencies."""
    for table, other in zip(tables, expected, strict=True):
        got, twin = (client.table(each).pull_rows(np.arange(ROWS)) for each in (table, other))
        assert_allclose(got.embeddings, twin.embeddings, atol=1e-5, err_msg=table)
        assert_array_equal(got.frequencies, twin.frequencies, err_msg=table)
        assert_array_equal(got.steps, twin.steps, err_msg=table)
        initial = client.table(table).pull(np.arange(ROWS, 2 * ROWS))
        assert np.abs(got.embeddings - initial).max() > 1e-3  # has learned something


@pytest.mark.parametrize("case", ["equal", "piped"])
def test_two_ranks_equal_one_process(client: Client, one: Any, two: Notes, case: str) -> None:
    tables, head = one
    assert_equal(client, [f"ranks.{case}.{each}" for each in OPTIMIZERS], tables)
    for notes in two:
        assert_allclose(notes[case], head, atol=1e-5)


def test_one_rank_equals_one_process(
    client: Client, one: Any, cluster2: Cluster, tmp_path: Path
) -> None:
    tables = create(client, "ranks.alone")
    (notes,) = run(cluster2.addresses, 1, {"equal": tables}, tmp_path / "notes")
    assert_equal(client, tables, one[0])
    assert_allclose(notes["equal"], one[1], atol=1e-5)


def test_four_ranks_equal_one_process(
    client: Client, one: Any, cluster2: Cluster, tmp_path: Path
) -> None:
    tables = create(client, "ranks.four")
    halves = [create(client, f"ranks.half{each}", ("adam",))[0] for each in range(2)]
    cases = {"equal": tables, "halves": halves}
    everyone = run(cluster2.addresses, 4, cases, tmp_path / "notes")
    assert_equal(client, tables, one[0])
    for notes in everyone:
        assert_allclose(notes["equal"], one[1], atol=1e-5)
    assert_equal(client, halves[:1], halves[1:])


def test_uneven_ranks_end(client: Client, two: Notes) -> None:
    """Rank 0 has one batch, rank 1 three; each of the four moves the row by -1."""
    for each in range(4):
        row = client.table(f"ranks.uneven.{each}").pull([KEY])
        assert_array_equal(row, np.full((1, DIM), -4.0))
    for each in range(2):
        row = client.table(f"ranks.uneven_piped.{each}").pull([KEY])
        assert_array_equal(row, np.full((1, DIM), -4.0))
    assert [notes["uneven"] for notes in two] == [3, 3]
    assert [notes["uneven_piped"] for notes in two] == [[3, 3], [3, 3]]


def test_an_uneven_model_ends_with_the_rows_of_all_batches(client: Client, two: Notes) -> None:
    tables = [client.table(f"ranks.uneven_model.{each}") for each in range(3)]
    keys = np.unique([worker.batch(step)[0] for step in range(3)])
    for table in tables:  # the last batch was that of rank 1 alone
        assert np.abs(table.pull(keys)).max(1).min() > 0
        assert table.pull_rows(keys).steps.max() == 2
    assert all(np.isfinite(notes["uneven_model"]).all() for notes in two)


@pytest.mark.parametrize("case", ["disagree", "other_lr", "infinite"])
def test_ranks_that_do_not_fit_push_nothing(client: Client, two: Notes, case: str) -> None:
    rule = {
        "disagree": ["StepsDisagree: training step must be the same on all ranks: rank 0 is at"],
        "other_lr": ["InvalidArgument: lr must be the same on all ranks"],
        "infinite": ["RankFailed: rank 1 could not push at step 0", "InvalidArgument: table"],
    }[case]
    for rank, notes in enumerate(two):
        assert len(notes[case]) == 3
        for error in notes[case]:
            assert error.startswith(rule[min(rank, len(rule) - 1)])
    for each in range(3):
        assert_array_equal(client.table(f"ranks.{case}.{each}").pull([KEY]), np.zeros((1, DIM)))


def test_a_pipeline_that_pulls_ahead_cannot_wait_for_all(two: Notes) -> None:
    for notes in two:
        assert notes["refused"].startswith("InvalidArgument: with sync=True, a pipeline must have")


def test_steps_are_checked_in_passing(two: Notes) -> None:
    for notes in two:
        assert "rank 0 is at step 0, rank 1 at step 7" in notes["in_passing"]


@pytest.mark.parametrize("case", ["absent", "gone"])
def test_a_missing_rank_is_an_error(two: Notes, case: str) -> None:
    assert two[0][case].startswith("RankFailed: not all ranks answered at step 0")
    assert two[1][case] == ""


def test_steps_counted(client: Client, one: Any) -> None:
    rows = client.table(one[0][0]).pull_rows(np.arange(ROWS))
    assert rows.steps.max() == STEPS - 1
