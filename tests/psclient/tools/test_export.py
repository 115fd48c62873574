"""Tables as files: what is exported is what other programs read, and goes back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from filled import fill, whole
from safetensors.numpy import load_file
from servers import Cluster

from psclient import Client, admin
from psclient.errors import InvalidArgument
from psclient.tools import export, importer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three shards with a filled table "t" and a checkpoint "full" of it; nobody harms them."""
    directory = tmp_path_factory.mktemp("shared")
    cluster = Cluster(3, "--checkpoint-url", f"file://{directory}").start()
    try:
        with Client(cluster.addresses) as client:
            fill(client)
            admin.checkpoint(client, "full")
        yield cluster
    finally:
        assert cluster.stop() == 0


@pytest.mark.parametrize("stored", [None, "full"])
def test_parquet_has_every_row_and_goes_back(
    shared: Cluster, tmp_path: Path, stored: str | None
) -> None:
    path = tmp_path / "t.parquet"
    with Client(shared.addresses) as client:
        rows = whole(client, "t")
        assert export.export(client, "t", path, checkpoint=stored) == len(rows)
        read = parquet.read_table(path)
        assert read.column_names == ["key", "embedding", "state", "version", "step", "frequency"]
        columns = {name: read[name].to_pylist() for name in read.column_names}
        assert len(set(columns["key"])) == read.num_rows == len(rows)
        for key, embedding, state, *history in zip(*columns.values(), strict=True):
            row = np.array([*embedding, *state], np.float32)
            assert (row.tobytes(), *history) == rows[key]
        for name, optimizer in (("again", "adam"), ("other", "sgd")):
            client.create_table(name, 6, optimizer=optimizer)
            assert importer.import_parquet(client, name, path) == len(rows)
            for key, (row, _, *history) in whole(client, name).items():
                wanted = rows[key][0] if name == "again" else rows[key][0][: 4 * 6]
                assert (row, *history) == (wanted, *rows[key][2:])
            client.drop_table(name)
        assert [each.name for each in tmp_path.iterdir()] == ["t.parquet"]


def test_safetensors_has_every_row(shared: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with Client(shared.addresses) as client:
        rows = whole(client, "t")
        export.export(client, "t", path, format="safetensors")
    tensors = load_file(path)
    assert sorted(tensors) == [
        *("embeddings", "frequencies", "keys", "states", "steps", "versions")
    ]
    both = np.concatenate([tensors["embeddings"], tensors["states"]], axis=1)
    history = (tensors[name].tolist() for name in ("versions", "steps", "frequencies"))
    found = zip(tensors["keys"].tolist(), map(bytes, both), *history, strict=True)
    assert {key: tuple(rest) for key, *rest in found} == rows


def test_an_empty_table_is_exported_too(shared: Cluster, tmp_path: Path, name: str) -> None:
    with Client(shared.addresses) as client:
        client.create_table(name, 3, optimizer="sgd")
        for format in export.FORMATS:
            assert export.export(client, name, tmp_path / format, format=format) == 0
        assert parquet.read_table(tmp_path / "parquet").num_rows == 0
        tensors = load_file(tmp_path / "safetensors")
        assert tensors["embeddings"].shape == (0, 3)
        assert {len(each) for each in tensors.values()} == {0}
        assert importer.import_parquet(client, name, tmp_path / "parquet") == 0
        client.drop_table(name)


def test_what_is_no_table_of_rows_is_not_imported(
    shared: Cluster, tmp_path: Path, name: str
) -> None:
    import pyarrow as pa

    floats = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32()))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"key": pa.array([1, 2])}, "no column 'embedding'"),
        ({"key": pa.array([1.0, 2.0]), "embedding": floats}, "key must be"),
        ({"key": pa.array([1, 2]), "embedding": pa.array([[1.0], [2.0]])}, "has dim 2"),
        ({"key": pa.array([1, 2]), "embedding": pa.array([[1.0, 2.0], [2.0]])}, "one length"),
        ({"key": pa.array([1, 2]), "embedding": pa.array([[1.0, 2.0], None])}, "null"),
    ]
    path = tmp_path / "x.parquet"
    with Client(shared.addresses) as client:
        client.create_table(name, 2)
        for columns, why in bad:
            parquet.write_table(pa.table(columns), path)
            with pytest.raises(InvalidArgument, match=why):
                importer.import_parquet(client, name, path)
        twice = pa.array([7, -7, 7])
        floats = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        parquet.write_table(pa.table({"key": twice, "embedding": floats}), path)
        assert importer.import_parquet(client, name, path) == 2
        assert client.table(name).pull([7, -7]).tolist() == [[5.0, 6.0], [3.0, 4.0]]
        client.drop_table(name)


def test_without_pyarrow_it_is_said_what_to_install(
    shared: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with Client(shared.addresses) as client, pytest.raises(InvalidArgument, match=r"\[export\]"):
        export.export(client, "t", tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []
