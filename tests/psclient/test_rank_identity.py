"""A process that takes over a rank fences the former process of that rank."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from psclient import rank_identity
from psclient.errors import InvalidArgument, SessionExpired

KEYS = np.arange(20)
ONES = np.ones((20, 2), np.float32)


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_a_replaced_rank_is_fenced(cluster: Any, connect: Any, name: str, transport: str) -> None:
    former = connect(cluster, transport=transport, **rank_identity("job " + name, 3))
    table = former.create_table(name, 2, optimizer="sgd", lr=1.0, initializer="zeros")
    table.push(KEYS, ONES)
    later = connect(cluster, transport=transport, **rank_identity("job " + name, 3))
    later.table(name).push(KEYS, ONES)
    for _ in range(2):
        with pytest.raises(SessionExpired, match="was replaced by incarnation"):
            table.push(KEYS, ONES)
        with pytest.raises(SessionExpired, match="was replaced by incarnation"):
            table.delete(KEYS)
    later.table(name).push(KEYS, ONES)
    assert_array_equal(table.pull(KEYS), -3 * ONES)


def test_other_ranks_and_copies_are_not_fenced(connect: Any, cluster2: Any, name: str) -> None:
    first = connect(cluster2, **rank_identity("job " + name, 0))
    table = first.create_table(name, 2, optimizer="sgd", lr=1.0, initializer="zeros")
    other = connect(cluster2, **rank_identity("job " + name, 1))
    with pickle.loads(pickle.dumps(other)) as loaded:  # noqa: S301
        for client in (first, other, loaded, first):
            client.table(name).push(KEYS, ONES)
    assert_array_equal(table.pull(KEYS), -4 * ONES)


def test_the_identity_is_read_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("RANK", "5")
    here, given, other = rank_identity(), rank_identity("a", 5), rank_identity("a", 6)
    assert here["client_id"] == given["client_id"] != other["client_id"]
    assert here["incarnation"] < given["incarnation"]
    assert here["renew"] is False


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({}, "run must be the name of the job.*got ''.*TORCHELASTIC_RUN_ID"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "run must be .*got 'none'.*--rdzv-id"),
        ({"TORCHELASTIC_RUN_ID": "a"}, "rank must be .*got ''"),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "-1"}, "rank must be .*got '-1'"),
    ],
)
def test_a_rank_without_identity_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], error: str
) -> None:
    for variable in ("TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgument, match=error):
        rank_identity()
