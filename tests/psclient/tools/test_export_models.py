"""Tables as models that run without servers: PyTorch, ONNX, state dicts; and files that go back."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filled import KEYS, fill, whole
from servers import Cluster, eventually
from torch import nn
from typer.testing import CliRunner

from psclient import Client, admin, frozen
from psclient.errors import InvalidArgument, Unavailable
from psclient.tools import ctl, export, offline, onnxfile
from psclient.tools.commands.shell import Session
from psclient.tools.importer import import_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # still used to serve
]
DEFAULT = 0.25  # serving default of the table "d"
DENSE = np.arange(50)  # keys of the table "d", small enough for a state dict


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoint "full" is."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    """Three shards with the filled tables "t" and "d", and the checkpoint "full" of both."""
    cluster = Cluster(3, "--checkpoint-url", f"file://{directory}").start()
    try:
        with Client(cluster.addresses) as client:
            fill(client)
            table = client.create_table("d", 4, optimizer="adagrad", serving_default=DEFAULT)
            table.push(DENSE, np.random.default_rng(1).standard_normal((50, 4)))
            admin.checkpoint(client, "full")
        yield cluster
    finally:
        assert cluster.stop() == 0


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.addresses) as client:
        yield client


def written(client: Client, tmp_path: Path, table: str = "t", **more: Any) -> Path:
    path = tmp_path / "out"
    export.export(client, table, path, **more)
    return path


def some_keys(size: tuple[int, ...]) -> torch.Tensor:
    """Keys of the table "t", some of which have no row."""
    rng = np.random.default_rng(3)
    found = rng.choice(np.concatenate([KEYS, [10**9, -(10**9), 10**15]]), size)
    found.reshape(-1)[:3] = -1, 10**9, -(2**63)
    return torch.from_numpy(found)


# ---- PyTorch


@pytest.fixture
def bag(client: Client, tmp_path: Path) -> frozen.EmbeddingBag:
    return frozen.load(str(written(client, tmp_path, format="torch")))


def test_a_frozen_table_has_the_rows_that_servers_serve(
    client: Client, bag: frozen.EmbeddingBag
) -> None:
    keys = some_keys((300,))
    served = client.table("t").pull(keys.numpy(), mode="serve")
    assert np.array_equal(bag.lookup(keys).numpy(), served)
    assert len(bag.keys) == client.describe_table("t").rows


@pytest.mark.parametrize("mode", frozen.MODES)
@pytest.mark.parametrize("how", ["eager", "script", "export"])
def test_it_combines_rows_as_torch_does(
    bag: frozen.EmbeddingBag, mode: str, how: str, tmp_path: Path
) -> None:
    ours: Any = frozen.EmbeddingBag(bag.keys, bag.weight, mode=mode)
    keys, offsets = some_keys((6, 5)), torch.tensor([0, 3, 3, 20])
    if how == "script":
        torch.jit.script(ours).save(str(tmp_path / "x.ts"))  # type: ignore[no-untyped-call]
        ours = torch.jit.load(str(tmp_path / "x.ts"))  # type: ignore[no-untyped-call]
    theirs = nn.EmbeddingBag.from_pretrained(bag.weight, mode=mode)
    rows = bag.rows(keys)
    if how == "export":
        batch = torch.export.Dim("batch")
        program = torch.export.export(ours, (keys,), dynamic_shapes=({0: batch},))
        for some in (keys, keys[:2]):
            assert torch.equal(program.module()(some), theirs(bag.rows(some)))
        return
    assert torch.equal(ours(keys), theirs(rows))
    assert torch.equal(ours(keys.reshape(-1), offsets), theirs(rows.reshape(-1), offsets))
    if mode == "sum":
        factors = torch.rand(6, 5)
        weighted = ours(keys, per_sample_weights=factors)
        assert torch.equal(weighted, theirs(rows, per_sample_weights=factors))
    last = frozen.EmbeddingBag(bag.keys, bag.weight, mode=mode, include_last_offset=True)
    ends = torch.tensor([0, 3, 3, 20, 30])
    assert torch.equal(last(keys.reshape(-1), ends), theirs(rows.reshape(-1), offsets))


def test_it_runs_where_the_package_is_not_installed(
    bag: frozen.EmbeddingBag, tmp_path: Path
) -> None:
    """The one file is copied, and the rest of the package cannot be imported."""
    source = importlib.util.find_spec("psclient.frozen")
    assert source is not None
    assert source.origin is not None
    (tmp_path / "copied.py").write_text(Path(source.origin).read_text())
    keys = some_keys((4, 3))
    torch.save(keys, tmp_path / "keys.pt")
    torch.save(bag(keys), tmp_path / "wanted.pt")
    code = """
import sys
sys.modules.update(dict.fromkeys(["psclient", "psproto", "grpc", "google.protobuf"]))
import torch, copied
bag = copied.load("out")
wanted = torch.load("wanted.pt", weights_only=True)
assert torch.equal(bag(torch.load("keys.pt", weights_only=True)), wanted)
"""
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True
    )


def test_eight_bits_are_near(bag: frozen.EmbeddingBag) -> None:
    small, keys = frozen.quantized(bag), some_keys((6, 5))
    spread = float(bag.weight.max() - bag.weight.min())
    for each in (small, torch.jit.script(small)):
        found = each(keys)
        assert found.shape == (6, 6)
        assert float((found - bag(keys)).abs().max()) < 5 * spread / 255
    factors, offsets = torch.rand(6, 5), torch.tensor([0, 3, 3, 20])
    weighted = small(keys, per_sample_weights=factors) - bag(keys, per_sample_weights=factors)
    assert float(weighted.abs().max()) < 5 * spread / 255
    flat = small(keys.reshape(-1), offsets) - bag(keys.reshape(-1), offsets)
    assert float(flat.abs().max()) < 17 * spread / 255
    assert small.packed.nbytes < bag.weight.nbytes * 0.6  # dim 6: 8 of 14 bytes are the scale
    with pytest.raises(ValueError, match="'mode' must be 'sum' to quantize, got 'max'"):
        frozen.quantized(frozen.EmbeddingBag(bag.keys, bag.weight, mode="max"))


def test_wrong_tensors_and_files_are_refused(tmp_path: Path) -> None:
    keys, weight = torch.tensor([1, 2]), torch.zeros(3, 4)
    for wrong, message in (
        ((keys.float(), weight), "'keys' must be int64"),
        ((keys, weight[:2]), r"'weight' must be floats of shape \(3, dim\)"),
        ((keys.flip(0), weight), "'keys' must be sorted and distinct"),
    ):
        with pytest.raises(ValueError, match=message):
            frozen.EmbeddingBag(*wrong)
    with pytest.raises(ValueError, match="'mode' must be one of sum, mean, max, got 'min'"):
        frozen.EmbeddingBag(keys, weight, mode="min")
    torch.save({"weight": weight}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="must contain the tensors 'keys' and 'weight'"):
        frozen.load(str(tmp_path / "x.pt"))


def test_an_empty_table_is_all_default() -> None:
    bag = frozen.EmbeddingBag(torch.empty(0, dtype=torch.int64), torch.full((1, 4), DEFAULT))
    for each in (bag, torch.jit.script(bag)):
        assert torch.equal(each(torch.tensor([[3, 4]])), torch.full((1, 4), 2 * DEFAULT))


def test_a_state_dict_has_one_row_per_key(client: Client, tmp_path: Path) -> None:
    options = {"rows": 60, "name": "user.weight"}
    path = written(client, tmp_path, "d", format="state_dict", options=options)
    model = nn.ModuleDict({"user": nn.EmbeddingBag(60, 4)})
    model.load_state_dict(torch.load(path, weights_only=True))
    served = client.table("d").pull(np.arange(60), mode="serve")
    assert np.array_equal(model["user"].weight.detach().numpy(), served)
    assert served[-1].tolist() == [DEFAULT] * 4
    path = written(client, tmp_path, "d", format="state_dict")
    [(name, weight)] = torch.load(path, weights_only=True).items()
    assert (name, weight.shape) == ("embedding_bags.d.weight", (50, 4))
    for table, rows in (("t", 100), ("d", 49)):
        with pytest.raises(InvalidArgument, match=rf"one row for each key in 0\.\.{rows - 1}"):
            written(client, tmp_path, table, format="state_dict", options={"rows": rows})


# ---- ONNX


@pytest.mark.parametrize("mode", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("encoded", [True, False], ids=["keys in the model", "rows as input"])
def test_an_onnx_model_has_the_rows_that_servers_serve(
    client: Client, tmp_path: Path, mode: str, encoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if not encoded:
        monkeypatch.setattr(onnxfile, "ENCODED", 3)
    path = written(client, tmp_path, format="onnx", options={"mode": mode})
    session = runtime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    keys = some_keys((30, 5)).numpy()
    given = {"keys": keys}
    if not encoded:
        known = np.load(path / "keys.npy")
        at = np.searchsorted(known, keys).clip(max=len(known) - 1)
        given = {"rows": np.where(known[at] == keys, at, len(known))}
    [found] = session.run(["embeddings"], given)
    served = client.table("t").pull(keys, mode="serve")
    combine = {"none": np.asarray, "max": lambda each: each.max(1)}
    if mode in combine:
        assert np.array_equal(found, combine[mode](served))
    else:
        wanted = torch.from_numpy(served).sum(1) / (5 if mode == "mean" else 1)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_an_onnx_model_is_valid_and_says_what_it_is(client: Client, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = written(client, tmp_path, format="onnx")
    onnx.checker.check_model(str(path / "model.onnx"), full_check=True)
    model = onnx.load(path / "model.onnx", load_external_data=False)
    [schema] = model.metadata_props
    assert '"name": "adam"' in schema.value
    assert sorted(each.name for each in path.iterdir()) == ["model.onnx", "weight.bin"]
    with pytest.raises(InvalidArgument, match="'mode' must be one of sum, mean, max, none, got"):
        written(client, tmp_path / "again", format="onnx", options={"mode": "min"})


# ---- there and back


@pytest.mark.parametrize(
    ("format", "suffix", "kind", "whole_rows"),
    [
        ("parquet", "x.parquet", None, True),
        ("safetensors", "x.safetensors", None, True),
        ("npz", "x.npz", None, True),
        ("torch", "x.pt", None, False),
        ("hps", "x", "hps", False),
        ("tfra", "x", "tfra", False),
    ],
)
def test_what_is_exported_is_imported_bit_for_bit(
    client: Client,
    cluster2: Cluster,
    tmp_path: Path,
    name: str,
    format: str,
    suffix: str,
    kind: str | None,
    whole_rows: bool,
) -> None:
    export.export(client, "t", tmp_path / suffix, format=format)
    rows = whole(client, "t")
    with Client(cluster2.addresses) as other:
        other.create_table(name, 6, optimizer="adam")
        count = import_rows(other, name, tmp_path / suffix, kind=kind, journal=tmp_path)
        found = whole(other, name)
        other.drop_table(name)
    assert count == len(rows)
    assert found.keys() == rows.keys()
    for key, (row, _, step, frequency) in rows.items():
        if whole_rows:
            assert (found[key][0], *found[key][2:]) == (row, step, frequency)
        else:
            assert found[key][0][:24] == row[:24]


def test_a_state_dict_goes_back(
    client: Client, cluster2: Cluster, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "x.pt"
    export.export(client, "d", path, format="state_dict")
    with Client(cluster2.addresses) as other:
        other.create_table(name, 4, optimizer="sgd")
        map = {"table": "d"}
        assert import_rows(other, name, path, kind="torchrec", map=map, journal=tmp_path) == 50
        found = other.table(name).pull(DENSE, mode="serve")
        other.drop_table(name)
    assert np.array_equal(found, client.table("d").pull(DENSE, mode="serve"))


# ---- the moment


def test_a_checkpoint_is_exported_without_servers(
    cluster: Cluster, client: Client, directory: Path, tmp_path: Path
) -> None:
    """The servers that took it have other rows meanwhile, and are not asked."""
    before = client.table("d").pull(DENSE, mode="serve")
    client.table("d").push(DENSE, np.ones((50, 4)))
    words = ["export", "d", "--format", "torch", "--out", str(tmp_path / "d.pt")]
    done = CliRunner().invoke(
        ctl.app,
        [*words, "--checkpoint", str(directory / "full")],
        env={"PSCTL_SERVERS": "127.0.0.1:1", "PSCONFIG_DATA_DIR": str(tmp_path / "unused")},
    )
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/d.pt: 50 rows\n"), done.stderr
    assert np.array_equal(frozen.load(str(tmp_path / "d.pt")).weight[:-1].numpy(), before)
    assert not (tmp_path / "unused").exists()
    words = ["export", "x", "--out", str(tmp_path / "x"), "--checkpoint", str(directory / "full")]
    refused = CliRunner().invoke(ctl.app, words)
    assert refused.exit_code == 1
    assert refused.stderr.endswith("full has no table 'x'; it has d, t\n")
    client.table("d").push(DENSE, -np.ones((50, 4)))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match=r"it has no file MANIFEST\.json"):  # noqa: SIM117
        with offline.opened(str(tmp_path)):
            pass
    with pytest.raises(InvalidArgument, match=r"must be the URL of a checkpoint"):  # noqa: SIM117
        with offline.opened("memory://x"):
            pass
    monkeypatch.setattr(offline, "SERVER", "raise SystemExit('no kernels')")
    with pytest.raises(Unavailable, match="does not start: no kernels"):  # noqa: SIM117
        with offline.opened("file:///tmp/x/y"):
            pass


def test_an_export_at_a_barrier_has_the_rows_of_that_moment(
    cluster: Cluster, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = client.create_table("b", 2, optimizer="sgd", initializer="zeros")
    table.push(np.arange(100), np.ones((100, 2)), step=1)
    words = ["export", "b", "--barrier", "end", "--format", "npz", "--out", str(tmp_path / "b.npz")]
    done: list[Any] = []
    variables = {"PSCTL_SERVERS": ",".join(cluster.addresses)}
    waiting, note = threading.Event(), Session.note

    def noted(session: Session, text: str) -> None:
        note(session, text)
        waiting.set()

    monkeypatch.setattr(Session, "note", noted)
    exporting = threading.Thread(
        target=lambda: done.append(CliRunner().invoke(ctl.app, words, env=variables))
    )
    exporting.start()
    assert waiting.wait(60)  # a barrier before that would be missed by some shards

    def placed() -> bool:
        """Push, place a barrier, push: until the export has ended. Only whole steps count."""
        client.barrier("end")
        wanted.append(table.pull(np.arange(100), mode="serve"))
        table.push(np.arange(100), np.ones((100, 2)))
        return not exporting.is_alive()

    wanted: list[Any] = []
    eventually(placed)
    exporting.join()
    assert done[0].exit_code == 0, done[0].stderr
    assert done[0].stderr == "all shards wait for the barrier end, at most 600 s\n"
    with np.load(tmp_path / "b.npz") as arrays:
        order = np.argsort(arrays["keys"])
        found = arrays["embeddings"][order]
    assert len(np.unique(found, axis=0)) == 1  # all shards at the same moment
    assert any(np.array_equal(found, each) for each in wanted)
    assert not [each.name for each in admin.checkpoints(client) if each.name.startswith("export")]
    client.drop_table("b")
