"""Tables as files: what is exported is what other programs read, and goes back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
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
COLUMNS = ("parquet", "safetensors", "npz")  # formats that have every column


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
        for format in COLUMNS:
            assert export.export(client, name, tmp_path / format, format=format) == 0
        assert parquet.read_table(tmp_path / "parquet").num_rows == 0
        tensors = load_file(tmp_path / "safetensors")
        assert tensors["embeddings"].shape == (0, 3)
        assert {len(each) for each in tensors.values()} == {0}
        assert importer.import_parquet(client, name, tmp_path / "parquet") == 0
        client.drop_table(name)


@pytest.mark.parametrize("format", COLUMNS)
def test_keys_are_signed_or_not(shared: Cluster, tmp_path: Path, format: str) -> None:
    found = {}
    with Client(shared.addresses) as client:
        for keys in ("uint64", "int64"):
            path = tmp_path / keys
            export.export(client, "t", path, format=format, keys=keys)
            if format == "parquet":
                found[keys] = parquet.read_table(path)["key"].to_numpy()
            elif format == "safetensors":
                found[keys] = load_file(path)["keys"]
            else:
                with np.load(path) as arrays:
                    found[keys] = arrays["keys"]
        with pytest.raises(
            InvalidArgument, match="'keys' must be one of uint64, int64, got 'int32'"
        ):
            export.export(client, "t", tmp_path / "x", keys="int32")
    assert (found["uint64"].dtype, found["int64"].dtype) == (np.uint64, np.int64)
    assert {-1, -(2**63), 2**63 - 1} <= set(found["int64"].tolist())
    unsigned, signed = np.sort(found["uint64"]), np.sort(found["int64"].view(np.uint64))
    assert np.array_equal(unsigned, signed)


@pytest.mark.parametrize("stored", [None, "full"])
def test_parts_are_a_file_per_shard_and_go_back(
    shared: Cluster, tmp_path: Path, stored: str | None
) -> None:
    path = tmp_path / "t"
    told: list[int] = []
    with Client(shared.addresses) as client:
        rows = whole(client, "t")
        more = {"checkpoint": stored, "keys": "int64", "parts": True}
        assert export.export(client, "t", path, progress=told.append, **more) == len(rows)
        assert sorted(each.name for each in path.iterdir()) == [
            f"part-{shard:05}.parquet" for shard in range(3)
        ]
        assert sum(told) == parquet.read_table(path).num_rows == len(rows)
        client.create_table("parts", 6, optimizer="adam")
        assert importer.import_parquet(client, "parts", path) == len(rows)
        for key, (row, _, *history) in whole(client, "parts").items():
            assert (row, *history) == (rows[key][0], *rows[key][2:])
        client.drop_table("parts")
        with pytest.raises(InvalidArgument, match="choose a new or an empty directory"):
            export.export(client, "t", path, **more)
    assert [each.name for each in tmp_path.iterdir()] == ["t"]


def test_an_export_of_parts_that_fails_leaves_nothing(
    shared: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format = export.FORMATS["parquet"]

    def fail(part: Any, progress: Any) -> int:
        if part.path.name == "part-00001.parquet":
            raise OSError(28, "No space left on device")
        return format.write(part, progress)

    monkeypatch.setitem(export.FORMATS, "parquet", replace(format, write=fail))
    with Client(shared.addresses) as client, pytest.raises(OSError, match="No space left"):
        export.export(client, "t", tmp_path / "t", parts=True)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_nothing_is_read(shared: Cluster, tmp_path: Path) -> None:
    with Client(shared.addresses) as client:
        for path, parts, why in (
            (tmp_path, False, "is a directory"),
            (tmp_path / "no" / "t", False, "cannot be written: No such file"),
            (Path("/proc/t"), True, "cannot be created: No such file"),
        ):
            with pytest.raises(InvalidArgument, match=why):
                export.export(client, "nothing", path, parts=parts)


def test_without_pyarrow_it_is_said_what_to_install(
    shared: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with Client(shared.addresses) as client, pytest.raises(InvalidArgument, match=r"\[export\]"):
        export.export(client, "t", tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []
