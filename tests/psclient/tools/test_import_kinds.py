"""Files of other programs: what each kind reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from kindfiles import (
    DIM,
    FREQUENCIES,
    KEYS,
    SCHEMA,
    SGD,
    STATE,
    STEPS,
    WEIGHT,
    N,
    joined,
    pieces,
    require,
    save_distributed,
)
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from psclient.errors import InvalidArgument
from psclient.tools import incoming, source
from psclient.tools.incoming import Target


@pytest.fixture(params=[10**9, 100], ids=["one batch", "small batches"])
def batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in one batch, and in batches of one or two rows."""
    for module in (incoming, source):
        monkeypatch.setattr(module, "BATCH_BYTES", request.param)


# ---- what is read


@pytest.mark.usefixtures("batches")
class TestNumPy:
    def test_a_matrix_has_the_keys_of_its_row_numbers(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", WEIGHT)
        require(joined(pieces("npy", tmp_path / "x.npy")), keys=np.arange(N))
        found = pieces("npy", tmp_path / "x.npy", offset=-3)
        require(joined(found), keys=np.arange(N) - 3)
        assert found[0].state == "the file has none that fits the optimizer 'adagrad'"
        assert pieces("npy", tmp_path / "x.npy", SGD)[0].state is None

    def test_other_fields_are_files_in_the_same_directory(self, tmp_path: Path) -> None:
        arrays = {"keys": KEYS, "sums": STATE, "seen": FREQUENCIES, "at": STEPS, "x": WEIGHT}
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
        names = {"key": "keys", "state": "sums", "frequency": "seen", "step": "at"}
        found = pieces(
            "npy", tmp_path / "x.npy", map={field: f"{name}.npy" for field, name in names.items()}
        )
        require(joined(found), state=True, steps=STEPS, counts=FREQUENCIES)

    @pytest.mark.parametrize("kind", ["<f2", ">f4", "<f8"])
    def test_floats_of_every_size_are_read(self, tmp_path: Path, kind: str) -> None:
        np.save(tmp_path / "x.npy", WEIGHT.astype(kind))
        found = joined(pieces("npy", tmp_path / "x.npy"))
        assert np.array_equal(found.rows, WEIGHT.astype(kind).astype(np.float32))

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("named", [True, False])
    def test_archives_are_read_by_name(
        self, tmp_path: Path, save: Callable[..., None], named: bool
    ) -> None:
        arrays = {"keys": KEYS, "embeddings": WEIGHT, "states": STATE, "steps": STEPS}
        schema = np.frombuffer(SCHEMA.encode(), np.uint8)
        names = {} if named else {"key": "a", "embedding": "b", "state": "c", "step": "d"}
        values = dict(zip(names.values() if names else arrays, arrays.values(), strict=True))
        save(tmp_path / "x.npz", **values, **({"ps.schema": schema} if named else {}))
        found = pieces("npz", tmp_path / "x.npz", map=names)
        require(joined(found), state=True, steps=STEPS)

    def test_the_only_matrix_is_the_embeddings(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", anything=WEIGHT, keys=KEYS)
        require(joined(pieces("npz", tmp_path / "x.npz")))


@pytest.mark.usefixtures("batches")
class TestSafetensors:
    def test_tensors_are_read_by_name(self, tmp_path: Path) -> None:
        arrays = {"keys": KEYS, "embeddings": WEIGHT, "states": STATE, "frequencies": FREQUENCIES}
        save_file(arrays, tmp_path / "x.safetensors", {"ps.schema": SCHEMA})
        found = pieces("safetensors", tmp_path / "x.safetensors")
        require(joined(found), state=True, counts=FREQUENCIES)

    def test_bfloat16_is_read_exactly(self, tmp_path: Path) -> None:
        weight = torch.from_numpy(WEIGHT).bfloat16()
        save_tensors({"weight": weight}, tmp_path / "x.safetensors")
        torch.save({"weight": weight}, tmp_path / "x.pt")
        for kind, name in (("safetensors", "x.safetensors"), ("torch", "x.pt")):
            found = joined(pieces(kind, tmp_path / name))
            assert np.array_equal(found.rows, weight.float().numpy())

    def test_state_of_another_optimizer_is_not_read_unless_it_is_named(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "x.safetensors"
        other = SCHEMA.replace("adagrad", "momentum")
        save_file({"embeddings": WEIGHT, "states": STATE}, path, {"ps.schema": other})
        found = pieces("safetensors", path)
        assert "is that of 'momentum', but the table's optimizer is 'adagrad'" in str(
            found[0].state
        )
        require(joined(found), keys=np.arange(N))
        named = pieces("safetensors", path, map={"state": "states"})
        require(joined(named), keys=np.arange(N), state=True)


@pytest.mark.usefixtures("batches")
class TestTorch:
    def test_tensors_in_nested_dicts_and_lists_have_dotted_names(self, tmp_path: Path) -> None:
        weight, state = torch.from_numpy(WEIGHT), torch.from_numpy(STATE)
        optimizer = {"state": {0: {"sum": state, "step": torch.tensor(3.0)}}, "param_groups": [{}]}
        torch.save({"model": {"emb.weight": weight}, "opt": [optimizer]}, tmp_path / "x.pt")
        names = {"embedding": "model.emb.weight", "state": "opt.0.state.0.sum"}
        found = pieces("torch", tmp_path / "x.pt", map=names)
        require(joined(found), keys=np.arange(N), state=True)

    def test_a_tensor_and_a_parameter_alone_are_read(self, tmp_path: Path) -> None:
        weight = torch.from_numpy(WEIGHT)
        for value in (weight, torch.nn.Parameter(weight), [weight]):
            torch.save(value, tmp_path / "x.pt")
            require(joined(pieces("torch", tmp_path / "x.pt")), keys=np.arange(N))

    @pytest.mark.parametrize("kind", ["file", "safetensors", "distributed"])
    def test_torchrec_tables_are_found_by_name_with_their_state(
        self, tmp_path: Path, kind: str
    ) -> None:
        prefix = "model.sparse.ebc.embedding_bags"
        tensors = {
            f"{prefix}.t.weight": torch.from_numpy(WEIGHT),
            f"{prefix}.other.weight": torch.zeros(3, 9),
            f"state.{prefix}.t.weight.t.momentum1": torch.from_numpy(STATE),
        }
        path = tmp_path / "x.pt"
        if kind == "file":
            torch.save(tensors, path)
        elif kind == "safetensors":
            path = tmp_path / "x.safetensors"
            save_tensors(tensors, path)
        else:
            save_distributed(tensors, path)
        require(joined(pieces("torchrec", path)), keys=np.arange(N), state=True)
        with pytest.raises(InvalidArgument, match=r"its tables are other, t\. Choose one"):
            pieces("torchrec", path, Target("u", DIM, DIM, "sgd"))
        require(
            joined(pieces("torchrec", path, Target("u", DIM, DIM, "sgd"), map={"table": "t"})),
            keys=np.arange(N),
        )

    def test_state_of_another_size_is_said_and_not_read(self, tmp_path: Path) -> None:
        rowwise = {"t.weight": torch.from_numpy(WEIGHT), "t.weight.t.momentum1": torch.zeros(N)}
        named = {f"ebc.embedding_bags.{name}": each for name, each in rowwise.items()}
        torch.save(named, tmp_path / "x.pt")
        found = pieces("torchrec", tmp_path / "x.pt")
        assert found[0].state == (
            "ebc.embedding_bags.t.weight.t.momentum1 has 1 numbers per row, but 'adagrad' has 2"
        )
        require(joined(found), keys=np.arange(N))
        target = Target("t", DIM, DIM + 1, "rowwise_adagrad")
        rows = joined(pieces("torchrec", tmp_path / "x.pt", target)).rows
        assert np.array_equal(rows, np.hstack([WEIGHT, np.zeros((N, 1))]))

    @pytest.mark.slow
    def test_a_distributed_checkpoint_of_several_parts_is_joined(self, tmp_path: Path) -> None:
        """Parts of rows and of columns, as TorchRec writes them for sharded tables."""
        code = f"""
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import *
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed._shard.sharded_tensor import ShardedTensor, Shard, ShardMetadata
dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=0, world_size=1)
weight = torch.arange({N * DIM}, dtype=torch.float32).reshape({N}, {DIM})
shards = [
    Shard(weight[a:b, c:d].contiguous(), ShardMetadata([a, c], [b - a, d - c], "rank:0/cpu"))
    for a, b in ((0, 3), (3, {N})) for c, d in ((0, 1), (1, {DIM}))
]
tensor = ShardedTensor._init_from_local_shards(shards, {N}, {DIM})
dcp.save({{"m.embedding_bags.t.weight": tensor}}, checkpoint_id="{tmp_path}/parts")
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
        found = joined(pieces("torchrec", tmp_path / "parts"))
        assert np.array_equal(found.rows, np.arange(N * DIM, dtype=np.float32).reshape(N, DIM))


@pytest.mark.usefixtures("batches")
class TestOtherSystems:
    def test_hps(self, tmp_path: Path) -> None:
        KEYS.astype("<i8").tofile(tmp_path / "key")
        WEIGHT.tofile(tmp_path / "emb_vector")
        require(joined(pieces("hps", tmp_path)))

    def test_tfra(self, tmp_path: Path) -> None:
        for part, rows in enumerate((slice(0, 4), slice(4, N)), 1):
            KEYS[rows].astype("<i8").tofile(tmp_path / f"emb_mht_{part}of2-keys")
            WEIGHT[rows].tofile(tmp_path / f"emb_mht_{part}of2-values")
        require(joined(pieces("tfra", tmp_path)))
        (tmp_path / "other_mht_1of1_rank0_size1-keys").touch()
        with pytest.raises(InvalidArgument, match="has the tables emb, other, but no 't'"):
            pieces("tfra", tmp_path)
        require(joined(pieces("tfra", tmp_path, map={"table": "emb"})))

    @pytest.mark.parametrize("strategy", ["none", "step", "frequency"])
    def test_dynamicemb(self, tmp_path: Path, strategy: str) -> None:
        scores = np.arange(N)
        for rank, rows in enumerate((slice(0, 4), slice(4, N))):
            end = f"rank_{rank}.world_size_2"
            KEYS[rows].astype("<i8").tofile(tmp_path / f"t_emb_keys.{end}")
            WEIGHT[rows].tofile(tmp_path / f"t_emb_values.{end}")
            STATE[rows].tofile(tmp_path / f"t_emb_opt_values.{end}")
            scores[rows].astype("<i8").tofile(tmp_path / f"t_emb_scores.{end}")
        (tmp_path / "t_opt_args.json").write_text(json.dumps({"opt_type": "EXACT_ADAGRAD"}))
        names = {} if strategy == "none" else {strategy: "scores"}
        found = joined(pieces("dynamicemb", tmp_path, map=names))
        require(
            found,
            state=True,
            steps=scores if strategy == "step" else None,
            counts=scores if strategy == "frequency" else None,
        )

    def test_csv(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        lines = ["step,embedding_1,note,key,embedding_0"]
        lines += [
            f"{s},{w[1]!r},x,{k},{w[0]!r}"
            for s, w, k in zip(STEPS, WEIGHT.tolist(), KEYS, strict=True)
        ]
        path.write_text("\n".join(lines))
        found = pieces("csv", path)
        require(joined(found), steps=STEPS)
        path.write_text(path.read_text().replace("key", "id").replace("embedding_", "e"))
        require(joined(pieces("csv", path, map={"key": "id", "embedding": "e"})), steps=STEPS)


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of an empty directory in the memory file system of fsspec."""
    system = fsspec.filesystem("memory")
    system.mkdirs("/models", exist_ok=True)
    yield "memory://models"
    system.rm("/models", recursive=True)


def test_urls_are_read(memory: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", WEIGHT)
    np.savez(tmp_path / "x.npz", keys=KEYS, embeddings=WEIGHT)
    save_file({"keys": KEYS, "embeddings": WEIGHT}, tmp_path / "x.safetensors")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(WEIGHT.reshape(-1)), DIM)
    parquet.write_table(pa.table({"key": KEYS, "embedding": lists}), tmp_path / "x.parquet")
    np.save(tmp_path / "keys.npy", KEYS)
    for each in tmp_path.iterdir():
        fsspec.filesystem("memory").pipe(f"/models/{each.name}", each.read_bytes())
    require(joined(pieces("npy", f"{memory}/x.npy", map={"key": "keys.npy"})))
    for kind in ("npz", "safetensors", "parquet"):
        require(joined(pieces(kind, f"{memory}/x.{kind}")))
    with pytest.raises(InvalidArgument, match="files of the kind 'torch' must be local"):
        pieces("torch", f"{memory}/x.pt")
    with pytest.raises(InvalidArgument, match=r"nothing\.npy: cannot be opened"):
        pieces("npy", f"{memory}/nothing.npy")


@pytest.mark.usefixtures("batches")
def test_a_piece_is_read_from_any_row(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", WEIGHT)
    np.savez_compressed(tmp_path / "x.npz", embeddings=WEIGHT)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(WEIGHT.reshape(-1)), DIM)
    table = pa.table({"key": np.arange(N), "embedding": lists})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    lines = ["key,embedding_0,embedding_1"]
    lines += [f"{k},{a!r},{b!r}" for k, (a, b) in enumerate(WEIGHT.tolist())]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    for kind in ("npy", "npz", "parquet", "csv"):
        [piece] = pieces(kind, tmp_path / f"x.{kind}")
        for start in range(N):
            found = joined([piece], start)
            assert found.keys.tolist() == list(range(start, N))
            assert np.array_equal(found.rows, WEIGHT[start:])
        assert not any(len(rows.keys) for rows in piece.read(N))
