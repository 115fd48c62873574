"""A table of a real cluster filled from a checkpoint, while other clients and crashes interfere."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from servers import Cluster, eventually
from typer.testing import CliRunner

from psclient import Client, admin, calls, rows
from psclient.errors import (
    DataLoss,
    InvalidArgument,
    NotEmpty,
    PsError,
    ResourceExhausted,
    TableNotFound,
)
from psclient.tools.ctl import app
from psproto import ps_pb2 as pb

pytestmark = pytest.mark.slow
Start = Callable[..., Cluster]
Connect = Callable[..., Client]
ROWS = 200_000


@pytest.fixture
def cluster(start_cluster: Start, tmp_path: Path) -> Cluster:
    """Two shards with a checkpoint "full" of table "t"."""
    cluster = start_cluster(2, "--checkpoint-url", f"file://{tmp_path}/checkpoints")
    with Client(cluster.addresses) as client:
        table = client.create_table("t", 8)
        for keys in np.split(np.arange(ROWS), 10):
            table.push(keys, np.ones((len(keys), 8)))
        admin.checkpoint(client, "full")
    return cluster


def filled(client: Client, name: str, rows: int) -> None:
    keys = np.arange(rows)
    client.create_table(name, 8, durability="fsync").push(keys, np.ones((rows, 8)))


def test_a_refused_load_deletes_no_rows(cluster: Cluster, connect: Connect) -> None:
    """One of the shards is busy with other long work; the target has durable rows."""
    client, other = connect(cluster), connect(cluster)
    filled(client, "mine", 5000)
    request = pb.LoadTableRequest(name="full", table="t", into="other", id="a" * 16)
    link = calls.links(other)[1]
    with closing(calls.stream(link, "LoadTable", request, pb.CheckpointProgress)) as messages:
        while next(messages).stage != pb.CheckpointProgress.STAGE_READY:
            pass
        with pytest.raises(ResourceExhausted, match="it fills table 'other'") as caught:
            admin.warm_start(client, "full", "t", "mine", replace=True)
    assert caught.value.reason == "CHECKPOINT_BUSY"
    assert client.describe_table("mine").rows == 5000

    def again() -> bool:
        try:
            return admin.warm_start(client, "full", "t", "mine", replace=True) == ROWS
        except ResourceExhausted:  # the shard has not noticed yet that the other client is gone
            return False

    eventually(again)
    assert client.describe_table("mine").rows == ROWS


def test_of_two_loads_into_one_name_one_fills_the_table(cluster: Cluster, connect: Connect) -> None:
    client, done = connect(cluster), []

    def work() -> None:
        with Client(cluster.addresses) as other:
            try:
                done.append(admin.warm_start(other, "full", "t", "mine", replace=True))
            except PsError as error:
                done.append(error.reason)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, done)) == sorted(map(str, [ROWS, "CHECKPOINT_BUSY"])) or done == [
        ROWS,
        ROWS,
    ]
    assert client.describe_table("mine").rows == ROWS


@pytest.mark.parametrize("moment", [0.3, 0.8])
def test_a_shard_that_is_killed_leaves_the_table_whole_or_without_rows(
    cluster: Cluster, connect: Connect, moment: float
) -> None:
    client = connect(cluster)
    filled(client, "mine", 100)
    pid = cluster.pids(1)[-1]
    killer = threading.Timer(moment, lambda: os.kill(pid, signal.SIGKILL))
    killer.start()
    try:
        admin.warm_start(client, "full", "t", "mine", replace=True)
        done = True
    except PsError:
        done = False
    killer.join()
    eventually(lambda: len(cluster.pids(1)) == 2, 60)
    with Client(cluster.addresses) as again:
        count = 0
        try:
            count = again.describe_table("mine").rows
        except TableNotFound:
            pytest.fail("the target existed before")
        assert count in ([ROWS] if done else [0, 100, ROWS])
        assert again.describe_table("t").rows == ROWS
        assert admin.warm_start(again, "full", "t", "mine", replace=True) == ROWS
        again.table("mine").push(np.arange(10), np.ones((10, 8)))


def test_a_load_with_fewer_rows_than_were_stored_is_taken_back(
    cluster: Cluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, real = connect(cluster), rows.list_stored

    def one_more(client: Client, name: str) -> Sequence[pb.CheckpointInfo]:
        stored = real(client, name)
        for table in stored[0].tables:
            table.rows += 1
        return stored

    monkeypatch.setattr(rows, "list_stored", one_more)
    with pytest.raises(DataLoss, match=f"read {ROWS} rows, but the manifests list {ROWS + 1}"):
        admin.warm_start(client, "full", "t", "new")
    eventually(lambda: [each.name for each in client.list_tables()] == ["t"])


def test_an_empty_parent_is_refused_before_anything_is_sent() -> None:
    with (
        Client(["127.0.0.1:1"]) as client,
        pytest.raises(InvalidArgument, match="parent must be the name of a checkpoint"),
    ):
        admin.checkpoint(client, "more", parent="")


def test_a_load_whose_client_dies_while_it_completes_is_completed_by_a_repetition(
    cluster: Cluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(cluster)
    real = rows.proceed

    def first_only(client: Client, id: str, step: pb.ContinueRequest.Step) -> None:
        if step != pb.ContinueRequest.STEP_FINISH:
            real(client, id, step)
            return
        real(client, id, step, [0])
        eventually(lambda: "mine" in client._listed()[0])
        raise KeyboardInterrupt  # as if it died

    with monkeypatch.context() as patch:
        patch.setattr(rows, "proceed", first_only)
        with pytest.raises(KeyboardInterrupt):
            admin.warm_start(client, "full", "t", "mine")
    assert client.incomplete_tables() == {"mine": [0]}
    with pytest.raises(NotEmpty, match="'mine' is on shard 0 only: an interrupted call left it"):
        admin.warm_start(client, "full", "t", "mine")
    servers = {"PSCTL_SERVERS": ",".join(cluster.addresses)}
    shown = CliRunner().invoke(app, ["tables"], env=servers)
    assert "psctl: table 'mine' exists only on shard 0" in shown.stderr
    assert admin.warm_start(client, "full", "t", "mine", replace=True) == ROWS
    assert client.incomplete_tables() == {}
