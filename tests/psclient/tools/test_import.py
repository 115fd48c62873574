"""Imports into a real cluster: checked first, applied whole, and what stands if that ends early."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from filled import whole
from servers import Cluster, eventually

from psclient import Client
from psclient.calls import call
from psclient.errors import InvalidArgument, TableNotFound, Unavailable
from psclient.rows import write_rows
from psclient.tools import importer
from psclient.tools.importer import ImportIncomplete, import_parquet
from psproto import ps_pb2 as pb

N = 1000
SLOW_IMPORT = """
import signal, time
from psclient.tools import ctl, importer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
write = importer._write
importer._write = lambda *batch: (write(*batch), time.sleep(120))
ctl.main()
"""  # psctl that waits after the first rows until the test interrupts it


@pytest.fixture
def client(cluster2: Cluster, connect: Callable[..., Client]) -> Client:
    return connect(cluster2)


@pytest.fixture
def table(client: Client, name: str) -> Iterator[str]:
    client.create_table(name, 2, optimizer="sgd")
    yield name
    client.drop_table(name)


def write(path: Path, keys: Any = None, **columns: Any) -> Path:
    keys = np.arange(N) if keys is None else np.asarray(keys)
    embedding = np.stack([keys, keys + 0.5], 1).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(embedding.reshape(-1)), 2)
    parquet.write_table(pa.table({"key": keys, "embedding": lists, **columns}), path)
    return path


def test_parts_are_read_by_name_and_the_last_row_of_a_key_counts(
    client: Client, table: str, tmp_path: Path
) -> None:
    write(tmp_path / "b.parquet", np.array([7, -7, 8]), frequency=np.array([4, 5, 6]))
    write(tmp_path / "a.parquet", np.array([7, 9, 9]), frequency=np.array([1, 2, 3]))
    (tmp_path / "_SUCCESS").touch()
    assert import_parquet(client, table, tmp_path) == 6
    rows = client.table(table).pull_rows([7, -7, 8, 9])
    assert rows.embeddings.tolist() == [[7.0, 7.5], [-7.0, -6.5], [8.0, 8.5], [9.0, 9.5]]
    assert rows.frequencies.tolist() == [4, 5, 6, 3]


def test_nothing_is_written_if_the_last_row_of_the_last_file_is_bad(
    client: Client, table: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", frequency=np.append(np.ones(N - 1, np.int64), -1))
    with pytest.raises(InvalidArgument, match=rf"b\.parquet: row {N - 1} \(counted from 0\)"):
        import_parquet(client, table, tmp_path)
    assert client.describe_table(table).rows == 0


def test_a_table_that_does_not_exist_is_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(TableNotFound, match="nothing"):
        import_parquet(client, "nothing", write(tmp_path / "a.parquet"))


@pytest.mark.parametrize("error", [Unavailable("shard 1 is gone"), KeyboardInterrupt()])
def test_an_import_that_ends_early_says_what_stands_and_is_completed_by_another(
    client: Client,
    table: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.parquet", np.arange(N * i, N * (i + 1)))
    write_rows, calls = importer.write_rows, iter(range(9))

    def fail(*arguments: Any, **more: Any) -> None:
        if next(calls) == 2:
            raise error
        write_rows(*arguments, **more)

    monkeypatch.setattr(importer, "write_rows", fail)
    with pytest.raises(ImportIncomplete) as caught:
        import_parquet(client, table, tmp_path)
    monkeypatch.undo()
    assert (caught.value.written, caught.value.total) == (2 * N, 3 * N)
    assert "2,000 of 3,000 rows were written and stay; repeat the same import" in str(caught.value)
    assert caught.value.__cause__ is error
    assert client.describe_table(table).rows == 2 * N
    first = whole(client, table)
    assert import_parquet(client, table, tmp_path) == 3 * N
    again = whole(client, table)
    assert len(again) == 3 * N
    assert {key: row for key, (row, *_) in first.items()}.items() <= {
        key: row for key, (row, *_) in again.items()
    }.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frequencies": [1, -2]}, "frequencies must be in 0..4294967295, got -2"),
        ({"frequencies": [1, 2**32]}, "got 4294967296"),
        ({"frequencies": [1.0, 1.5]}, "frequencies must be 2 integers, got float64"),
        ({"frequencies": [1]}, r"frequencies must be 2 integers, got int64 of shape \(1,\)"),
        ({"steps": [0, 2**47]}, "steps must be in -140737488355328..140737488355327"),
        ({"steps": [0, np.nan]}, "steps must be 2 integers"),
        ({"keys": [1.0, 2.0]}, "keys must be integers"),
        ({"keys": [1, 2, 3]}, r"keys must have shape \(n,\)"),
        ({"rows": [1.0, 2.0]}, r"rows \(n, width\)"),
        ({"rows": [[1.0, 2.0], [np.nan, 2.0]]}, "must be finite"),
        ({"rows": [[1.0, 2.0], [1e39, 2.0]]}, "must be finite"),
    ],
)
def test_rows_that_cannot_be_stored_as_they_are_are_not_written(
    client: Client, table: str, changes: dict[str, Any], message: str
) -> None:
    rows = {"keys": [1, 2], "rows": [[1.0, 2.0], [3.0, 4.0]], **changes}
    arrays = {name: np.array(values) for name, values in rows.items()}
    with pytest.raises(InvalidArgument, match=message):
        write_rows(client, table, **arrays)
    assert client.describe_table(table).rows == 0


def test_a_server_stores_no_frequency_as_another(client: Client, table: str) -> None:
    request = pb.WriteRowsRequest(table=table, width=2, rows=bytes(8))
    shard = client._connect().links[0]
    request.keys = next(
        k
        for k in map(int.to_bytes, range(99), repeat(8), repeat("little"))
        if (client.batch(np.frombuffer(k, "<u8")).split.bounds[1] == 1)
    )
    request.frequencies = (2**32).to_bytes(8, "little")
    with pytest.raises(InvalidArgument, match=r"frequencies must be in 0\.\.2\^32-1"):
        call(client, shard, "WriteRows", request, pb.WriteRowsResponse)


@pytest.mark.slow
def test_ctrl_c_while_rows_are_written_ends_with_the_status_of_incomplete_work(
    cluster2: Cluster, client: Client, table: str, tmp_path: Path
) -> None:
    for i in range(300):
        write(tmp_path / f"{i:03}.parquet", np.arange(N * i, N * (i + 1)))
    words = ["import", table, "--parquet", str(tmp_path)]
    importing = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT, *words],
        env={**os.environ, "PSCTL_SERVERS": ",".join(cluster2.addresses)},
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: client.describe_table(table).rows or importing.poll() is not None, 60.0)
    importing.send_signal(signal.SIGINT)
    _, errors = importing.communicate(timeout=60)
    assert importing.returncode == 4
    assert re.fullmatch(
        rf"psctl: import into table '{re.escape(table)}' is incomplete: [\d,]+ of 300,000 rows were"
        r" written and stay; repeat the same import to complete it\. Cause: KeyboardInterrupt\n",
        errors,
    )
    assert 0 < client.describe_table(table).rows < 300 * N


def test_a_file_that_changes_after_its_check_is_checked_again(
    client: Client, table: str, tmp_path: Path
) -> None:
    checked = importer.check_parquet(client, table, write(tmp_path / "a.parquet"))
    write(tmp_path / "a.parquet", frequency=np.full(N, -1))
    with pytest.raises(ImportIncomplete, match=r"0 of 1,000 rows .* got -1"):
        importer.write_parquet(client, checked)
    assert client.describe_table(table).rows == 0


def test_both_passes_report_their_progress(client: Client, table: str, tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"{i}.parquet")
    passes: list[list[tuple[int, int]]] = [[], []]
    checked = importer.check_parquet(
        client, table, tmp_path, progress=lambda *each: passes[0].append(each)
    )
    importer.write_parquet(client, checked, progress=lambda *each: passes[1].append(each))
    assert passes[0] == passes[1] == [(N, 2 * N), (2 * N, 2 * N)]
